"""Follow-Your-Motion / EffiVMT (arXiv 2506.05207): a spatial LoRA on single frames, then a temporal LoRA on a few frames far apart.

    prepare    reference -> latents of the clip, of its frames alone, of its caption                       once
    classify   every head is spatial or temporal                                                           head_types.py
    spatial    LoRA on the spatial heads; random single frames                                             SpatialTask
    temporal   LoRA on the temporal heads, the spatial one loaded and frozen; sparse frames, motion loss   TemporalTask

The published code contradicts the paper in places and lacks sparse sampling; presets `paper` and `code` follow one and the other as far as
they are known, `default` is what we recommend, `nano` is for wan-nano.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vmt_core.adapters import masked_lora
from vmt_core.adapters.head_types import HeadTypes, classify
from vmt_core.adapters.masked_lora import Weights
from vmt_core.adapters.settings import VALIDATION_FRAMES, VALIDATION_SIGMAS, FollowYourMotion
from vmt_core.backbone.positions import temporal_positions
from vmt_core.backbone.sampler import shifted
from vmt_core.backbone.taps import checkpointed
from vmt_core.backbone.wan import Backbone
from vmt_core.shapes import Frames, Latents, Text
from vmt_core.tuning import Batch, StageSchedule, StepLogs

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel


def weights(state: Mapping[str, Tensor], stage: str, settings: FollowYourMotion) -> Weights:
    """An adapter's weights from an engine's state, alpha folded in."""
    end, scale = f".{stage}.weight.weight", settings.alpha / settings.rank
    found = {
        name.removeprefix("transformer.").removesuffix(end) + ".weight": value
        for name, value in state.items()
        if name.endswith(end)
    }
    return {name: value * scale if "lora_B" in name else value for name, value in found.items()}


@dataclass(frozen=True)
class Prepared:
    """What tuning needs of a reference; computed once, kept as safetensors."""

    latents: Latents  # (C, F, h, w) of the whole clip
    frames: Float[Tensor, "frames channels height width"]  # each frame encoded alone
    text: Text
    empty: Text
    thinned: Latents | None = None  # (C, F', h, w) of the clip of every stride-th frame, for sparse=pixel

    def save(self, path: Path) -> None:
        """Writes a safetensors file."""
        save_file({name: value.contiguous() for name, value in vars(self).items() if value is not None}, path)

    @classmethod
    def load(cls, path: Path) -> Prepared:
        """Reads what `save` wrote."""
        return cls(**load_file(path))


def prepare(backbone: Backbone, clip: Frames, caption: str, stride: int | None = None) -> Prepared:
    """Encodes a reference.

    Args:
        clip: (T, 3, H, W) uint8, T = 4k+1.
        stride: for sparse sampling in pixel space: every so many frames make a clip of their own, whose length is brought to 4k+1.

    Raises:
        ValueError: fewer than 5 frames, or no caption.
    """
    if len(clip) < 5:
        raise ValueError(f"{len(clip)} frames; tuning needs at least 5, so that anything moves")
    if not caption.strip():
        raise ValueError("the caption is empty; tuning needs a description of the clip")
    thinned = clip[::stride] if stride else clip[:1]
    thinned = thinned[: (len(thinned) - 1) // 4 * 4 + 1]
    return Prepared(
        latents=backbone.encode(clip),
        frames=backbone.encode_images(clip),
        text=backbone.caption(caption),
        empty=backbone.caption(""),
        thinned=backbone.encode(thinned) if stride else None,
    )


def _seen(prepared: Prepared, settings: FollowYourMotion) -> Latents:
    """Latents that the temporal stage draws from."""
    if settings.sparse != "pixel":
        return prepared.latents
    if prepared.thinned is None:
        raise ValueError("sparse pixel needs a reference that was prepared with a stride")
    return prepared.thinned


def head_types(backbone: Backbone, prepared: Prepared, settings: FollowYourMotion) -> HeadTypes:
    """Types of the heads for this reference, or those of a file.

    Raises:
        ValueError: the file is none of head types, or of another transformer; or no stage after this could work.
    """
    if settings.head_rule == "file":
        config = backbone.transformer.config
        file = Path(str(settings.head_file))
        types = HeadTypes.load(file, layers=config.num_layers, heads=config.num_attention_heads)
        if types.model and backbone.revision and types.model != backbone.revision:
            raise ValueError(f"{file}: head types of model {types.model}, this one is {backbone.revision}")
    else:
        latents = prepared.latents.unsqueeze(0).to(backbone.device)
        types = classify(backbone.transformer, latents, backbone.pad([prepared.text]), rule=settings.head_rule)
        types = types.model_copy(update={"model": backbone.revision})
    _check(prepared, types, settings)
    return types


def _check(prepared: Prepared, types: HeadTypes, settings: FollowYourMotion) -> None:
    """What would only be met after the spatial stage was trained."""
    for stage in TASKS if settings.decouple else ():
        if not bool(types.group(stage).any()):
            raise ValueError(f"rule {settings.head_rule} finds no {stage} head; use rule median, or another clip")
    seen = len(settings.indices(_seen(prepared, settings).shape[1]))
    if settings.sparse == "pixel" and seen < 2:
        raise ValueError(
            f"every {settings.stride}-th of the clip's {len(prepared.frames)} frames are too few to move; "
            f"sparse pixel needs {4 * settings.stride + 1} frames: take a smaller stride, or sparse latent"
        )
    if settings.motion_loss == "vmc" and seen < 3:
        raise ValueError(
            f"motion_loss vmc compares how differences change from frame to frame, of {seen} latents there is one difference, which "
            "always agrees: take motion_loss signed, more frames, or a smaller stride"
        )


def begin(
    backbone: Backbone,
    stage: str,
    prepared: Prepared,
    types: HeadTypes,
    settings: FollowYourMotion,
    done: Mapping[str, Weights],
) -> SpatialTask | TemporalTask:
    """Adds a fresh adapter for a stage to the transformer, beside those of the stages that are done, and gives the task to train it.

    Other adapters that the transformer held are gone. The backward pass recomputes what the backbone's `checkpoint_policy` says.

    Args:
        done: weights by stage, alpha folded in.
    """
    transformer = backbone.transformer
    backbone.adapter = None
    masked_lora.clear(transformer)
    transformer.enable_gradient_checkpointing(partial(checkpointed, policy=backbone.checkpoint_policy))
    for other, weights in done.items():
        masked_lora.attach(transformer, other, weights)
    heads = types.group(stage if settings.decouple else "all")
    masked_lora.add(
        transformer,
        stage,
        heads,
        rank=settings.rank,
        alpha=settings.alpha,
        targets=settings.targets,
        seed=settings.seed,
    )
    masked_lora.train_only(transformer, stage, beside=list(done))
    return TASKS[stage](transformer, prepared, settings, backbone.pad([prepared.text]).cpu())


class VelocityLoss(nn.Module):
    """Weighted flow-matching loss, with the motion loss where there is more than one frame.

    An engine that trains in bf16 casts all weights of the transformer, those that inference keeps in fp32 among them (time embedding,
    scales and shifts): its velocities are off by about as much as bf16's are anyway.
    """

    def __init__(self, transformer: WanTransformer3DModel, settings: FollowYourMotion) -> None:
        super().__init__()
        self.transformer, self.settings = transformer, settings
        self.compute = transformer.dtype
        if settings.isolate_qk_norm:
            masked_lora.isolate_norms(transformer)

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        sigma: Tensor,
        text: Tensor,
        positions: list[float] | None = None,
        anchor: int = 0,
    ) -> tuple[Tensor, StepLogs]:
        """latents, noise (B, C, F, h, w); sigma (B,); text (B, L, dim); anchor: see `motion_loss`."""
        predicted, velocity = self.velocity(latents, noise, sigma, text, positions)
        weight = (
            loss_weight(sigma, self.settings.shift) if self.settings.weighting == "bell" else torch.ones_like(sigma)
        )
        squared = (predicted - velocity).square().flatten(1).mean(1)
        if latents.shape[2] == 1:
            return (weight * squared).mean(), {}
        motion = motion_loss(predicted, velocity, self.settings.motion_loss, anchor)
        loss = (weight * (squared + self.settings.motion_weight * motion)).mean()
        return loss, {"loss_mse": squared.mean().detach(), "loss_motion": motion.mean().detach()}

    def velocity(
        self, latents: Tensor, noise: Tensor, sigma: Tensor, text: Tensor, positions: list[float] | None
    ) -> tuple[Tensor, Tensor]:
        """Predicted and true velocity, fp32."""
        s = sigma.view(-1, 1, 1, 1, 1)
        noisy = ((1 - s) * latents + s * noise).to(self.compute)
        with temporal_positions(self.transformer, positions):
            predicted = self.transformer(noisy, 1000 * sigma, text.to(self.compute), return_dict=False)[0]
        return predicted.float(), noise - latents


class _Stage:
    """What both stages hold."""

    name: str

    def __init__(
        self, transformer: WanTransformer3DModel, prepared: Prepared, settings: FollowYourMotion, text: Tensor
    ) -> None:
        self.settings, self.prepared, self.text = settings, prepared, text
        self.schedule: StageSchedule = getattr(settings, self.name)
        self.module = VelocityLoss(transformer, settings)

    def generator(self, number: int) -> torch.Generator:
        """Of a draw's random numbers: they follow from its number and the settings' seed alone."""
        # of which torch takes 32 bits: seeds lie far apart in them
        return torch.Generator().manual_seed((self.settings.seed * 2654435761 + number) % 2**32)


class SpatialTask(_Stage):
    """Appearance: random single frames, as images."""

    name = "spatial"

    def batch(self, draw: int) -> Batch:
        generator = self.generator(2 * draw)
        count = self.settings.frames_a_draw
        picked = torch.randint(len(self.prepared.frames), (count,), generator=generator)
        latents = self.prepared.frames[picked].unsqueeze(2)
        return _noised(latents, self.text, self.settings.shift, generator)

    def validate(self) -> float:
        """Loss of a few frames at fixed noise levels."""
        picked = torch.linspace(0, len(self.prepared.frames) - 1, VALIDATION_FRAMES).round().long()
        return _validation(self.module, self.prepared.frames[picked].unsqueeze(2), self.text)


class TemporalTask(_Stage):
    """Motion: the whole clip seen through a few of its frames."""

    name = "temporal"

    def batch(self, draw: int) -> Batch:
        generator = self.generator(2 * draw + 1)
        settings, source = self.settings, _seen(self.prepared, self.settings)
        indices = settings.indices(source.shape[1], generator)
        positions = settings.temporal_positions(indices, self.prepared.latents.shape[1])
        seen = source[:, indices]
        latents = seen.expand(settings.clips_a_draw, *seen.shape)
        noised = _noised(latents, self.text, settings.shift, generator)
        return (*noised, positions, int(torch.randint(seen.shape[1], (), generator=generator)))

    def validate(self) -> float:
        """Loss of the whole clip at fixed noise levels, at stock positions: what inference will see."""
        return _validation(self.module, self.prepared.latents.unsqueeze(0), self.text)


TASKS: dict[str, type[SpatialTask] | type[TemporalTask]] = {"spatial": SpatialTask, "temporal": TemporalTask}


def _noised(latents: Tensor, text: Tensor, shift: float, generator: torch.Generator) -> Batch:
    noise = torch.randn(latents.shape, generator=generator)
    sigma = shifted(torch.rand(len(latents), generator=generator), shift)
    return latents, noise, sigma, text.expand(len(latents), *text.shape[1:])


@torch.no_grad()
def _validation(module: VelocityLoss, latents: Tensor, text: Tensor) -> float:
    """Mean squared error of the velocity over VALIDATION_SIGMAS, the noise always the same."""
    device = next(module.parameters()).device
    latents, text = latents.to(device), text.to(device).expand(len(latents), *text.shape[1:])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(device)
    errors = []
    for sigma in VALIDATION_SIGMAS:
        predicted, velocity = module.velocity(
            latents, noise, torch.full((len(latents),), sigma, device=device), text, None
        )
        errors.append((predicted - velocity).square().mean().item())
    return sum(errors) / len(errors)


def loss_weight(sigma: Float[Tensor, " batch"], shift: float) -> Float[Tensor, " batch"]:
    """A bell over the noise level, exp(-2 (sigma - 1/2)^2) less its least value, with mean 1 over the levels that are drawn."""
    floor = math.exp(-0.5)
    levels = shifted(torch.arange(1, 1001, dtype=torch.float64) / 1000, shift)
    mean = float((torch.exp(-2 * (levels - 0.5) ** 2) - floor).mean())
    return (torch.exp(-2 * (sigma - 0.5) ** 2) - floor) / mean


def motion_loss(predicted: Tensor, velocity: Tensor, kind: str, anchor: int = 0) -> Float[Tensor, " batch"]:
    """Of velocities (B, C, F, h, w): one minus the cosine of differences of neighbouring frames (section 3.4), in [0, 2] if `signed`.

    `signed`: each pair of frames as one vector. `vmc`: absolute values, cosine along the frames, as the published code does.
    `debias`: squared error of sqrt(2) v - v_anchor, `anchor` being a frame drawn at random (MotionDirector, arXiv 2310.08465).
    """
    predicted, velocity = predicted.float(), velocity.float()
    if kind == "off":
        return predicted.new_zeros(len(predicted))
    if kind == "debias":
        one, other = (math.sqrt(2) * v - v[:, :, anchor : anchor + 1] for v in (predicted, velocity))
        return (one - other).square().flatten(1).mean(1)
    one, other = predicted.diff(dim=2), velocity.diff(dim=2)
    if kind == "vmc":
        one, other = one.abs(), other.abs()
        dims: tuple[int, ...] = (2,)
    else:
        dims = (1, 3, 4)
    product = (one * other).sum(dims)
    lengths = (one.square().sum(dims) + 1e-16).sqrt() * (other.square().sum(dims) + 1e-16).sqrt()
    both_still = (one.square().sum(dims) < 1e-16) & (other.square().sum(dims) < 1e-16)
    return torch.where(both_still, 0.0, 1 - product / lengths.clamp(min=1e-8)).flatten(1).mean(1)
