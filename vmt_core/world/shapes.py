"""Signed distances to the shapes, in units of the shape (the circle around it has radius 1): negative inside, exact outside.

Formulas: the standard 2-D distance fields (Inigo Quilez, "2D distance functions"); triangle and star as the regular polygons
that their corners make.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def circle(p: Tensor) -> Tensor:
    """(…, 2) -> (…)"""
    return torch.hypot(p[..., 0], p[..., 1]) - 1


def ring(p: Tensor) -> Tensor:
    """A circle with a round hole of half its radius."""
    return (torch.hypot(p[..., 0], p[..., 1]) - 0.75).abs() - 0.25


def square(p: Tensor) -> Tensor:
    """Its corners lie a little outside of the circle, so that it looks as large as the others."""
    return _box(p, 0.8, 0.8)


def cross(p: Tensor) -> Tensor:
    """Two bars."""
    return torch.minimum(_box(p, 0.95, 0.32), _box(p, 0.32, 0.95))


def triangle(p: Tensor) -> Tensor:
    """Equilateral, one corner up."""
    side = math.sqrt(3) / 2  # half the side of a triangle with corners at radius 1
    x = p[..., 0].abs() - side
    y = -p[..., 1] + 0.5
    below = x + math.sqrt(3) * y > 0
    x, y = torch.where(below, (x - math.sqrt(3) * y) / 2, x), torch.where(below, (-math.sqrt(3) * x - y) / 2, y)
    x = x - x.clamp(-2 * side, 0)
    return -torch.hypot(x, y) * y.sign()


def star(p: Tensor) -> Tensor:
    """Five corners, one up; the inner ones at radius 0.45."""
    sector = math.pi / 5
    x, y = p[..., 0], -p[..., 1]
    # fold into the half sector between a corner (at angle 0) and the notch next to it (at angle pi/5)
    angle = torch.atan2(x, y)
    angle = (torch.remainder(angle + sector, 2 * sector) - sector).abs()
    radius = torch.hypot(x, y)
    px, py = radius * angle.sin(), radius * angle.cos()  # corner at (0, 1)
    nx, ny = 0.45 * math.sin(sector), 0.45 * math.cos(sector)
    ex, ey = nx, ny - 1  # along the edge, from the corner to the notch
    along = ((px * ex + (py - 1) * ey) / (ex * ex + ey * ey)).clamp(0, 1)
    distance = torch.hypot(px - along * ex, py - 1 - along * ey)
    outside = px * ey - (py - 1) * ex < 0  # beyond the edge, as seen from the centre
    return torch.where(outside, distance, -distance)


def capsule(p: Tensor, length: float, radius: float) -> Tensor:
    """A round bar from the origin along +y, in the units of p."""
    y = p[..., 1] - p[..., 1].clamp(0, length)
    return torch.hypot(p[..., 0], y) - radius


def _box(p: Tensor, half_width: float, half_height: float) -> Tensor:
    x, y = p[..., 0].abs() - half_width, p[..., 1].abs() - half_height
    return torch.hypot(x.clamp(min=0), y.clamp(min=0)) + torch.maximum(x, y).clamp(max=0)


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "star": star,
    "cross": cross,
    "ring": ring,
}
