"""How much of the reference's background shows in a generated video: structural similarity where the reference stands still."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d

from vmt_core.shapes import Frames

_WINDOW, _SIGMA = 11, 1.5
_STANDS = 8.0  # of 255: a pixel that changes less over the clip stands still
_LEAST = 0.05  # share of such pixels under which there is no background to speak of


def background_leak(reference: Frames, generated: Frames) -> float:
    """Mean SSIM (Wang et al. 2004, gray, 11x11 Gaussian) over the reference's still pixels; read it against plain sampling's.

    1 is the same background, about 0 an unrelated one; nan where hardly anything stands still, as under a moving camera.
    """
    frames = min(len(reference), len(generated))
    still = _still(reference)
    if float(still.float().mean()) < _LEAST:
        return float("nan")
    similarity = ssim(gray(reference[:frames]), gray(generated[:frames]))
    return float(similarity[:, still].mean())


def ssim(first: Float[Tensor, "frames h w"], second: Float[Tensor, "frames h w"]) -> Float[Tensor, "frames h w"]:
    """Of gray frames in [0, 255], at every pixel."""
    line = torch.exp(-((torch.arange(_WINDOW) - _WINDOW // 2) ** 2) / (2 * _SIGMA**2))
    line = line / line.sum()

    def blurred(x: Tensor) -> Tensor:
        x = torch.nn.functional.pad(x[:, None], (_WINDOW // 2,) * 4, mode="reflect")
        return conv2d(conv2d(x, line.view(1, 1, 1, -1)), line.view(1, 1, -1, 1))[:, 0]

    low, high = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    one, two = blurred(first), blurred(second)
    spread_one, spread_two = blurred(first**2) - one**2, blurred(second**2) - two**2
    together = blurred(first * second) - one * two
    found: Tensor = ((2 * one * two + low) * (2 * together + high)) / (
        (one**2 + two**2 + low) * (spread_one + spread_two + high)
    )
    return found


def gray(frames: Frames) -> Float[Tensor, "frames h w"]:
    """Luma of Rec. 601, in [0, 255]."""
    return (frames.float() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)


def _still(frames: Frames) -> Bool[Tensor, "h w"]:
    """Pixels that hardly change, and no neighbour of theirs within the window does."""
    luma = gray(frames)
    moves = (luma.amax(0) - luma.amin(0)) > _STANDS
    grown = max_pool2d(moves.float()[None, None], _WINDOW, stride=1, padding=_WINDOW // 2)[0, 0]
    return grown == 0
