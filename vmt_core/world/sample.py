"""Random scenes: a seed gives a scene, always the same one, and also says which split it belongs to.

Scenes of the test split show combinations of shape, colour and background that no scene of the train split has, so that prompts of the
test split are new to whatever was trained on the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from random import Random
from typing import Literal, get_args

from vmt_core.world.spec import (
    Arc,
    Background,
    BackgroundColour,
    Body,
    Bounce,
    Camera,
    Category,
    Colour,
    Figure,
    Line,
    Object,
    Path,
    Pattern,
    Pendulum,
    Point,
    Scale,
    Scene,
    ShapeName,
    Spin,
    Still,
)

Split = Literal["train", "val", "test"]

#: The kinds of motion of each category (those of MotionBench) and how often a category is drawn.
MOTIONS: dict[Category, tuple[str, ...]] = {
    "camera": ("pan", "zoom", "roll", "orbit", "shake"),
    "single": ("line", "arc", "bounce", "orbit", "spin", "scale"),
    "multiple": ("independent", "crossing", "following"),
    "articulated": ("walk", "wave", "jump", "pendulum"),
}
_WEIGHTS: dict[Category, float] = {"camera": 0.2, "single": 0.35, "multiple": 0.25, "articulated": 0.2}
_SHAPES: tuple[ShapeName, ...] = get_args(ShapeName)
_COLOURS: tuple[Colour, ...] = get_args(Colour)
_PATTERNS: tuple[Pattern, ...] = get_args(Pattern)
_GROUNDS: tuple[BackgroundColour, ...] = get_args(BackgroundColour)


def split(seed: int) -> Split:
    """Of 20 seeds in a row one is for validation, one for tests."""
    return {18: "val", 19: "test"}.get(seed % 20, "train")  # type: ignore[return-value]


def sample(
    seed: int,
    *,
    category: Category | None = None,
    motion: str | None = None,
    frames: int = 17,
    height: int = 192,
    width: int = 192,
    fps: float = 12.0,
) -> Scene:
    """The scene of a seed; a category or a motion can be asked for.

    Raises:
        ValueError: no such motion in the category.
    """
    random = Random(f"scene {seed}")
    if category is None:
        fitting = [name for name, motions in MOTIONS.items() if motion is None or motion in motions]
        if not fitting:
            raise ValueError(f"motion {motion!r} is not one of {', '.join(sum(MOTIONS.values(), ()))}")
        category = random.choices(fitting, [_WEIGHTS[name] for name in fitting])[0]
    if motion is not None and motion not in MOTIONS[category]:
        raise ValueError(f"motion {motion!r} is not one of category {category}: {', '.join(MOTIONS[category])}")
    motion = motion or random.choice(MOTIONS[category])
    short = min(height, width)
    frame = (width / short / 2, height / short / 2)
    colours = random.sample(_COLOURS, 4)
    if category == "camera":
        bodies, camera, patterns = _camera(random, motion, colours, frame)
    elif category == "multiple":
        bodies, camera, patterns = _multiple(random, motion, colours, frame), Camera(), _PATTERNS
    elif category == "single":
        bodies, camera, patterns = (_single(random, motion, colours[0], frame),), Camera(), _PATTERNS
    else:
        bodies, camera, patterns = (_articulated(random, motion, colours[0], frame),), Camera(), _PATTERNS
    return Scene(
        category=category,
        motion=motion,
        bodies=bodies,
        background=_background(random, split(seed), bodies, patterns, camera),
        camera=camera,
        frames=frames,
        height=height,
        width=width,
        fps=fps,
        seed=seed,
    )


def held_out(body: Body, pattern: Pattern, ground: BackgroundColour) -> bool:
    """Whether this combination is kept for the test split; one in ten is, spread evenly."""
    kind = _SHAPES.index(body.shape) if body.kind == "object" else len(_SHAPES) + (body.kind == "pendulum")
    place = 5 * kind + 3 * _COLOURS.index(body.colour) + 7 * _GROUNDS.index(ground) + _PATTERNS.index(pattern)
    return place % 10 == 0


def _background(
    random: Random, part: Split, bodies: tuple[Body, ...], patterns: tuple[Pattern, ...], camera: Camera
) -> Background:
    choices = [(pattern, ground) for pattern in patterns for ground in _GROUNDS]
    if part == "test":
        choices = [choice for choice in choices if held_out(bodies[0], *choice)]
    else:
        choices = [choice for choice in choices if not any(held_out(body, *choice) for body in bodies)]
    pattern, ground = random.choice(choices)
    angle = random.choice((0.0, 0.25, 0.5, 0.75)) * math.pi
    if pattern == "striped" and camera.kind in ("pan", "orbit", "shake"):
        angle = math.atan2(camera.shift[1], camera.shift[0])  # motion along the stripes could not be seen
    period = 2 * random.uniform(0.6, 0.9) if pattern == "gradient" else random.uniform(0.26, 0.4)
    return Background(pattern=pattern, colour=ground, period=period, angle=angle)


def _size(random: Random, shape: ShapeName, low: float, high: float) -> float:
    """Radius; pointed shapes are larger, so that all have about the same area."""
    return random.uniform(low, high) * {"triangle": 1.25, "star": 1.25, "cross": 1.1, "ring": 1.05}.get(shape, 1.0)


def _camera(
    random: Random, motion: str, colours: list[Colour], frame: Point
) -> tuple[tuple[Body, ...], Camera, tuple[Pattern, ...]]:
    bodies: list[Object] = []
    count = random.choice((1, 1, 2))
    while not bodies or any(_touch(one, other) for one, other in combinations(bodies, 2)):
        bodies = []
        for colour in colours[:count]:
            shape = random.choice(_SHAPES)
            size = _size(random, shape, 0.14, 0.2) * (0.85 if count == 2 else 1)
            at = (0.0, 0.0) if motion == "orbit" and count == 1 else _inside(random, frame, size + 0.08)
            bodies.append(Object(shape=shape, colour=colour, size=size, path=Still(at=at)))
    sign = random.choice((-1, 1))
    patterns: tuple[Pattern, ...] = ("striped", "checkered", "dotted")
    match motion:
        case "pan":
            angle, reach = random.choice(range(8)) * math.pi / 4, random.uniform(0.3, 0.6)
            camera = Camera(kind="pan", shift=(reach * math.cos(angle), reach * math.sin(angle)))
        case "orbit":
            camera = Camera(kind="orbit", shift=(sign * random.uniform(0.4, 0.7), random.uniform(0.05, 0.15)))
        case "shake":
            shift = (random.uniform(0.04, 0.08), random.uniform(0.04, 0.08))
            camera = Camera(
                kind="shake", shift=shift, cycles=random.uniform(1.2, 2.0), phase=random.uniform(0, 2 * math.pi)
            )
        case "zoom":
            camera = Camera(kind="zoom", factor=random.uniform(1.5, 2.2) ** sign)
        case _:
            camera = Camera(kind="roll", turn=sign * random.uniform(0.5, 1.2))
    return tuple(bodies), camera, patterns


def _single(random: Random, motion: str, colour: Colour, frame: Point) -> Object:
    turns_visibly = tuple(name for name in _SHAPES if name not in ("circle", "ring"))
    shape = random.choice(turns_visibly if motion == "spin" else _SHAPES)
    size = _size(random, shape, 0.16, 0.23)
    angle = random.uniform(-0.3, 0.3)
    sign = random.choice((-1, 1))
    path: Path
    if motion == "line":
        path = _line(random, frame, size)
    elif motion in ("arc", "orbit"):
        size = min(size, 0.22)
        radius = random.uniform(0.16, min(frame) - size) if motion == "orbit" else random.uniform(0.2, 0.28)
        extent = random.uniform(0.75, 1.0) if motion == "orbit" else random.uniform(0.3, 0.5)
        first = random.uniform(0, 2 * math.pi)
        centre = _inside(random, frame, radius + size)
        path = Arc(
            kind="arc" if motion == "arc" else "orbit",
            centre=centre,
            radius=radius,
            angle_from=first,
            angle_to=first + sign * extent * 2 * math.pi,
        )
    elif motion == "bounce":
        x, floor = frame[0] - size, frame[1] - size
        reach = random.uniform(0.5, 1.0) * x
        start, end = (-sign * reach, floor), (sign * reach, floor)
        path = Bounce(start=start, end=end, height=random.uniform(0.25, 0.4), hops=random.choice((1.0, 1.5, 2.0)))
    elif motion == "spin":
        path = Spin(at=_inside(random, frame, size), turn=sign * random.uniform(0.8, 2.0))
    else:
        factor = random.uniform(1.6, 2.2)
        size = size / factor if sign > 0 else size
        size *= 1.25
        path = Scale(at=_inside(random, frame, 0.24), factor=factor**sign)
    return Object(shape=shape, colour=colour, size=size, angle=angle, path=path)


def _multiple(random: Random, motion: str, colours: list[Colour], frame: Point) -> tuple[Body, ...]:
    shapes = [random.choice(_SHAPES) for _ in range(3)]
    sizes = [_size(random, shape, 0.13, 0.17) for shape in shapes]
    if motion == "crossing":  # they meet in the middle of their ways, the second in front
        angle = random.uniform(0, 2 * math.pi)
        turn = random.choice((-1, 1)) * random.uniform(0.5, 1.0) * math.pi
        meet = _inside(random, (0.15, 0.15), 0)
        paths = []
        for direction, size in zip((angle, angle + turn), sizes, strict=False):
            reach = min(random.uniform(0.26, 0.34), min(frame) - size - 0.02)
            dx, dy = reach * math.cos(direction), reach * math.sin(direction)
            paths.append(Line(start=(meet[0] - dx, meet[1] - dy), end=(meet[0] + dx, meet[1] + dy)))
        return tuple(
            Object(shape=shape, colour=colour, size=size, path=path)
            for shape, colour, size, path in zip(shapes, colours, sizes, paths, strict=False)
        )
    if motion == "following":  # one behind the other on the same straight way
        sizes = [0.85 * size for size in sizes]
        gap = sizes[0] + sizes[1] + 0.03
        longest = 2 * min(frame) - sizes[0] - sizes[1] - gap
        travel = random.uniform(0.6, 1.0) * longest
        angle = random.choice(range(4)) * math.pi / 2
        ahead = (math.cos(angle), math.sin(angle))
        across = _inside(random, frame, max(sizes[:2]))
        bodies = []
        for index, back in enumerate((0.0, gap)):
            first = -(travel + gap) / 2 + gap - back
            start, end = ((ahead[0] * along, ahead[1] * along) for along in (first, first + travel))
            shift = (across[0] * abs(ahead[1]), across[1] * abs(ahead[0]))
            path = Line(start=(start[0] + shift[0], start[1] + shift[1]), end=(end[0] + shift[0], end[1] + shift[1]))
            bodies.append(Object(shape=shapes[index], colour=colours[index], size=sizes[index], path=path))
        return tuple(bodies)
    count = random.choice((2, 2, 3))
    sizes = [0.85 * size for size in sizes] if count == 3 else sizes
    return tuple(
        Object(shape=shape, colour=colour, size=size, path=_line(random, frame, size, most=0.55))
        for shape, colour, size in zip(shapes[:count], colours, sizes, strict=False)
    )


def _articulated(random: Random, motion: str, colour: Colour, frame: Point) -> Body:
    phase = random.uniform(0, 2 * math.pi)
    sign = random.choice((-1, 1))
    if motion == "pendulum":
        length = random.uniform(0.5, 0.65)
        return Pendulum(
            colour=colour,
            size=length,
            pivot=(random.uniform(-0.1, 0.1), -frame[1] + random.uniform(0.05, 0.12)),
            bob=random.uniform(0.12, 0.16),
            swing=random.uniform(0.35, 0.65),
            phase=phase,
            cycles=random.uniform(0.5, 1.0),
        )
    size = random.uniform(0.7, 0.85)
    x = random.uniform(-0.1, 0.1)
    if motion == "walk":
        reach = random.uniform(0.2, 0.3)
        start, end, cycles = (-sign * reach, 0.02), (sign * reach, 0.02), random.uniform(1.0, 1.6)
    elif motion == "wave":
        start = end = (x, 0.05)
        cycles = random.uniform(0.8, 1.5)
    else:
        size = random.uniform(0.6, 0.7)
        start = end = (x, frame[1] - 0.5 * size)
        cycles, phase = random.choice((1.0, 1.5, 2.0)), 0.0
    if motion == "wave" and sign < 0:
        phase += math.pi
    return Figure(colour=colour, size=size, action=_ACTIONS[motion], start=start, end=end, phase=phase, cycles=cycles)


_ACTIONS: dict[str, Literal["walk", "wave", "jump"]] = {"walk": "walk", "wave": "wave", "jump": "jump"}


def _touch(one: Object, other: Object) -> bool:
    assert isinstance(one.path, Still) and isinstance(other.path, Still)
    return math.dist(one.path.at, other.path.at) < one.size + other.size + 0.02


def _inside(random: Random, frame: Point, margin: float) -> Point:
    """A point at least `margin` from the frame's edges, or on the middle line where there is no room."""
    x, y = (max(half - margin, 0.0) for half in frame)
    return (random.uniform(-x, x), random.uniform(-y, y))


def _line(random: Random, frame: Point, size: float, most: float = 0.65) -> Line:
    """A straight way inside the frame, of length 0.3 to `most`."""
    return _until(
        lambda: Line(start=_inside(random, frame, size), end=_inside(random, frame, size)),
        lambda line: 0.3 <= math.dist(line.start, line.end) <= most,
    )


def _until(draw: Callable[[], Line], fits: Callable[[Line], bool]) -> Line:
    while not fits(drawn := draw()):
        pass
    return drawn
