"""What a procedural clip is, as data: a `Scene` says everything, and the same scene gives the same pixels, tracks and captions.

Lengths are in units of the frame's shorter side, the origin is the frame's centre, x points right and y down. Times run from 0 (first
frame) to 1 (last frame), so that a scene can be rendered at any size, length and rate. Angles are in radians, clockwise as seen.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

#: Bumped whenever the same scene would give other pixels.
WORLD_VERSION = 1

Category = Literal["camera", "single", "multiple", "articulated"]
ShapeName = Literal["circle", "square", "triangle", "star", "cross", "ring"]
Pattern = Literal["plain", "striped", "checkered", "dotted", "gradient"]
Point = tuple[float, float]
RGB = tuple[int, int, int]

#: Of objects: bright, far from one another and from every background.
COLOURS: dict[str, RGB] = {
    "red": (225, 35, 40),
    "orange": (250, 145, 20),
    "yellow": (250, 235, 60),
    "green": (60, 200, 70),
    "cyan": (70, 225, 235),
    "blue": (45, 95, 245),
    "pink": (250, 130, 200),
    "white": (245, 245, 245),
}
#: Of backgrounds: dark or muted; patterns have a second, lighter tone of the same colour.
BACKGROUNDS: dict[str, RGB] = {
    "gray": (110, 110, 110),
    "navy": (20, 25, 85),
    "brown": (95, 60, 30),
    "teal": (0, 90, 90),
    "purple": (75, 25, 105),
    "olive": (85, 90, 20),
}
LIGHTER = 0.3  # how far the second tone of a pattern is from the first towards white

Colour = Literal["red", "orange", "yellow", "green", "cyan", "blue", "pink", "white"]
BackgroundColour = Literal["gray", "navy", "brown", "teal", "purple", "olive"]


class Spec(BaseModel):
    """A frozen part of a scene; unknown fields are an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Still(Spec):
    """Stays where it is."""

    kind: Literal["still"] = "still"
    at: Point


class Line(Spec):
    """Moves straight and evenly."""

    kind: Literal["line"] = "line"
    start: Point
    end: Point


class Arc(Spec):
    """Moves evenly on a circle: a part of it (arc) or about a whole turn (orbit)."""

    kind: Literal["arc", "orbit"] = "arc"
    centre: Point
    radius: float = Field(gt=0)
    angle_from: float
    angle_to: float


class Bounce(Spec):
    """Hops on a floor, from start to end, `hops` parabolas of the same height."""

    kind: Literal["bounce"] = "bounce"
    start: Point
    end: Point
    height: float = Field(gt=0)
    hops: float = Field(gt=0, description="may end in the air")


class Spin(Spec):
    """Turns in place."""

    kind: Literal["spin"] = "spin"
    at: Point
    turn: float


class Scale(Spec):
    """Grows or shrinks in place, by a constant factor per time."""

    kind: Literal["scale"] = "scale"
    at: Point
    factor: float = Field(gt=0)


Path = Annotated[Still | Line | Arc | Bounce | Spin | Scale, Field(discriminator="kind")]


class Object(Spec):
    """A flat shape. `size` is the radius of the circle around it."""

    kind: Literal["object"] = "object"
    shape: ShapeName
    colour: Colour
    size: float = Field(gt=0, le=1)
    angle: float = 0.0
    path: Path


class Figure(Spec):
    """A stick figure of capsules: head, trunk, two arms and two legs of two parts each. `size` is its height."""

    kind: Literal["figure"] = "figure"
    colour: Colour
    size: float = Field(gt=0, le=2)
    action: Literal["walk", "wave", "jump"]
    start: Point
    end: Point
    phase: float = 0.0
    cycles: float = Field(gt=0, description="steps, waves or jumps in the clip")


class Pendulum(Spec):
    """A bob on a rod that swings around a pivot. `size` is the rod's length."""

    kind: Literal["pendulum"] = "pendulum"
    colour: Colour
    size: float = Field(gt=0, le=2)
    pivot: Point
    bob: float = Field(gt=0, le=1, description="radius of the bob")
    swing: float = Field(gt=0, description="largest angle")
    phase: float = 0.0
    cycles: float = Field(gt=0)


Body = Annotated[Object | Figure | Pendulum, Field(discriminator="kind")]


class Background(Spec):
    """An endless plane. `period` and `angle` are of its pattern."""

    pattern: Pattern
    colour: BackgroundColour
    period: float = Field(default=0.3, gt=0)
    angle: float = 0.0


class Camera(Spec):
    """What the camera does; only the fields of its kind count.

    pan: moves by `shift`. zoom: magnifies by `factor` till the end. roll: turns by `turn`. orbit: circles the bodies, which stay while the
    background slides by `shift` along a shallow arc. shake: two sines per axis of amplitude `shift`, `cycles` of the slower one.
    """

    kind: Literal["still", "pan", "zoom", "roll", "orbit", "shake"] = "still"
    shift: Point = (0.0, 0.0)
    factor: float = Field(default=1.0, gt=0)
    turn: float = 0.0
    cycles: float = Field(default=1.0, gt=0)
    phase: float = 0.0


class Scene(Spec):
    """A whole clip. Bodies are drawn in order, the last one in front."""

    category: Category
    motion: str = Field(description="the kind of motion within the category, e.g. bounce or crossing")
    bodies: tuple[Body, ...] = Field(min_length=1, max_length=4)
    background: Background
    camera: Camera = Camera()
    frames: int = Field(default=17, ge=1, le=1025)
    height: int = Field(default=192, ge=16, le=2048)
    width: int = Field(default=192, ge=16, le=2048)
    fps: float = Field(default=12.0, gt=0, le=240)
    seed: int | None = Field(default=None, description="what it was sampled from, if it was")

    @model_validator(mode="after")
    def _colours_tell_bodies_apart(self) -> Self:
        colours = [body.colour for body in self.bodies]
        if len(set(colours)) < len(colours):
            raise ValueError(f"bodies must have different colours, not {', '.join(colours)}: captions name them by it")
        return self
