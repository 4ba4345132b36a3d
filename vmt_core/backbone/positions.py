"""Temporal RoPE at given positions: the transformer sees some frames of a clip where they stand in the whole of it.

Follow-Your-Motion calls it adaptive RoPE (arXiv 2506.05207, section 3). RoPE is relative, so only the spacing matters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

THETA = 10000.0  # of Wan


@contextmanager
def temporal_positions(transformer: WanTransformer3DModel, positions: Sequence[float] | None) -> Iterator[None]:
    """Within it the transformer's latent frames have these temporal positions instead of 0, 1, 2, …

    Whole numbers give bit for bit the stock rows of those frames. None changes nothing.

    Raises:
        ValueError: (in a forward) there are more or fewer latent frames than positions.
    """
    if positions is None:
        yield
        return
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    rope: Any = transformer.rope
    tables = get_1d_rotary_pos_embed(
        rope.t_dim,
        torch.tensor(positions, dtype=torch.float64),
        THETA,
        use_real=True,
        repeat_interleave_real=True,
        freqs_dtype=torch.float64,
    )

    def replace(_rope: Any, arguments: tuple[Tensor, ...], stock: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        frames = arguments[0].shape[2] // rope.patch_size[0]
        if frames != len(positions):
            raise ValueError(f"{len(positions)} temporal positions for {frames} latent frames")
        return tuple(_replaced(whole, time, frames) for whole, time in zip(stock, tables, strict=True))

    handle = rope.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def _replaced(whole: Tensor, time: Tensor, frames: int) -> Tensor:
    """The stock table (1, F*rows*cols, 1, d) with other first columns; `time` is (F, t_dim)."""
    table = whole.unflatten(1, (frames, -1)).clone()
    table[..., : time.shape[1]] = time.to(table).view(1, frames, 1, 1, -1)
    rows: Tensor = table.flatten(1, 2)
    return rows
