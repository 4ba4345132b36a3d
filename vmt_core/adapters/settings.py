"""Settings of the tuned methods; what they mean stands in the modules that use them. Light: no diffusers here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from vmt_core.tuning import StageSchedule

Rule = Literal["median", "paper", "code"]
Target = Literal["to_q", "to_k", "to_v", "to_out.0"]
TARGETS: tuple[Target, ...] = ("to_q", "to_k", "to_v", "to_out.0")
#: Bumped whenever a change of this package alters the adapters: part of every adapter's identity.
TUNING_VERSION = 4
PRESETS = ("default", "paper", "code", "nano")
VALIDATION_SIGMAS = (0.9, 0.7, 0.5, 0.3)
VALIDATION_FRAMES = 5  # of the spatial stage


class FollowYourMotion(BaseModel):
    """Every setting of the method."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    head_rule: Rule | Literal["file"] = Field(
        default="median", description="how scores become head types; file: they are those of head_file"
    )
    head_file: str | None = Field(
        default=None, description="a head_types.json of this model: whole path or URI; another table needs another name"
    )
    decouple: bool = Field(default=True, description="false: both adapters are on all heads (ablation)")
    rank: int = Field(default=32, ge=1, le=1024)
    alpha: float = Field(default=32, gt=0, description="scale of an adapter is alpha / rank")
    targets: tuple[Target, ...] = Field(default=TARGETS, min_length=1, description="projections of the self-attention")
    isolate_qk_norm: bool = Field(default=False, description="strict: RMS of q and k from the base projections")
    spatial: StageSchedule = StageSchedule(steps=1000)
    temporal: StageSchedule = StageSchedule(steps=1500, validate_every=250)  # four forwards of the whole clip each time
    frames_a_draw: int = Field(default=4, ge=1, description="random frames that are trained on together, spatial stage")
    clips_a_draw: int = Field(default=1, ge=1, description="noise draws that are trained on together, temporal stage")
    sparse: Literal["latent", "pixel", "off"] = Field(
        default="latent",
        description="frames of the temporal stage: some latents of the whole clip, a clip of every stride-th frame, all",
    )
    stride: int = Field(default=5, ge=1, description="of sparse sampling; latents, or frames (pixel)")
    positions: Literal["exact", "aligned", "paper", "stock"] = Field(
        default="exact",
        description="adaptive RoPE: where the frames were (latent), first and last in place, F/F' apart, or 0, 1, 2, … (ablation)",
    )
    motion_loss: Literal["signed", "vmc", "debias", "off"] = Field(
        default="signed",
        description="cosine of differences of neighbouring frames, of their absolute values, appearance-debiased, none",
    )
    motion_weight: float = Field(default=1.0, ge=0)
    shift: float = Field(default=5.0, gt=0, description="of the noise levels that are drawn")
    weighting: Literal["bell", "flat"] = Field(
        default="bell",
        description="of the loss over noise levels: next to nothing near pure noise, or alike (where motion is decided there)",
    )

    seed: int = Field(default=0, ge=0, lt=2**30, description="of first weights, frames, noise and its levels")

    @model_validator(mode="after")
    def _a_file_has_a_name(self) -> Self:
        if (self.head_rule == "file") != (self.head_file is not None):
            raise ValueError("head_file names the table of head_rule=file: give both, or neither")
        return self

    @classmethod
    def preset(cls, name: str = "default", **changes: Any) -> FollowYourMotion:
        """The settings of a preset, some of them changed; changes of schedules are merged into them.

        Raises:
            ValueError: no such preset, or a wrong setting.
        """
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is not one of {', '.join(PRESETS)}")
        values: dict[str, Any] = {**_PRESETS[name]}
        for key, value in changes.items():
            base = values.get(key)
            if key in ("spatial", "temporal") and isinstance(value, Mapping):
                base = base or cls.model_fields[key].default
                value = {**base.model_dump(), **value}
            values[key] = value
        return cls(**values)

    def indices(self, frames: int, generator: torch.Generator | None = None) -> list[int]:
        """Latent frames of a temporal draw, out of `frames`: the even grid without a generator, else at random around it half of the time.

        The first is always there: Wan's first latent holds a single frame. At least three are, so that short clips, too, show how two
        latents of four frames differ. Positions `aligned` and `paper` are those of an even grid, so no other is drawn for them.
        """
        if self.sparse != "latent":
            return list(range(frames))
        count = min(frames, max(3, (frames - 1) // self.stride + 1))
        even = torch.linspace(0, frames - 1, count).round().long()
        if generator is None or self.positions in ("aligned", "paper") or torch.rand((), generator=generator) < 0.5:
            return even.tolist()
        edges = torch.linspace(1, frames, count).floor()
        low, high = edges[:-1], edges[1:]
        drawn = low + ((high - low) * torch.rand(count - 1, generator=generator)).floor()
        return [0, *drawn.long().tolist()]

    def temporal_positions(self, indices: list[int], whole: int) -> list[float] | None:
        """Positions of the frames of a temporal draw in a clip of `whole` latents; None: the stock ones.

        Args:
            indices: of the latents that are seen; with sparse=pixel those of the clip of every stride-th frame.
        """
        count = len(indices)
        if self.positions == "stock" or self.sparse == "off":
            return None
        if self.positions == "paper":
            return [index * whole / count for index in range(count)]
        if self.positions == "aligned":
            # a thinned clip that was cut to 4k+1 frames ends before the clip does
            end = min(whole - 1, self.stride * (count - 1)) if self.sparse == "pixel" else whole - 1
            return [index * end / max(1, count - 1) for index in range(count)]
        step = self.stride if self.sparse == "pixel" else 1
        return [float(step * index) for index in indices]


_PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "head_rule": "paper",
        "rank": 128,
        "alpha": 128,
        "sparse": "pixel",
        "positions": "paper",
        "frames_a_draw": 1,
        "spatial": StageSchedule(steps=3000),
        "temporal": StageSchedule(steps=2000, validate_every=250),
    },
    "code": {
        "head_rule": "code",
        "rank": 16,
        "alpha": 16,
        "targets": ("to_q", "to_k", "to_v"),
        "sparse": "off",
        "motion_loss": "vmc",
        "frames_a_draw": 1,
        "spatial": StageSchedule(steps=1500, weight_decay=0.1),
        "temporal": StageSchedule(steps=1500, weight_decay=0.5, validate_every=250),
    },
    "nano": {
        "rank": 16,
        "alpha": 16,
        "stride": 2,
        "shift": 12.0,  # it decides above 0.9 where things are and how they move: see its model card
        "weighting": "flat",
        "frames_a_draw": 8,
        "clips_a_draw": 4,
        "spatial": StageSchedule(steps=60, learning_rate=1e-3, warmup=10, validate_every=20),
        "temporal": StageSchedule(steps=150, learning_rate=1e-3, warmup=10, validate_every=30),
    },
}
