"""Four simple motions, rendered by distance fields: a disc that moves on a line, bounces or circles, and a panning camera."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vmt_core.shapes import Frames

MOTIONS = ("line", "bounce", "circle", "pan")


def render(motion: str, *, frames: int = 17, height: int = 192, width: int = 192, seed: int = 0) -> Frames:
    """A clip of one of MOTIONS, (frames, 3, height, width) uint8; the same for the same arguments.

    Raises:
        ValueError: no such motion.
    """
    if motion not in MOTIONS:
        raise ValueError(f"motion {motion!r} is not one of {', '.join(MOTIONS)}")
    generator = torch.Generator().manual_seed(seed)
    colours = torch.rand(3, 3, generator=generator) * 0.7 + 0.15  # background, stripes, disc
    time = torch.linspace(0, 1, frames)
    centre, camera = _paths(motion, time)  # (frames, 2) each, in units of the frame, (row, col)
    rows, cols = torch.meshgrid(
        (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width * (width / height), indexing="ij"
    )
    place = torch.stack([rows, cols], -1) + camera[:, None, None]  # (frames, H, W, 2): scene coordinates of each pixel
    stripes = 0.5 + 0.5 * torch.sin(2 * math.pi * 6 * place[..., 0]) * torch.sin(2 * math.pi * 6 * place[..., 1])
    aspect = torch.tensor([1.0, width / height])
    distance = (place - (centre * aspect)[:, None, None]).norm(dim=-1) - 0.16
    disc = (0.5 - distance * height).clamp(0, 1)[..., None]  # one pixel of anti-aliasing
    background = torch.lerp(colours[0], colours[1], stripes[..., None])
    image = torch.lerp(background, colours[2].expand_as(background), disc)
    return (image * 255).round().to(torch.uint8).permute(0, 3, 1, 2).contiguous()


def _paths(motion: str, time: Tensor) -> tuple[Tensor, Tensor]:
    still = torch.full_like(time, 0.5)
    zero = torch.zeros(len(time), 2)
    if motion == "line":
        return torch.stack([still, 0.2 + 0.6 * time], -1), zero
    if motion == "bounce":
        return torch.stack([0.8 - 0.55 * (2 * math.pi * time).sin().abs(), 0.25 + 0.5 * time], -1), zero
    if motion == "circle":
        angle = 2 * math.pi * time
        return torch.stack([0.5 + 0.28 * angle.sin(), 0.5 + 0.28 * angle.cos()], -1), zero
    return torch.stack([still, still], -1), torch.stack([torch.zeros_like(time), 0.4 * (time - 0.5)], -1)
