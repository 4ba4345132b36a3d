"""Attention motion flow (AMF): where every token's match lies in another frame, as a displacement in tokens.

One descriptor, two objectives. For frames i, j and the q, k of one self-attention block (all heads):

    Z(p, s) = tau * mean_h <q_h(i, p), k_h(j, s)> / sqrt(head_dim)       logits of token p of frame i against frame j
    Delta(i, j, p) = sum_s softmax_s(Z(p, s)) pos(s) - pos(p)            expected displacement, (row, col) in tokens

The mean over heads of the logits is one product of the concatenated heads: <q_cat, k_cat> / (heads sqrt(head_dim)).

`WindowedAMF` is FastVMT's objective (arXiv 2602.05551, sections 3.2 and 4.1), `FullAMF` DiTFlow's (arXiv 2412.07776,
section 4). Where they depart from the papers, and why:

| paper                                            | here (preset "default")                 | reason
|--------------------------------------------------|-----------------------------------------|------------------------------------------
| heads: unspecified (FastVMT), logits (DiTFlow)   | logits averaged over heads              | averaging q and k first destroys contrast
| FastVMT: reference noised to the current step    | clean latents, sigma 0, once            | sharper matches; one forward instead of ten
| FastVMT: window around soft-argmax, also in the  | around the tile centre's hard match, in | the same window for both, so that equal
|   generated video                                |   the reference only                    |   motion has zero loss
| FastVMT: temperature unstated, 1 in its code     | 2                                       | DiTFlow's; see benchmarks/calibrate.py
| FastVMT: every window position clamped           | the window's centre clamped             | a clamped position is counted many times
| FastVMT: displacement relative to window, tile   | true token coordinates                  | else different motions have equal loss
| FastVMT: pairs j - i = 0 .. s_f                  | 1 .. span                               | a frame against itself holds no motion
| FastVMT: sum over tokens                         | mean over valid tokens                  | scale independent of the resolution
| FastVMT: window loss on the generated drift      | only its excess over the reference's    | the reference itself must have zero loss;
|                                                  |   drift, mean over channels             |   scale independent of the width
| DiTFlow: hard argmax of the reference            | soft, as the generated one              | the reference itself must have zero loss
| DiTFlow: all F^2 pairs                           | without i = j                           | a frame against itself holds no motion
| DiTFlow: only moving tokens count                | the same (by the hard match)            |

Preset "paper" restores `reference: hard` (DiTFlow), and for FastVMT `drift: absolute`, `temperature: 1` and the step-matched
reference level; it keeps the corrections of what is a defect of the published code rather than a choice (clamping, coordinates, heads).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vmt_core.backbone.geometry import Geometry, Tap
from vmt_core.shapes import Features, Motion

Flow = Float[Tensor, "pairs n 2"]
_KEPT_LOGITS = 2**22  # more fp32 logits than these (16 MiB) are not kept for the backward pass


class _AMF(BaseModel):
    """What both objectives share: where q and k come from, how sharp a match is, how the reference is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    block: int = Field(default=14, ge=0, description="transformer block whose self-attention is read")
    temperature: float = Field(default=2.0, gt=0, description="tau, multiplies the logits; 1 to 4")
    reference: Literal["soft", "hard"] = Field(
        default="soft", description="the reference's displacement: expected or argmax"
    )

    @property
    def taps(self) -> tuple[Tap, ...]:
        return (Tap(self.block, "qk"),)

    def _query_key(self, features: Features) -> tuple[Tensor, Tensor, float]:
        """q and k with concatenated heads, each (F, N, heads*head_dim), and the scale of their products."""
        query, key = features[self.taps[0]]
        if len(query) < 2:
            raise ValueError(f"motion needs at least 2 latent frames (5 video frames), not {len(query)}")
        heads, head_dim = query.shape[-2:]
        return query.flatten(2), key.flatten(2), self.temperature / (heads * head_dim**0.5)


