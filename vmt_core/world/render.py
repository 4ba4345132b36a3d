"""Pixels, masks and exact tracks of a scene.

Anti-aliasing is analytic: a pixel takes a colour by its signed distance to the edge, in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vmt_core.shapes import Frames
from vmt_core.world.motion import Matrices, Part, cameras, parts
from vmt_core.world.spec import BACKGROUNDS, COLOURS, LIGHTER, Background, Scene

Box = tuple[int, int, int, int]  # top, left, bottom, right, in pixels


@dataclass(frozen=True)
class Tracks:
    """Where points of the scene are, in pixels (x, y) of pixel centres at .5; exact, not tracked."""

    points: Float[Tensor, "frames n 2"]
    visible: Bool[Tensor, "frames n"]  # inside the frame and not behind another part
    body: Int[Tensor, " n"]  # which body the point is on; -1 is the background


def render(scene: Scene, crop: Box | None = None) -> Frames:
    """The clip, or a crop of it: (frames, 3, height, width) uint8."""
    top, left, bottom, right = crop or (0, 0, scene.height, scene.width)
    short = min(scene.height, scene.width)
    grid = _pixels(scene, (top, left, bottom, right))
    image = _background(scene.background, cameras(scene), grid, short)  # (frames or 1, 3, H, W)
    image = image.expand(scene.frames, -1, -1, -1).clone()
    pieces = parts(scene)
    for index, body in enumerate(scene.bodies):
        own = [part for part in pieces if part.body == index]
        rows, cols = _window(own, short, scene, (top, left, bottom, right))
        if rows.start >= rows.stop or cols.start >= cols.stop:
            continue
        near = grid[rows, cols]
        distance = _distance(own[0], near, short)
        for part in own[1:]:
            distance = torch.minimum(distance, _distance(part, near, short))
        cover = (0.5 - distance).clamp_(0, 1).unsqueeze(1)  # (frames, 1, rows, cols)
        colour = torch.tensor(COLOURS[body.colour], dtype=torch.float32).view(1, 3, 1, 1)
        image[:, :, rows, cols] += cover * (colour - image[:, :, rows, cols])
    return image.round_().to(torch.uint8)


def masks(scene: Scene) -> Int[Tensor, "frames height width"]:
    """Which body is seen at each pixel's centre: its index, or -1 for the background; int8."""
    grid = _pixels(scene, (0, 0, scene.height, scene.width)).double().reshape(-1, 2)
    pieces = parts(scene)
    owner = _owner(pieces, grid.expand(scene.frames, -1, -1))
    bodies = torch.tensor([part.body for part in pieces] + [-1], dtype=torch.int8)
    return bodies[owner].view(scene.frames, scene.height, scene.width)


def tracks(scene: Scene, points: Float[Tensor, "n 2"] | None = None, frame: int = 0) -> Tracks:
    """The paths of whatever is seen at `points` of a frame, the first by default.

    Args:
        points: pixels (x, y); None: a grid of `grid_points`.
    """
    short = min(scene.height, scene.width)
    start = grid_points(scene.height, scene.width) if points is None else points
    start = _to_units(start.double(), scene)
    pieces = parts(scene)
    owner = _owner(pieces, start.unsqueeze(0), frame)[0]
    matrices = torch.stack([*(part.matrix for part in pieces), cameras(scene)])  # index -1 is the background
    own = matrices[owner]  # (n, frames, 3, 3)
    homogeneous = torch.cat([start, torch.ones_like(start[:, :1])], -1)[:, None, :, None]
    local = torch.linalg.inv(own[:, frame : frame + 1]) @ homogeneous
    path = (own @ local)[..., :2, 0].transpose(0, 1)  # (frames, n, 2)
    seen = _owner(pieces, path) == owner
    pixels = path * short + path.new_tensor([scene.width, scene.height]) / 2
    inside = ((pixels >= 0) & (pixels < pixels.new_tensor([scene.width, scene.height]))).all(-1)
    bodies = torch.tensor([part.body for part in pieces] + [-1])
    seen[frame] = True  # by definition, whatever rounding at an edge says
    return Tracks(pixels.float(), seen & inside, bodies[owner])


def centres(scene: Scene) -> Float[Tensor, "frames bodies 2"]:
    """The centre of each body in pixels (x, y): of its shape, of a figure's hip, of a pendulum's bob; also where it is hidden."""
    short = min(scene.height, scene.width)
    pieces = parts(scene)
    chosen = []
    for index, body in enumerate(scene.bodies):
        own = [part for part in pieces if part.body == index]
        chosen.append(own[-1 if body.kind == "pendulum" else 0].matrix)
    place = torch.stack(chosen, 1)[..., :2, 2]
    return (place * short + place.new_tensor([scene.width, scene.height]) / 2).float()


def grid_points(height: int, width: int, spacing: int = 12) -> Float[Tensor, "n 2"]:
    """A regular grid of pixel centres (x, y), row by row."""
    rows = torch.arange(spacing / 2, height, spacing)
    cols = torch.arange(spacing / 2, width, spacing)
    return torch.stack(torch.meshgrid(cols, rows, indexing="xy"), -1).reshape(-1, 2)


