"""Features of the transformer with an early exit: nothing is computed that the taps do not need.

For a "qk" tap of block B the blocks 0..B-1 run and then only norm1, to_q, to_k, the qk-norms and RoPE of block B: its
v, attention, cross-attention and feed-forward, and all later blocks, do not (14.03 of 30 blocks for block 14 of Wan 1.3B).
Bit-equal to the same tensors of a full forward; gradients are bit-equal under every checkpoint policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import repeat, tee
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from vmt_core.backbone.geometry import Geometry, Tap

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

CheckpointName = Literal["none", "selective", "full"]
BatchedFeatures = dict[Tap, Tensor | tuple[Tensor, Tensor]]

_ATTENTION = [
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]


def features(
    transformer: WanTransformer3DModel,
    latents: Tensor,
    timestep: Tensor,
    text: Tensor,
    taps: Sequence[Tap],
    *,
    checkpoint_policy: CheckpointName = "selective",
) -> BatchedFeatures:
    """Features of a batch of latents at the taps.

    Args:
        latents: (B, C, F, H, W); cast to the transformer's dtype, gradients flow through the cast.
        timestep: (B,), 1000 * sigma.
        text: (B, L, dim), zero-padded.
        taps: at least one.
        checkpoint_policy: what the backward pass recomputes: nothing, all but attention, every block.

    Returns:
        for each tap (B, frames, rows, cols, d), or q and k, each (B, frames, rows*cols, heads, head_dim).

    Raises:
        ValueError: a tap beyond the last block.
    """
    last = max(taps, key=lambda tap: (tap.block, tap.kind == "hidden"))
    if last.block >= len(transformer.blocks):
        raise ValueError(f"tap at block {last.block}, but the transformer has blocks 0..{len(transformer.blocks) - 1}")
    geometry = Geometry.of_latents(latents.shape, transformer.config.patch_size)
    latents = latents.to(transformer.dtype)
    rotary = transformer.rope(latents)
    hidden = transformer.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()  # (B, S, d)
    _, time, context, _ = transformer.condition_embedder(timestep, text.to(transformer.dtype), None)
    time = time.unflatten(1, (6, -1))  # (B, 6, d)

    out: BatchedFeatures = {}
    for index, block in enumerate(transformer.blocks[: last.block + 1]):
        if Tap(index, "qk") in taps:
            out[Tap(index, "qk")] = _query_key(block, hidden, time, rotary, geometry)
            if index == last.block and last.kind == "qk":
                break
        hidden = checkpointed(block, hidden, context, time, rotary, policy=checkpoint_policy)
        if Tap(index, "hidden") in taps:
            out[Tap(index, "hidden")] = hidden.unflatten(1, (geometry.frames, geometry.rows, geometry.cols))
    return out


def row(batched: BatchedFeatures, index: int) -> BatchedFeatures:
    """The features of one row of a batch, as an objective takes them."""
    return {
        tap: (value[0][index], value[1][index]) if isinstance(value, tuple) else value[index]
        for tap, value in batched.items()
    }


def _query_key(
    block: nn.Module, hidden: Tensor, time: Tensor, rotary: tuple[Tensor, Tensor], geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """q and k of the block's self-attention, by the same operations as the block's own forward."""
    attention: Any = block.attn1
    modulation: Any = block.scale_shift_table
    shift, scale = (modulation + time.float()).chunk(6, dim=1)[:2]
    normed = (block.norm1(hidden.float()) * (1 + scale) + shift).type_as(hidden)  # type: ignore[operator]
    if attention.fused_projections:
        query, key, _ = attention.to_qkv(normed).chunk(3, dim=-1)
    else:
        query, key = attention.to_q(normed), attention.to_k(normed)

    def finish(projected: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
        rotated: Tensor = rotate(norm(projected).unflatten(2, (attention.heads, -1)), *rotary)
        by_frame: Tensor = rotated.unflatten(1, (geometry.frames, geometry.per_frame))
        return by_frame  # (B, F, rows*cols, heads, head_dim)

    return finish(query, attention.norm_q), finish(key, attention.norm_k)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on interleaved pairs, x (B, S, heads, head_dim): Wan's own arithmetic."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


def checkpointed(block: nn.Module, *args: Any, policy: CheckpointName) -> Tensor:
    """A block's output; its backward pass recomputes nothing, everything, or everything but attention (selective)."""
    if policy == "none" or not torch.is_grad_enabled():
        out = block(*args)
    elif policy == "full":
        out = checkpoint(block, *args, use_reentrant=False)
    else:
        out = checkpoint(block, *args, use_reentrant=False, context_fn=_save_attention)
    assert isinstance(out, Tensor)
    return out


def _save_attention() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of a block's forward and of its recomputation, which takes the results of attention from the forward."""
    pairs = (create_selective_checkpoint_contexts(_ATTENTION) for _ in repeat(None))
    forward, again = tee(pairs)
    return _AroundAttention(pair[0] for pair in forward), _AroundAttention(pair[1] for pair in again)


class _AroundAttention(TorchFunctionMode):
    """Enters the next of `contexts` for each call of attention, and none for other operations, since torch's own modes for
    selective checkpoints cost more than many small operations themselves."""

    def __init__(self, contexts: Iterator[AbstractContextManager[Any]]) -> None:
        super().__init__()
        self.contexts = contexts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with next(self.contexts) if func is scaled_dot_product_attention else nullcontext():
            return func(*args, **(kwargs or {}))
