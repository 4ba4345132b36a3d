"""MotionTransfer: the class that a notebook user meets.

    transfer = MotionTransfer(Backbone.load("wan-nano"), METHODS["fastvmt"](preset="nano"))
    artifact = transfer.prepare(video.read("clip.mp4", …))          # once per reference
    videos   = transfer.transfer(artifact, ["a red ball"], seeds=[0])

The pipeline runs the same steps in three actors: `Backbone.encode` and `caption`, then `describe` and `denoise`, then `decode`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vmt_core.adapters import files, masked_lora
from vmt_core.adapters.masked_lora import Weights
from vmt_core.backbone import taps
from vmt_core.backbone.sampler import Schedule, denoiser_calls, noise, noised, sample
from vmt_core.backbone.wan import Backbone
from vmt_core.guidance import Guidance, GuidanceLog, optimise
from vmt_core.methods import Method
from vmt_core.shapes import Frames, LatentBatch, Latents, Motion, Text

CfgName = Literal["two_pass", "batched"]


@dataclass(frozen=True)
class Sampling:
    """How a video is sampled; the defaults are those of Wan.

    Raises:
        ValueError: no steps, a shift that is not positive, a negative guidance_scale, or another cfg.
    """

    steps: int = 50
    shift: float = 5.0
    guidance_scale: float = 5.0
    cfg: CfgName = "two_pass"

    def __post_init__(self) -> None:
        right = self.steps >= 1 and 0 < self.shift < math.inf and 0 <= self.guidance_scale < math.inf
        if not right or self.cfg not in get_args(CfgName):
            raise ValueError(
                f"{self}: steps >= 1, shift > 0, guidance_scale >= 0, cfg {' or '.join(get_args(CfgName))}"
            )

    @classmethod
    def native(cls, backbone: Backbone) -> Sampling:
        """What the model is made for."""
        own = backbone.native
        return cls(own.steps, own.shift, own.guidance_scale)


@dataclass(frozen=True)
class Artifact:
    """What is kept of a reference: its latents, the empty caption, and its motion as the method's objective (JSON) sees it.

    All of it is in one model's terms: `model` is the revision of its weights (empty: whoever made it by hand vouches for it).
    """

    latents: Latents
    empty: Text
    motion: Motion = field(default_factory=dict)
    objective: str = ""
    model: str = ""

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file."""
        tensors = {"latents": self.latents, "empty": self.empty} | {f"motion.{k}": v for k, v in self.motion.items()}
        about = {"objective": self.objective, "model": self.model}
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, path, metadata=about)

    @classmethod
    def load(cls, path: str | Path) -> Artifact:
        """Reads what `save` wrote.

        Raises:
            ValueError: another file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
                about = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{path}: is no safetensors file ({error})") from error
        if not {"latents", "empty"} <= tensors.keys():
            raise ValueError(f"{path}: holds no artifact, only {', '.join(sorted(tensors)[:5]) or 'nothing'}")
        motion = {name.removeprefix("motion."): value for name, value in tensors.items() if name.startswith("motion.")}
        return cls(tensors["latents"], tensors["empty"], motion, about.get("objective", ""), about.get("model", ""))


@dataclass(frozen=True)
class Denoised:
    """Latents of a batch, and what making each of them took."""

    latents: Float[Tensor, "batch channels frames height width"]
    logs: list[GuidanceLog]
    denoiser_calls: int


class MotionTransfer:
    """Transfers motion by one method on one backbone.

    Args:
        sampling: by default what the model is made for.
        adapter: of a tuned method: weights by stage, tuned on the reference (`vmt_core.adapters.files.load`). A backbone holds one
            adapter at a time; each `MotionTransfer` puts its own in the place of another's.

    Raises:
        ValueError: the method reads a block that the transformer does not have, or lacks its adapter.
    """

    def __init__(
        self,
        backbone: Backbone,
        method: Method,
        sampling: Sampling | None = None,
        adapter: Mapping[str, Weights] | None = None,
    ) -> None:
        self.backbone = backbone
        self.method = method
        if (method.adapter is None) != (adapter is None):
            raise ValueError(
                f"{method.name} needs an adapter that was tuned on the reference"
                if adapter is None
                else f"{method.name} has no use for an adapter"
            )
        self.adapter = adapter
        if adapter is not None:
            if set(adapter) != set(files.STAGES):
                raise ValueError(
                    f"an adapter has the stages {', '.join(files.STAGES)}, not {', '.join(adapter) or 'none'}"
                )
            self._attach(adapter)
        self.sampling = sampling or Sampling.native(backbone)
        self.schedule = Schedule.shifted(self.sampling.steps, self.sampling.shift, method.start.strength or 1.0)
        if method.guidance is not None:
            block = max(tap.block for tap in method.guidance.objective.taps)
            blocks = backbone.transformer.config.num_layers
            if block >= blocks:
                raise ValueError(
                    f"{method.name} reads block {block}, but this model has blocks 0..{blocks - 1}: "
                    f"use preset 'nano' or objective.block"
                )

    def prepare(self, frames: Frames) -> Artifact:
        """A reference's artifact from its pixels (T, 3, H, W), T = 4k+1; serves any number of prompts and seeds."""
        return self.describe(self.backbone.encode(frames), self.backbone.caption(""))

    @torch.no_grad()
    def describe(self, latents: Latents, empty: Text) -> Artifact:
        """A reference's artifact from its latents and the embedding of the empty caption."""
        guidance = self.method.guidance
        motion: Motion = {}
        if guidance is not None and guidance.level == "clean":
            with self._adapted():
                motion = self._motion(guidance, latents.to(self.backbone.device), sigma=0.0, empty=empty)
        return Artifact(latents, empty, motion, self._objective(), self.backbone.revision)

    def _objective(self) -> str:
        """What an artifact's motion depends on, as JSON; empty if the method keeps none in it."""
        guidance = self.method.guidance
        if guidance is None or guidance.level != "clean":
            return ""
        depends = guidance.objective.model_dump(mode="json")
        if self.adapter is not None:
            depends["adapter"] = self._adapter_digest
        return json.dumps(depends)

    @cached_property
    def _adapter_digest(self) -> str:
        """Of the adapter's weights and how they are used."""
        strict = self.method.adapter is not None and self.method.adapter.tuning.isolate_qk_norm
        digest = hashlib.sha256(repr((self._scales(), strict)).encode())
        for stage, weights in sorted((self.adapter or {}).items()):
            for name, value in sorted(weights.items()):
                digest.update(f"{stage} {name}".encode())
                digest.update(value.float().numpy(force=True).tobytes())
        return digest.hexdigest()[:16]

    def _scales(self) -> dict[str, float]:
        used = self.method.adapter
        return {} if used is None else {"spatial": used.spatial_scale, "temporal": used.temporal_scale}

    def _attach(self, adapter: Mapping[str, Weights]) -> None:
        self.backbone.adapter = None  # until it is whole: what fails halfway is nobody's
        masked_lora.clear(self.backbone.transformer)
        for stage, weights in adapter.items():
            masked_lora.attach(self.backbone.transformer, stage, weights)
        self.backbone.adapter = adapter

    def transfer(
        self,
        artifact: Artifact,
        prompts: Sequence[str],
        seeds: Sequence[int],
        negative_prompt: str = "",
        batch: int = 1,
    ) -> list[Frames]:
        """Videos for every prompt with every seed, prompt-major; each (T, 3, H, W) uint8. `batch` of them are denoised together.

        Raises:
            ValueError: one prompt or seed in the place of several, or what `denoise` raises.
        """
        if isinstance(prompts, str) or isinstance(seeds, int) or batch < 1:
            raise ValueError(
                "prompts and seeds are lists, batch is at least 1: transfer(artifact, ['a red ball'], [0])"
            )
        pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
        captions = {prompt: self.backbone.caption(prompt) for prompt in prompts}
        negative = self.backbone.caption(negative_prompt)
        videos: list[Frames] = []
        for start in range(0, len(pairs), batch):
            some = pairs[start : start + batch]
            denoised = self.denoise(
                [artifact] * len(some),
                [captions[prompt] for prompt, _ in some],
                [negative] * len(some),
                [seed for _, seed in some],
            )
            videos += [self.backbone.decode(latents) for latents in denoised.latents]
        return videos

    def denoise(
        self, artifacts: Sequence[Artifact], texts: Sequence[Text], negatives: Sequence[Text], seeds: Sequence[int]
    ) -> Denoised:
        """Latents of a batch of rows of one size; each row has its own reference, caption, seed and guidance.

        A row's noise comes from a CPU generator of its seed alone, so its result does not depend on its neighbours (but for the last bits
        where a device computes batches of other sizes by other kernels).

        Raises:
            ValueError: an artifact is of another model, or its motion was described for another objective.
        """
        if models := {artifact.model for artifact in artifacts} - {"", self.backbone.revision}:
            raise ValueError(
                f"an artifact is in terms of model {models.pop()}, this is {self.backbone.revision}; prepare it with this MotionTransfer"
            )
        wanted = self._objective()
        if wanted and (others := {artifact.objective for artifact in artifacts} - {wanted}):
            raise ValueError(
                f"an artifact was described for {others.pop() or 'no objective'}, not for {wanted}; prepare it with this MotionTransfer"
            )
        device = self.backbone.device
        draws = [noise(seed, artifact.latents.shape, draws=2) for artifact, seed in zip(artifacts, seeds, strict=True)]
        latents = torch.stack([eps for eps, _ in draws]).to(device)
        reference = torch.stack([artifact.latents for artifact in artifacts]).to(device)
        if self.method.start.kind == "sdedit":
            latents = noised(reference, latents, float(self.schedule.sigmas[0]))
        text, negative = self.backbone.pad(texts), self.backbone.pad(negatives)
        logs = [GuidanceLog() for _ in artifacts]
        reference_noise = torch.stack([eps for _, eps in draws])
        guidance = self.method.guidance

        def edit(step: int, x: LatentBatch) -> LatentBatch:
            assert guidance is not None
            if step >= guidance.guided_steps(self.schedule.steps):
                return x
            motions = [artifact.motion for artifact in artifacts]
            if guidance.level == "step":
                sigma = float(self.schedule.sigmas[step])
                at_sigma = noised(reference, reference_noise.to(device), sigma)
                motions = [
                    self._motion(guidance, z, sigma=sigma, empty=artifact.empty)
                    for z, artifact in zip(at_sigma, artifacts, strict=True)
                ]
            timestep = self.schedule.timesteps[step].to(device).expand(len(x))

            def losses(y: LatentBatch) -> Float[Tensor, " batch"]:
                features = self.backbone.features(y, timestep, text, guidance.objective.taps)
                geometry = self.backbone.geometry(y)
                return torch.stack(
                    [guidance.objective.loss(taps.row(features, i), motions[i], geometry) for i in range(len(y))]
                )

            rates = guidance.learning_rates(step, self.schedule.steps)
            return optimise(x, losses, rates, guidance.interval, logs)

        with self._adapted():
            latents = sample(
                self.backbone.velocity,
                latents,
                self.schedule,
                text,
                negative,
                guidance_scale=self.sampling.guidance_scale,
                cfg=self.sampling.cfg,
                edit=edit if guidance is not None else None,
            )
        return Denoised(latents.cpu(), logs, denoiser_calls(self.schedule, self.sampling.guidance_scale))

    @contextmanager
    def _adapted(self) -> Iterator[None]:
        """The adapters at the method's scales; outside the transformer is the stock one, bit for bit."""
        if self.method.adapter is None or self.adapter is None:
            with masked_lora.switched_off(self.backbone.transformer):
                yield
            return
        if self.backbone.adapter is not self.adapter:
            self._attach(self.adapter)
        strict = self.method.adapter.tuning.isolate_qk_norm
        transformer = self.backbone.transformer
        masked_lora.use(transformer, self._scales())
        try:
            with masked_lora.isolated_norms(transformer) if strict else nullcontext():
                yield
        finally:
            masked_lora.use(transformer, {})

    def _motion(self, guidance: Guidance, latents: Latents, *, sigma: float, empty: Text) -> Motion:
        """The reference's motion from its latents at noise level sigma, read with the empty caption."""
        timestep = torch.full((1,), 1000 * sigma, device=self.backbone.device)
        with torch.no_grad():
            features = self.backbone.features(
                latents.unsqueeze(0), timestep, self.backbone.pad([empty]), guidance.objective.taps
            )
            return guidance.objective.encode(taps.row(features, 0), self.backbone.geometry(latents))