def _to_units(pixels: Tensor, scene: Scene) -> Tensor:
    return (pixels - pixels.new_tensor([scene.width, scene.height]) / 2) / min(scene.height, scene.width)


def _pixels(scene: Scene, crop: Box) -> Float[Tensor, "height width 2"]:
    """Centres of the pixels of a crop, in units (x, y)."""
    top, left, bottom, right = crop
    rows, cols = torch.arange(top, bottom) + 0.5, torch.arange(left, right) + 0.5
    return _to_units(torch.stack(torch.meshgrid(cols, rows, indexing="xy"), -1).float(), scene)


def _inverse(matrix: Tensor, points: Tensor) -> Tensor:
    """Points (…, 2) of the image in the coordinates of matrices (frames, 3, 3): (frames, …, 2)."""
    inverse = torch.linalg.inv(matrix).to(points.dtype)
    axes = (slice(None), *(None,) * (points.ndim - 1))
    a, b, c, d = (inverse[:, i, j][axes] for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)))
    x, y = points[..., 0], points[..., 1]
    return torch.stack([a * x + b * y + inverse[:, 0, 2][axes], c * x + d * y + inverse[:, 1, 2][axes]], -1)


def _scale(matrix: Tensor) -> Tensor:
    """How much longer lengths become, (frames,)."""
    return torch.hypot(matrix[:, 0, 0], matrix[:, 1, 0])


def _distance(part: Part, grid: Tensor, short: int) -> Float[Tensor, "frames height width"]:
    """Signed distance of pixels to a part, in pixels."""
    return part.distance(_inverse(part.matrix, grid)) * (_scale(part.matrix) * short).float().view(-1, 1, 1)


def _owner(pieces: list[Part], points: Float[Tensor, "frames n 2"], first: int = 0) -> Int[Tensor, "frames n"]:
    """The last drawn part at each point: its index, or -1; the points are those of the frames from `first` on."""
    owner = torch.full(points.shape[:2], -1)
    for index, part in enumerate(pieces):
        matrix = torch.linalg.inv(part.matrix[first : first + len(points)])
        local = points @ matrix[:, :2, :2].mT + matrix[:, None, :2, 2]
        owner[part.distance(local) < 0] = index
    return owner


def _window(own: list[Part], short: int, scene: Scene, crop: Box) -> tuple[slice, slice]:
    """Rows and columns of the crop that a body can touch in any frame."""
    top, left, bottom, right = crop
    low, high = [], []
    for part in own:
        centre, reach = part.matrix[:, :2, 2], (part.reach * _scale(part.matrix))[:, None]
        low.append((centre - reach).amin(0))
        high.append((centre + reach).amax(0))
    half = torch.tensor([scene.width, scene.height]) / 2
    x0, y0 = (torch.stack(low).amin(0) * short + half - 1).floor().int().tolist()
    x1, y1 = (torch.stack(high).amax(0) * short + half + 1).ceil().int().tolist()
    return (
        slice(max(y0 - top, 0), max(min(y1, bottom) - top, 0)),
        slice(max(x0 - left, 0), max(min(x1, right) - left, 0)),
    )


def _background(
    background: Background, camera: Matrices, grid: Tensor, short: int
) -> Float[Tensor, "frames 3 height width"]:
    """The plane as the camera sees it; one frame if the camera stands still."""
    first = torch.tensor(BACKGROUNDS[background.colour], dtype=torch.float32).view(1, 3, 1, 1)
    if background.pattern == "plain":
        return first.expand(1, 3, *grid.shape[:2])
    second = first + LIGHTER * (255 - first)
    if bool((camera == camera[0]).all()):
        camera = camera[:1]
    place = _inverse(camera, grid)  # (frames, H, W, 2)
    cos, sin, period = math.cos(background.angle), math.sin(background.angle), background.period
    u = (place[..., 0] * cos + place[..., 1] * sin) / period
    v = (place[..., 1] * cos - place[..., 0] * sin) / period
    if background.pattern == "gradient":
        return first + (second - first) * (0.5 - 0.5 * (2 * math.pi * u).cos()).unsqueeze(1)
    if background.pattern == "striped":
        distance = _band(u)
    elif background.pattern == "checkered":
        a, b = _band(u), _band(v)
        distance = torch.minimum(a.abs(), b.abs()) * a.sign() * b.sign()
    else:
        distance = torch.hypot(u.remainder(1) - 0.5, v.remainder(1) - 0.5) - 0.27
    pixels = (_scale(camera) * short * period).float().view(-1, 1, 1)
    return first + (second - first) * (0.5 - distance * pixels).clamp_(0, 1).unsqueeze(1)


def _band(u: Tensor) -> Tensor:
    """Signed distance to the edges of bands of width 1/2, in periods."""
    return (u.remainder(1) - 0.5).abs() - 0.25
