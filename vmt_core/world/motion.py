"""Where everything is: a scene's bodies as rigid parts with one matrix per frame, and the camera.

Matrices are 3x3, act on column vectors (x, y, 1), and are similarities: a rotation, a scale and a shift.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from vmt_core.world import shapes
from vmt_core.world.spec import Body, Camera, Figure, Object, Path, Pendulum, Scene

Matrices = Float[Tensor, "frames 3 3"]


@dataclass(frozen=True)
class Part:
    """A rigid piece of a body. `matrix` takes its own coordinates (those of `distance`) to the image's."""

    body: int
    distance: Callable[[Tensor], Tensor]
    reach: float  # the circle around the part's origin that holds it, in its own units
    matrix: Matrices


def times(frames: int) -> Float[Tensor, " frames"]:
    """0 at the first frame, 1 at the last."""
    return torch.linspace(0, 1, frames, dtype=torch.float64)


def parts(scene: Scene) -> list[Part]:
    """All parts of all bodies, in the order of drawing."""
    time = times(scene.frames)
    camera = torch.eye(3, dtype=torch.float64) if scene.camera.kind == "orbit" else view(scene.camera, time)
    return [
        Part(index, part.distance, part.reach, camera @ part.matrix)
        for index, body in enumerate(scene.bodies)
        for part in _body(body, index, time)
    ]


def cameras(scene: Scene) -> Matrices:
    """From the background's plane to the image, for every frame: (frames, 3, 3)."""
    return view(scene.camera, times(scene.frames))


def view(camera: Camera, time: Tensor) -> Matrices:
    """The camera's matrix at each time; the identity in the middle of the clip, so that what it looks at stays in the frame."""
    middle, zero = time - 0.5, torch.zeros_like(time)
    dx, dy = camera.shift
    match camera.kind:
        case "pan":
            return place(x=-dx * middle, y=-dy * middle)
        case "orbit":
            return place(x=-dx * middle, y=-dy * (math.pi * middle).cos())
        case "shake":
            wave = 2 * math.pi * camera.cycles * time + camera.phase
            return place(
                x=-dx * (0.6 * wave.sin() + 0.4 * (1.7 * wave).cos()),
                y=-dy * (0.6 * wave.cos() + 0.4 * (1.7 * wave).sin()),
            )
        case "zoom":
            return place(zero, zero, scale=camera.factor**middle)
        case "roll":
            return place(zero, zero, angle=camera.turn * middle)
        case _:
            return place(zero, zero)


def place(
    x: Tensor | float, y: Tensor | float, angle: Tensor | float = 0.0, scale: Tensor | float = 1.0
) -> Float[Tensor, "*frames 3 3"]:
    """Scale, then turn, then shift; arguments that are tensors (frames,) give a matrix for each frame."""
    values = torch.broadcast_tensors(*(torch.as_tensor(value, dtype=torch.float64) for value in (x, y, angle, scale)))
    dx, dy, turn, size = values
    cos, sin = size * turn.cos(), size * turn.sin()
    zero, one = torch.zeros_like(dx), torch.ones_like(dx)
    return torch.stack([cos, -sin, dx, sin, cos, dy, zero, zero, one], -1).reshape(*dx.shape, 3, 3)


def _body(body: Body, index: int, time: Tensor) -> list[Part]:
    match body:
        case Object():
            x, y, angle, scale = _path(body.path, time)
            matrix = place(x, y, body.angle + angle, body.size * scale)
            return [Part(index, shapes.SHAPES[body.shape], 1.2, matrix)]
        case Pendulum():
            angle = body.swing * (2 * math.pi * body.cycles * time + body.phase).cos()
            pivot, bob = place(*body.pivot, angle), body.bob
            rod = partial(shapes.capsule, length=body.size, radius=0.2 * bob)
            return [
                Part(index, rod, body.size + bob, pivot),
                Part(index, shapes.circle, 1.0, pivot @ place(0, body.size, scale=bob)),
            ]
        case Figure():
            return _figure(body, index, time)


def _path(path: Path, time: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, y, added angle and scale over time."""
    zero, one = torch.zeros_like(time), torch.ones_like(time)
    match path.kind:
        case "line" | "bounce":
            x = path.start[0] + (path.end[0] - path.start[0]) * time
            y = path.start[1] + (path.end[1] - path.start[1]) * time
            return x, y - _hop(path.hops * time, path.height) if path.kind == "bounce" else y, zero, one
        case "arc" | "orbit":
            angle = path.angle_from + (path.angle_to - path.angle_from) * time
            return path.centre[0] + path.radius * angle.cos(), path.centre[1] + path.radius * angle.sin(), zero, one
        case _:
            turn = path.turn * time if path.kind == "spin" else zero
            return zero + path.at[0], zero + path.at[1], turn, path.factor**time if path.kind == "scale" else one


def _hop(count: Tensor, height: float) -> Tensor:
    """Height above the floor after `count` hops."""
    rise = count.remainder(1.0)
    return 4 * height * rise * (1 - rise)


def _figure(body: Figure, index: int, time: Tensor) -> list[Part]:
    """Joints from the hip outwards; limbs hang along +y at angle 0 and turn clockwise."""
    wave = 2 * math.pi * body.cycles * time + body.phase
    zero = torch.zeros_like(time)
    x = body.start[0] + (body.end[0] - body.start[0]) * time
    y = body.start[1] + (body.end[1] - body.start[1]) * time
    facing = 1.0 if body.end[0] >= body.start[0] else -1.0
    if body.action == "walk":
        thighs = (0.55 * wave.sin(), -0.55 * wave.sin())
        knees = tuple(facing * 0.45 * (1 + (wave + shift).cos()) for shift in (0.0, math.pi))
        arms, elbows = tuple(-0.8 * thigh for thigh in thighs), (zero - facing * 0.5,) * 2
    elif body.action == "wave":
        thighs, knees = (zero + 0.2, zero - 0.2), (zero, zero)
        arms, elbows = (zero + 2.2, zero - 2.2), (0.2 + 0.7 * wave.sin(), -0.2 + 0.7 * wave.sin())
    else:
        air = _hop((body.cycles * time + body.phase / (2 * math.pi)), 1.0)
        y = y - 0.4 * body.size * air
        bend = 0.7 * (1 - air)
        thighs, knees = (bend, -bend), (-1.6 * bend, 1.6 * bend)
        arms, elbows = (0.4 + 2.2 * air, -0.4 - 2.2 * air), (zero, zero)
    hip = place(x, y, scale=body.size)
    shoulder = hip @ place(0, -0.27)
    limbs = [_bar(index, hip @ place(0, -0.28), 0.28, 0.07), _disc(index, hip @ place(0, -0.44), 0.115)]
    for root, upper, lower, long, thick in (
        (hip, thighs, knees, 0.22, 0.05),
        (shoulder, arms, elbows, 0.17, 0.045),
    ):
        for first, second in zip(upper, lower, strict=True):
            joint = root @ place(zero, zero, first)
            limbs += [
                _bar(index, joint, long, thick),
                _bar(index, joint @ place(zero, zero + long, second), long, thick),
            ]
    return limbs


def _bar(index: int, matrix: Matrices, length: float, radius: float) -> Part:
    return Part(index, partial(shapes.capsule, length=length, radius=radius), length + radius, matrix)


def _disc(index: int, matrix: Matrices, radius: float) -> Part:
    return Part(index, shapes.circle, 1.0, matrix @ place(0, 0, scale=radius))
