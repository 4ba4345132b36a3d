"""Motion agreement of two clips, from tracks of their points: exact ones where the world gives them, else from optical flow.

`aligned` is the headline number where a method is to keep the layout: +1 the same motion at the same places, 0 unrelated, -1 opposite.
It compares directions of steps of tracks that start at the same pixel. Chance level is 0. A step is the way of OVER frames, not of one:
optical flow is off by some tenths of a pixel, which is much of a slow step and little of four.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from itertools import pairwise

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import grid_sample

from vmt_core.shapes import Frames
from vmt_core.world.render import Tracks, grid_points

Positions = Float[Tensor, "frames n 2"]
Visible = Bool[Tensor, "frames n"]

MOVES = 0.3  # pixels a frame at a width of 256: less is standing still
OVER = 4  # frames that a step spans, those of one latent
_LOST = 0.75  # pixels of forward-backward error at which a track ends
_FLAT = 4.0  # of 255, standard deviation about a pixel below which there is nothing to see
_CHANGED = 6  # of 255: less is noise
_EDGE = 4  # pixels from a flat area to what lies beyond its edge
_AT_REST = 0.3  # of an area's edge that may change, by what passes before it, while the area stands still


def start_points(height: int, width: int) -> Float[Tensor, "n 2"]:
    """Where tracks start: a grid of 32 points along the shorter side, so that a thin limb has some."""
    return grid_points(height, width, spacing=max(1, min(height, width) // 32))


def flow_tracks(
    frames: Frames, points: Float[Tensor, "n 2"], watch: Callable[[int, np.ndarray, np.ndarray], None] | None = None
) -> tuple[Positions, Visible]:
    """Tracks of points (x, y) of the first frame, by chained DIS optical flow with a forward-backward check.

    A track that is lost or leaves the frame stays invisible from there on.

    Args:
        watch: is shown the flows, which cost most: number of a frame, flow (H, W, 2) from it to the next, and back.
    """
    images = list(frames.permute(0, 2, 3, 1).contiguous().numpy())
    flow = estimator()
    height, width = images[0].shape[:2]
    limit = points.new_tensor([width, height])
    positions, visible = [points], [torch.ones(len(points), dtype=torch.bool)]
    for number, (first, second) in enumerate(pairwise(images)):
        grays = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (first, second)]
        forward = flow.calc(grays[0], grays[1], np.zeros((0,), np.float32))
        backward = flow.calc(grays[1], grays[0], np.zeros((0,), np.float32))
        if watch is not None:
            watch(number, forward, backward)
        forward[at_rest(first, second)], backward[at_rest(second, first)] = 0, 0
        there = _at(forward, positions[-1])
        moved = positions[-1] + there
        back = _at(backward, moved)
        inside = ((moved >= 0) & (moved < limit)).all(-1)
        positions.append(moved)
        visible.append(visible[-1] & inside & ((there + back).norm(dim=-1) <= _LOST))
    return torch.stack(positions), torch.stack(visible)


def at_rest(image: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Where (H, W) an image (H, W, 3) stands still up to the other one: nothing changes there, nor around the flat area it is part of.

    Optical flow has nothing to go by on a flat area, or along a stripe, and lets it drift along with whatever moves beside it. A flat
    area that moves changes along most of its edge; one that stands still, only where something passes before it.
    """
    pixels, size = image.astype(np.float32), (7, 7)
    mean = cv2.blur(pixels, size)
    flat = (cv2.blur(pixels * pixels, size) - mean * mean).sum(-1) < _FLAT**2
    number, areas = cv2.connectedComponents(flat.astype(np.uint8), connectivity=4)
    changed = cv2.dilate((cv2.absdiff(image, other).max(-1) > _CHANGED).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    # What lies beyond the frame is an edge of the areas at its border, as wide as other edges, and changes where the border does.
    beyond = ~np.pad(flat, size[0])
    beyond_changed = beyond & np.pad(changed, size[0], mode="edge")
    around = np.pad(areas, size[0] + _EDGE)
    height, width = beyond.shape
    edge, edge_changed = np.zeros(number), np.zeros(number)
    for down in range(0, 2 * _EDGE + 1, _EDGE):
        for right in range(0, 2 * _EDGE + 1, _EDGE):
            beside = around[down : down + height, right : right + width]
            edge += np.bincount(beside[beyond], minlength=number)
            edge_changed += np.bincount(beside[beyond_changed], minlength=number)
    moves = edge_changed > _AT_REST * edge
    moves[0] = False
    near = cv2.dilate(moves[areas].astype(np.uint8), np.ones((2 * _EDGE + 1, 2 * _EDGE + 1), np.uint8)) > 0
    resting: np.ndarray = ~changed & ~near
    return resting


def estimator() -> cv2.DISOpticalFlow:
    """DIS optical flow, finer than its presets: on flat shapes and patterns these follow edges badly."""
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flow.setFinestScale(0)
    flow.setPatchStride(2)
    flow.setGradientDescentIterations(40)
    flow.setVariationalRefinementIterations(20)
    flow.setVariationalRefinementAlpha(5.0)
    return flow


def aligned(
    first: tuple[Positions, Visible],
    second: tuple[Positions, Visible],
    width: int,
    moves: float = MOVES,
    over: int = OVER,
) -> float:
    """Mean, over points that move in either clip, of the cosine of their steps where both are seen and either moves.

    0 if something moves but nothing of it can be followed in both; nan if nothing moves in either. Where nothing is seen for `over`
    frames, steps are shorter. A mean of few points says little: `followed` tells how many they are.
    """
    corr, count = _agreement(first, second, width, moves, over)
    if not bool((count > 0).any()):
        return 0.0 if len(count) else float("nan")
    return float(corr[count > 0].mean())


def followed(
    first: tuple[Positions, Visible],
    second: tuple[Positions, Visible],
    width: int,
    moves: float = MOVES,
    over: int = OVER,
) -> float:
    """Share of the points that move in either clip which are seen in both while they do: those that `aligned` is the mean of.

    Low where a video comes apart, so that tracks are lost; nan if nothing moves in either.
    """
    _, count = _agreement(first, second, width, moves, over)
    return float((count > 0).float().mean()) if len(count) else float("nan")


def _agreement(
    first: tuple[Positions, Visible], second: tuple[Positions, Visible], width: int, moves: float, over: int
) -> tuple[Float[Tensor, " m"], Int[Tensor, " m"]]:
    """Of each point that moves in either clip: the mean cosine of its steps, and of how many."""
    (one, seen_one), (two, seen_two) = _steps(first, over), _steps(second, over)
    seen, least = seen_one & seen_two, moves * over * width / 256
    mobile = moving(first, width, moves, over) | moving(second, width, moves, over)
    long_one, long_two = one.norm(dim=-1) > least, two.norm(dim=-1) > least
    steps = (seen & (long_one | long_two))[:, mobile]
    cosine = ((_unit(one) * _unit(two)).sum(-1) * (long_one & long_two))[:, mobile]  # a step against a stand: unrelated
    count = steps.sum(0)
    if over > 1 and not bool((count > 0).any()):  # tracks may be lost too soon for long steps
        shorter = _agreement(first, second, width, moves, over // 2)
        if len(shorter[1]) or not len(count):  # else only long steps tell that something moves
            return shorter
    return (cosine * steps).sum(0) / count.clamp(min=1), count


def matched(
    first: tuple[Positions, Visible],
    second: tuple[Positions, Visible],
    width: int,
    moves: float = MOVES,
    over: int = OVER,
) -> float:
    """Motion fidelity within what moves (after Yatim et al., arXiv 2311.17009): each moving track with its best match in the other
    clip, both ways, whatever the places.

    1 the same motions, 0 if one clip stands still, nan if both do. Chance is above 0: unrelated tracks have a best match, too.
    """
    (one, seen_one), (two, seen_two) = (
        _directions(tracks, moving(tracks, width, moves, over), over) for tracks in (first, second)
    )
    if one.shape[0] == 0 or two.shape[0] == 0:
        return float("nan") if one.shape[0] == two.shape[0] else 0.0
    together = seen_one @ seen_two.T  # steps that both are seen at
    corr = (one.flatten(1) @ two.flatten(1).T) / together.clamp(min=1)
    corr = corr.masked_fill(together == 0, -1.0)
    return float((corr.amax(1).mean() + corr.amax(0).mean()) / 2)


def moving_share(tracks: tuple[Positions, Visible], width: int, moves: float = MOVES, over: int = OVER) -> float:
    """Share of the tracks that move."""
    return float(moving(tracks, width, moves, over).float().mean())


def moving(tracks: tuple[Positions, Visible], width: int, moves: float = MOVES, over: int = OVER) -> Bool[Tensor, " n"]:
    """Tracks that are seen in half of the steps and move in half of those."""
    ways, seen = _steps(tracks, over)
    steps = ways.norm(dim=-1) > moves * over * width / 256
    found: Tensor = (seen.sum(0) >= len(steps) / 2) & ((steps & seen).sum(0) >= seen.sum(0) / 2) & seen.any(0)
    return found


def trajectory_correlation(first: Float[Tensor, "frames 2"], second: Float[Tensor, "frames 2"]) -> float:
    """Correlation of two paths about their means, x and y together, in [-1, 1]; nan if either stands still (under 2 pixels)."""
    one, two = (path[~torch.isnan(first + second).any(-1)] for path in (first, second))
    if len(one) < len(first) / 2:
        return float("nan")
    one, two = one - one.mean(0), two - two.mean(0)
    if min(one.norm(dim=-1).max(), two.norm(dim=-1).max()) < 2:
        return float("nan")
    return float((one * two).sum() / (one.norm() * two.norm()))


def jerk(path: Float[Tensor, "frames 2"]) -> float:
    """Mean length of the third difference over the mean length of a step: how unevenly something moves, without unit."""
    steps = path.diff(dim=0).norm(dim=-1).mean()
    return float(path.diff(n=3, dim=0).norm(dim=-1).mean() / steps.clamp(min=1e-6))


def packed(tracks: tuple[Positions, Visible], height: int, width: int, every: int = 4) -> str:
    """Tracks to be drawn: base64 of uint8 (n, frames, 2), x and y as 0 to 254 of the frame's width and height, 255 where unseen.

    Args:
        every: of the rows and columns of `start_points`, one in so many.
    """
    spacing = max(1, min(height, width) // 32)
    place = (tracks[0][0] / spacing - 0.5).round().long()
    some = (place % every == every // 2).all(-1)
    share = tracks[0][:, some] / tracks[0].new_tensor([width, height])
    values = (share.clamp(0, 1) * 254).round().masked_fill(~tracks[1][:, some, None], 255)
    return base64.b64encode(values.transpose(0, 1).to(torch.uint8).numpy().tobytes()).decode()


def of_world(tracks: Tracks) -> tuple[Positions, Visible]:
    """Exact tracks, for `aligned`: a point that was hidden may be seen again."""
    return tracks.points, tracks.visible


def _steps(tracks: tuple[Positions, Visible], over: int) -> tuple[Tensor, Tensor]:
    """Ways over so many frames (frames - over, n, 2), or over all of a shorter clip, and where a track is seen all along."""
    positions, visible = tracks
    over = min(over, len(positions) - 1)
    return positions[over:] - positions[:-over], visible.unfold(0, over + 1, 1).all(-1)


def _directions(tracks: tuple[Positions, Visible], chosen: Bool[Tensor, " n"], over: int) -> tuple[Tensor, Tensor]:
    """Unit steps of chosen tracks, zero where unseen, (n, steps, 2), and where they are seen, (n, steps)."""
    steps, visible = _steps(tracks, over)
    seen = visible[:, chosen].T.float()
    return _unit(steps)[:, chosen].transpose(0, 1) * seen.unsqueeze(-1), seen


def _unit(steps: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(steps, dim=-1, keepdim=True)
    return steps / length.clamp(min=1e-6)


def _at(flow: np.ndarray, points: Tensor) -> Tensor:
    """A flow field (H, W, 2) at points (n, 2) in pixels, linearly."""
    field = torch.from_numpy(flow).permute(2, 0, 1).unsqueeze(0)
    size = points.new_tensor([flow.shape[1], flow.shape[0]])
    grid = (2 * points / size - 1).view(1, 1, -1, 2)  # pixel centres are at .5
    return grid_sample(field, grid, mode="bilinear", padding_mode="border", align_corners=False)[0, :, 0].T
