"""The token grid of a video, and where features are read from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """Token grid: `frames` latent frames of `rows` x `cols` tokens, in frame-major, row-major order.

    Derived from the latent's shape and the transformer's patch size, never from a tile size.
    """

    frames: int
    rows: int
    cols: int

    @classmethod
    def of_latents(cls, shape: torch.Size | tuple[int, ...], patch: tuple[int, ...]) -> Geometry:
        """Grid of a latent of shape (…, frames, height, width).

        Raises:
            ValueError: the latent is not divisible into patches.
        """
        frames, height, width = shape[-3:]
        if frames % patch[0] or height % patch[1] or width % patch[2]:
            raise ValueError(f"latent of {frames}x{height}x{width} is not divisible into patches of {patch}")
        return cls(frames // patch[0], height // patch[1], width // patch[2])

    @property
    def per_frame(self) -> int:
        """Tokens of one frame."""
        return self.rows * self.cols

    @property
    def tokens(self) -> int:
        """Tokens of the video."""
        return self.frames * self.per_frame

    def positions(self, device: torch.device | None = None) -> Tensor:
        """(row, col) of every token of a frame: int64, (rows*cols, 2)."""
        rows = torch.arange(self.rows, device=device)
        cols = torch.arange(self.cols, device=device)
        return torch.cartesian_prod(rows, cols).view(-1, 2)


@dataclass(frozen=True)
class Tap:
    """Where features are read.

    kind "hidden": the output of block `block`, (frames, rows, cols, d);
    kind "qk": its self-attention's q and k after norm and RoPE, each (frames, rows*cols, heads, head_dim).
    """

    block: int
    kind: Literal["hidden", "qk"]