class WindowedAMF(_AMF):
    """FastVMT's windowed AMF with its window loss."""

    span: int = Field(default=3, ge=1, description="frames apart that are compared: j - i = 1 .. span")
    window: int = Field(default=21, ge=3, description="side of the search window in tokens, odd; capped by the grid")
    tile: tuple[PositiveInt, PositiveInt] = Field(
        default=(3, 4), description="rows, cols of the tiles that share a window centre"
    )
    window_weight: float = Field(
        default=0.2, ge=0, description="weight of the window loss beside the AMF loss (the paper weighs them 1 : 5)"
    )
    drift: Literal["excess", "absolute"] = Field(
        default="excess", description="window loss: over the reference's drift, or all"
    )

    @field_validator("window")
    @classmethod
    def _window_is_odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"window={value} has no centre; use {value - 1} or {value + 1}")
        return value

    @torch.no_grad()
    def encode(self, reference: Features, geometry: Geometry) -> Motion:
        """shift of each tile's match (pairs, tiles, 2) int16, flow and valid of each token (pairs, N, 2) and (pairs, N), drift.

        Pairs are ordered by distance, then by the earlier frame.
        """
        query, key, scale = self._query_key(reference)
        positions = geometry.positions(query.device)
        centres, tile_of = _tiles(geometry, self.tile, query.device)
        limit = torch.tensor([geometry.rows, geometry.cols], device=query.device)
        shifts, flows, valids, windows = [], [], [], []
        for source, target in _near_pairs(query, key, self.span):
            logits = _logits(source[:, centres].float(), target.float(), scale)
            shift = positions[logits.argmax(-1)] - positions[centres]
            matched = positions + shift[:, tile_of]  # (pairs, N, 2): where each token's window wants to be
            shifts.append(shift.to(torch.int16))
            valids.append(((matched >= 0) & (matched < limit)).all(-1))
            flows.append(_flow(source, target, scale, geometry, (self.window, matched), hard=self.reference == "hard"))
            windows.append(_window(geometry, self.window, matched[:, centres]))
        motion = {"shift": torch.cat(shifts), "flow": torch.cat(flows), "valid": torch.cat(valids)}
        if self.window_weight:
            motion["drift"] = _drift(key, windows)
        return motion

    def loss(self, generated: Features, motion: Motion, geometry: Geometry) -> Tensor:
        """L = sum_d w_d mean_valid |Delta_ref - Delta|^2 / sum w + window_weight L_window; w_d = 1 - 0.2 (d - 1) / span."""
        query, key, scale = self._query_key(generated)
        positions = geometry.positions(query.device)
        centres, tile_of = _tiles(geometry, self.tile, query.device)
        shifts = motion["shift"].to(query.device, torch.int64)
        sizes = [geometry.frames - d for d in range(1, min(self.span, geometry.frames - 1) + 1)]
        flows, weights, windows = [], [], []
        for (source, target), shift, size in zip(
            _near_pairs(query, key, self.span), shifts.split(sizes), sizes, strict=True
        ):
            matched = positions + shift[:, tile_of]
            flows.append(_flow(source, target, scale, geometry, (self.window, matched)))
            weights += [1 - 0.2 * (geometry.frames - size - 1) / self.span] * size
            windows.append(_window(geometry, self.window, matched[:, centres]))
        flow = torch.cat(flows)
        weight = torch.tensor(weights, device=flow.device)
        total = _mean_over(flow, motion["flow"].to(flow), motion["valid"].to(flow.device), weight)
        if self.window_weight and len(windows) > 1:
            drift = _drift(key, windows)
            floor = motion["drift"].to(drift) if self.drift == "excess" else 0
            total = total + self.window_weight * torch.relu(drift - floor).mean()
        return total


class FullAMF(_AMF):
    """DiTFlow's AMF: every ordered pair of frames, the whole target frame, moving tokens only."""

    moving_only: bool = Field(default=True, description="count only tokens whose match in the reference moves")

    @torch.no_grad()
    def encode(self, reference: Features, geometry: Geometry) -> Motion:
        """flow (pairs, N, 2) and valid (pairs, N), the tokens that count; pairs by cyclic distance, then by source frame."""
        query, key, scale = self._query_key(reference)
        best = torch.cat([_flow(query, key, scale, geometry, ahead=ahead, hard=True) for ahead in range(1, len(query))])
        valid = best.abs().sum(-1) > 0 if self.moving_only else torch.ones_like(best[..., 0], dtype=torch.bool)
        flow = best if self.reference == "hard" else self._flows(query, key, scale, geometry)
        return {"flow": flow, "valid": valid}

    def loss(self, generated: Features, motion: Motion, geometry: Geometry) -> Tensor:
        """Mean over the tokens that count, of all pairs together, of |Delta_ref - Delta|^2 / 2 (mean over coordinates)."""
        query, key, scale = self._query_key(generated)
        flow = self._flows(query, key, scale, geometry)
        valid = motion["valid"].to(flow.device)
        squared = (flow - motion["flow"].to(flow)).square().mean(-1)
        return (squared * valid).sum() / valid.sum().clamp(min=1)

    @staticmethod
    def _flows(query: Tensor, key: Tensor, scale: float, geometry: Geometry) -> Flow:
        return torch.cat([_flow(query, key, scale, geometry, ahead=ahead) for ahead in range(1, len(query))])


