"""Groups of settings that several jobs share: storage, limits, pools of actors, Ray, videos, training."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)
from pydantic.functional_validators import BeforeValidator
from pydantic_settings import NoDecode


def _comma_list(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _seeds(value: Any) -> Any:
    """`0,1,5-7`, or one number, as in YAML."""
    parts = [value] if isinstance(value, int) else _comma_list(value)
    if not isinstance(parts, list | tuple):
        return parts
    found: list[Any] = []
    for part in parts:
        ends = re.fullmatch(r"(\d{1,18})-(\d{1,18})", str(part))
        if not ends:
            found.append(part)
            continue
        first, last = map(int, ends.groups())
        if not first <= last < first + _MOST_SEEDS:
            raise ValueError(f"{part}: a range goes up, over at most {_MOST_SEEDS:,} seeds")
        found += range(first, last + 1)
    return found


_MOST_SEEDS = 100_000
Place = Annotated[str, Field(min_length=1)]  # a file, a folder or a prefix
CommaStrings = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_comma_list)]
CommaExports = Annotated[tuple[Literal["comfyui", "merged"], ...], NoDecode, BeforeValidator(_comma_list)]
#: torch's generator of the CPU takes 32 bits of a seed: larger ones would make the same videos again.
Seed = Annotated[int, Field(ge=0, lt=2**32)]
CommaSeeds = Annotated[tuple[Seed, ...], NoDecode, BeforeValidator(_seeds)]


class Section(BaseModel):
    """A named group of settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class StorageSettings(Section):
    """How object storage is reached. Local paths need none of it."""

    endpoint_url: str | None = Field(default=None, description="S3 endpoint; default: AWS_ENDPOINT_URL or AWS itself")
    profile: str | None = Field(default=None, description="AWS profile; default: AWS_PROFILE or the default chain")
    region: str | None = Field(default=None, description="AWS region")
    attempts: PositiveInt = Field(default=5, description="tries per storage operation, with exponential backoff")
    timeout_s: PositiveFloat = Field(default=60, description="seconds without a byte before an operation is retried")

    @field_validator("endpoint_url")
    @classmethod
    def _no_credentials(cls, url: str | None) -> str | None:
        if url and "@" in url:  # settings are written beside the results
            raise ValueError("holds a user or a password; credentials come from the AWS environment or profile")
        return url


class LimitSettings(Section):
    """What a row may ask for; checked before anything is decoded or computed."""

    schemes: CommaStrings = Field(default=("file", "s3"), description="URI schemes that references may have")
    max_reference_mib: PositiveFloat = Field(default=2048, description="size of a reference file, MiB")
    max_frames: PositiveInt = Field(default=20_000, description="frames of a reference file")
    max_duration_s: PositiveFloat = Field(default=1800, description="duration of a reference file, seconds")
    max_pixels: PositiveInt = Field(default=3840 * 2160, description="width x height of a reference")
    max_prompt_chars: PositiveInt = Field(default=2000, description="characters of a prompt")
    row_seconds: PositiveFloat = Field(default=3600, description="wall-clock budget of one row in one stage, seconds")


class StageSettings(Section):
    """Resources of one actor pool."""

    actors: PositiveInt = Field(default=1, description="actors in the pool (the minimum if max_actors is set)")
    max_actors: PositiveInt | None = Field(
        default=None, description="let the pool grow up to this many; empty: fixed size"
    )
    cpus: NonNegativeFloat = Field(default=1, description="logical CPUs of one actor")
    gpus: NonNegativeFloat = Field(default=0, description="GPUs of one actor; fractions share a GPU")
    memory_gib: PositiveFloat | None = Field(default=None, description="memory reserved by one actor, GiB")
    threads: PositiveInt | None = Field(
        default=None, description="torch threads of one actor; empty: its CPUs, at least 1"
    )

    @model_validator(mode="after")
    def _max_is_not_below_min(self) -> Self:
        if self.max_actors is not None and self.max_actors < self.actors:
            raise ValueError(f"max_actors={self.max_actors} is less than actors={self.actors}")
        return self


class DenoiseSettings(StageSettings):
    """Resources of the pool that runs the diffusion transformer, and how it runs it."""

    batch_rows: PositiveInt = Field(default=4, description="rows of one size and method that are denoised together")
    checkpoint: Literal["none", "selective", "full"] | None = Field(
        default=None,
        description="what guidance recomputes in its backward pass: nothing, all but attention, everything; "
        "empty: selective, for wan-nano none",
    )
    cfg: Literal["two_pass", "batched"] = Field(
        default="two_pass", description="classifier-free guidance: two forwards, or one of twice the batch"
    )


class RaySettings(Section):
    """Where the job runs."""

    address: str | None = Field(
        default=None, description="cluster to join; default: RAY_ADDRESS, else a local Ray is started"
    )
    num_cpus: PositiveInt | None = Field(
        default=None, description="logical CPUs of a local Ray; default: what the pools need"
    )
    wait_s: NonNegativeFloat = Field(
        default=300, description="how long to wait for a cluster to offer what the pools need"
    )
    stall_s: PositiveFloat = Field(default=1800, description="stop if no row begins or ends for so long, seconds")


X264Preset = Literal[
    "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo"
]


class VideoSettings(Section):
    """How results are encoded (H.264, yuv420p)."""

    crf: int = Field(default=18, ge=0, le=51, description="constant rate factor; smaller is better and larger")
    preset: X264Preset = Field(default="medium", description="x264 preset: slower is smaller")


class DeepSpeedSettings(Section):
    """How the training of one adapter is spread over its workers."""

    zero: int = Field(
        default=0,
        ge=0,
        le=3,
        description="ZeRO stage: what is parted among workers; at least 1 in bf16 and with offload",
    )
    offload: bool = Field(default=False, description="keep optimizer state (and, with zero=3, weights) in CPU memory")
    bf16: bool | None = Field(
        default=None, description="train in bf16 with fp32 masters, or in fp32; default: bf16 on GPUs"
    )


class TrainingSettings(Section):
    """How adapters are trained: several references at once, each by one or more workers."""

    workers_per_reference: PositiveInt = Field(
        default=1, description="processes that train one adapter; with cuda each has a GPU of its own"
    )
    cpus_per_worker: PositiveFloat = Field(default=1, description="logical CPUs of one process")
    threads: PositiveInt | None = Field(default=None, description="torch threads of a process; empty: its CPUs")
    at_once: PositiveInt | None = Field(
        default=None,
        description="references that are tuned on at the same time; empty: as many as the cluster has room for, more as it grows",
    )
    attempts: PositiveInt = Field(default=3, description="times that a training whose worker dies is begun")
    deepspeed: DeepSpeedSettings = DeepSpeedSettings()
    checkpoint: Literal["none", "selective", "full"] | None = Field(
        default=None,
        description="what the backward pass recomputes: nothing, all but attention, everything; "
        "empty: selective, for wan-nano none",
    )
    export: CommaExports = Field(default=(), description="other formats beside diffusers': comfyui, merged")
    checkpoint_seconds: PositiveFloat = Field(default=120, description="seconds between checkpoints of a training")
    wandb: str | None = Field(
        default=None, description="Weights & Biases project to log to as well (pip install wandb; WANDB_API_KEY)"
    )
    sample_every: NonNegativeInt = Field(
        default=0, description="steps between videos of the reference's own caption, in OUT/run/samples; 0: none"
    )
    prepare: StageSettings = StageSettings()
