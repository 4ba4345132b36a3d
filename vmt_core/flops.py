"""Floating-point operations of Wan by formula: what `plan` estimates with. A test holds it against torch's FlopCounterMode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmt_core.adapters.settings import VALIDATION_FRAMES, VALIDATION_SIGMAS, FollowYourMotion
from vmt_core.backbone.geometry import Geometry
from vmt_core.methods import Method

if TYPE_CHECKING:
    from vmt_core.backbone.taps import CheckpointName

TEXT_TOKENS = 512


@dataclass(frozen=True)
class Cost:
    """Multiply-adds count as two. `linear` is everything but self- and cross-attention's products."""

    linear: float
    attention: float

    @property
    def total(self) -> float:
        return self.linear + self.attention


def block(config: Mapping[str, Any], tokens: int) -> Cost:
    """Forward of one transformer block on one video.

    Args:
        config: of the WanTransformer3DModel.
        tokens: of the video.
    """
    d = config["num_attention_heads"] * config["attention_head_dim"]
    projections = 2 * d * d * (4 * tokens + 2 * tokens + 2 * TEXT_TOKENS)  # self: q, k, v, out; cross: q, out and k, v
    feed_forward = 4 * tokens * d * config["ffn_dim"]
    return Cost(projections + feed_forward, 4 * tokens * d * (tokens + TEXT_TOKENS))


def forward(config: Mapping[str, Any], tokens: int) -> float:
    """One call of the denoiser (the embeddings and the head are below 0.1 % and left out)."""
    return float(config["num_layers"]) * block(config, tokens).total


def evaluation(config: Mapping[str, Any], tokens: int, tap: int, policy: CheckpointName = "selective") -> float:
    """One guidance gradient through blocks 0 .. tap - 1 (block `tap` adds q and k only).

    Weights are frozen, so that the backward pass of a linear layer costs one forward; that of flash attention 2.5. Policy
    "selective" computes everything but attention a second time, "full" attention as well.
    """
    cost = block(config, tokens)
    again = {"none": 0.0, "selective": cost.linear, "full": cost.total}[policy]
    return tap * (cost.total + again + cost.linear + 2.5 * cost.attention)


def video(
    config: Mapping[str, Any],
    geometry: Geometry,
    method: Method,
    steps: int,
    guidance_scale: float,
    policy: CheckpointName = "selective",
) -> float:
    """One video without its VAE and text encoder: all denoiser calls, all guidance gradients, and the reference's forwards that are
    made for it alone.
    """
    total = steps * (2 if guidance_scale > 1 else 1) * forward(config, geometry.tokens)
    guidance = method.guidance
    if guidance is not None:
        tap = max(tap.block for tap in guidance.objective.taps)
        total += guidance.evaluations(steps) * evaluation(config, geometry.tokens, tap, policy)
        if guidance.level == "step":
            total += guidance.guided_steps(steps) * tap * block(config, geometry.tokens).total
    return total


@dataclass(frozen=True)
class TuningCost:
    """Of one adapter: floating-point operations of its training, and weights that are trained at once."""

    flops: float
    parameters: int


def step(config: Mapping[str, Any], tokens: int, policy: CheckpointName = "selective") -> float:
    """One training step of an adapter on one clip: forward, what is computed again, backward with frozen weights."""
    return evaluation(config, tokens, config["num_layers"], policy)


def tuning(config: Mapping[str, Any], clip: Geometry, settings: FollowYourMotion) -> TuningCost:
    """One adapter on one reference, its validations included.

    Args:
        clip: token grid of the whole clip.
    """
    frames = len(settings.indices(clip.frames))
    if settings.sparse == "pixel":
        frames = (-(-(4 * clip.frames - 3) // settings.stride) - 1) // 4 + 1
    spatial, temporal = settings.spatial, settings.temporal
    total = spatial.steps * spatial.draws * settings.frames_a_draw * step(config, clip.per_frame)
    total += temporal.steps * temporal.draws * settings.clips_a_draw * step(config, frames * clip.per_frame)
    levels = len(VALIDATION_SIGMAS)
    total += spatial.validations * levels * VALIDATION_FRAMES * forward(config, clip.per_frame)
    total += temporal.validations * levels * forward(config, clip.tokens)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return TuningCost(total, config["num_layers"] * len(settings.targets) * 2 * width * settings.rank)