def _near_pairs(query: Tensor, key: Tensor, span: int) -> Iterator[tuple[Tensor, Tensor]]:
    """q of frames i and k of frames i + d for each distance d = 1 .. span: slices, so that gradients need no scatter."""
    for distance in range(1, min(span, len(query) - 1) + 1):
        yield query[:-distance], key[distance:]


def _tiles(geometry: Geometry, tile: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The centre token of each tile (tiles,), and the tile of each token (N,); the last tiles may be smaller."""
    centres, index = [], []
    for size, side in zip((geometry.rows, geometry.cols), tile, strict=True):
        starts = torch.arange(0, size, side, device=device)
        stops = (starts + side).clamp(max=size)
        centres.append(starts + (stops - starts) // 2)
        index.append(torch.arange(size, device=device) // side)
    centre_tokens = (centres[0][:, None] * geometry.cols + centres[1][None, :]).flatten()
    tile_of = (index[0][:, None] * len(centres[1]) + index[1][None, :]).flatten()
    return centre_tokens, tile_of


def _window(geometry: Geometry, side: int, centres: Int[Tensor, "pairs n 2"]) -> Bool[Tensor, "pairs n m"]:
    """Which keys lie within side // 2 of each centre, the centre moved so that the whole window lies in the frame.

    A side as large as the frame's, or larger, takes all of it.
    """
    inside = []
    for axis, size in enumerate((geometry.rows, geometry.cols)):
        radius = side // 2 if side < size else size
        centre = centres[..., axis].clamp(min(radius, size - 1), max(size - 1 - radius, 0))
        inside.append((torch.arange(size, device=centre.device) - centre[..., None]).abs() <= radius)
    return (inside[0][..., :, None] & inside[1][..., None, :]).flatten(2)


def _logits(query: Tensor, key: Tensor, scale: float) -> Float[Tensor, "pairs n m"]:
    """Products in the features' own precision, scaled in fp32. Which is the largest of them is asked in fp32 alone: bf16 has ties."""
    return torch.bmm(query, key.transpose(1, 2)).float() * scale


def _flow(
    query: Float[Tensor, "pairs n d"],
    key: Float[Tensor, "pairs n d"],
    scale: float,
    geometry: Geometry,
    window: tuple[int, Int[Tensor, "pairs n 2"]] | None = None,
    *,
    ahead: int = 0,
    hard: bool = False,
) -> Flow:
    """Displacement of every token of every pair; large logits are recomputed in the backward pass instead of kept.

    Args:
        window: side and centre of each token's; its mask is as large as the logits, and as short-lived.
        ahead: pairs are q of frame i and k of frame (i + ahead) mod F.
        hard: to the one best match.
    """
    positions = geometry.positions(query.device)

    def flow(query: Tensor, key: Tensor) -> Tensor:
        key = key.roll(-ahead, dims=0) if ahead else key  # here, so that no copy is kept for the backward pass
        logits = _logits(query.float(), key.float(), scale) if hard else _logits(query, key, scale)
        if window is not None:
            logits = logits.masked_fill(~_window(geometry, *window), -torch.inf)
        if hard:
            return (positions[logits.argmax(-1)] - positions).float()
        return logits.softmax(-1) @ positions.float() - positions.float()

    if torch.is_grad_enabled() and len(query) * geometry.per_frame**2 > _KEPT_LOGITS:
        return checkpoint(flow, query, key, use_reentrant=False)  # type: ignore[no-any-return]
    return flow(query, key)


def _mean_over(flow: Flow, target: Flow, valid: Bool[Tensor, "pairs n"], weight: Float[Tensor, " pairs"]) -> Tensor:
    """Weighted mean over pairs of the mean over valid tokens of |target - flow|^2; pairs without any do not count."""
    count = valid.sum(-1)
    per_pair = ((flow - target).square().sum(-1) * valid).sum(-1) / count.clamp(min=1)
    weight = weight * (count > 0)
    return (per_pair * weight).sum() / weight.sum().clamp(min=1e-8)


def _drift(key: Float[Tensor, "frames n d"], windows: list[Tensor]) -> Float[Tensor, "steps tiles"]:
    """FastVMT's window loss before its mean: |kbar(i, j+1) - kbar(i, j)|^2 / d, kbar the mean key of i's window in frame j.

    `windows` holds for each distance the masks of the tiles' centres (pairs, tiles, n).
    """
    means = [
        torch.bmm(mask.float(), key[distance:].float()) / mask.sum(-1, keepdim=True)
        for distance, mask in enumerate(windows, start=1)
    ]
    steps = [(later - sooner[: len(later)]).square().mean(-1) for sooner, later in pairwise(means)]
    return torch.cat(steps) if steps else key.new_zeros(0, windows[0].shape[1], dtype=torch.float32)
