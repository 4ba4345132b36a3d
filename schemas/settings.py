"""Every setting of every job, each with its unit in its name or description.

A job's settings are a `JobSettings`: read from a YAML file (`--settings FILE`), then the environment (`VMT_…`, nested with
`__`: `VMT_LIMITS__ROW_SECONDS=600`), then the command line (`--limits.row_seconds 600`); the later wins. See `cli.py`.
Credentials are no settings: they come from the AWS environment or profile only, and are never written anywhere.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from schemas.rows import MOST_FRAMES, MOST_SIDE
from schemas.sections import (
    CommaSeeds,
    CommaStrings,
    DenoiseSettings,
    LimitSettings,
    Place,
    RaySettings,
    StageSettings,
    StorageSettings,
    TrainingSettings,
    VideoSettings,
)

_PART: ContextVar[bool] = ContextVar("part", default=False)  # a part's settings are being made, see `JobSettings.like`


class JobSettings(BaseSettings):
    """Base of all jobs' settings."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        env_prefix="VMT_",
        env_nested_delimiter="__",
        protected_namespaces=(),
        nested_model_default_partial_update=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_kebab_case=True,
        cli_exit_on_error=False,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        if _PART.get():
            return (init_settings,)
        return (init_settings, env_settings, YamlConfigSettingsSource(settings_cls))

    @classmethod
    def like(cls, other: JobSettings, **own: Any) -> Self:
        """Settings of a job that is a part of another one: what both have by one name, and its own; nothing of the environment."""
        shared = {name: getattr(other, name) for name in cls.model_fields if name in type(other).model_fields}
        token = _PART.set(True)
        try:
            return cls(**(shared | own))
        finally:
            _PART.reset(token)


class ModelSettings(JobSettings):
    """Base of the jobs that lay out videos: on which model, how large."""

    model: Place = Field(
        default="wan-nano", description="wan-nano, a local diffusers folder, a hub id, or an s3:// prefix"
    )
    preset: str | None = Field(
        default=None, description="methods' preset: default, paper, code or nano; empty: the model's own"
    )
    height: PositiveInt | None = Field(
        default=None, le=MOST_SIDE, multiple_of=16, description="pixels, a multiple of 16; empty: the model's own"
    )
    width: PositiveInt | None = Field(
        default=None, le=MOST_SIDE, multiple_of=16, description="pixels, a multiple of 16; empty: the model's own"
    )
    frames: PositiveInt | None = Field(
        default=None, le=MOST_FRAMES, description="4k+1, fewer for shorter clips; empty: the model's own"
    )
    fps: PositiveFloat | None = Field(
        default=None, le=240, allow_inf_nan=False, description="sample references at this rate; empty: as each file has"
    )

    @field_validator("frames")
    @classmethod
    def _frames_fill_latents(cls, frames: int | None) -> int | None:
        if frames is not None and (frames < 5 or frames % 4 != 1):
            raise ValueError(f"{frames} is not 4k+1 and at least 5; use {max(5, (frames - 1) // 4 * 4 + 1)}")
        return frames


class PlanSettings(ModelSettings):
    """references x prompts x seeds x methods -> a manifest, one row per video to make."""

    references: Place = Field(description="folder, glob, s3:// prefix, or a references table (.parquet, .csv, .jsonl)")
    prompts: str | None = Field(
        default=None,
        description="text file, one prompt a line (or VBench's .json), for every clip; clips of a table may have their own",
    )
    methods: CommaStrings = Field(default=("fastvmt",), description="methods, comma separated")
    seeds: CommaSeeds = Field(default=(0,), description="seeds, comma separated; 0-3 are four")
    output: Place = Field(description="folder or prefix of the manifest to write")
    dtype: Literal["bfloat16", "float32"] | None = Field(
        default=None,
        description="precision of the transformer; empty: bfloat16, or of wan-nano what this CPU computes faster in",
    )
    method_settings: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="overrides by method, e.g. {fastvmt: {guidance: {inner: 5}}} (in YAML, or as JSON)",
    )
    sweep: dict[str, dict[str, list[Any]]] = Field(
        default_factory=dict,
        description="values to compare, e.g. {fastvmt: {guidance.inner: [5, 10]}}: a row for every combination (in YAML, or as JSON)",
    )
    steps: PositiveInt | None = Field(default=None, le=1000, description="denoising steps; empty: the model's own")
    shift: PositiveFloat | None = Field(
        default=None, le=1000, description="flow-matching shift; empty: the model's own"
    )
    guidance_scale: NonNegativeFloat | None = Field(
        default=None, le=1000, description="classifier-free guidance; empty: the model's own"
    )
    negative_prompt: str = Field(default="", description="what the videos should not show")
    skip_bad: bool = Field(default=False, description="leave bad clips out instead of stopping")
    tflops: PositiveFloat = Field(
        default=400, description="sustained TFLOP/s of one GPU, for the estimate of GPU hours"
    )
    progress_s: PositiveFloat = Field(default=5, description="seconds between progress lines")
    storage: StorageSettings = StorageSettings()
    limits: LimitSettings = LimitSettings()


class TransferSettings(JobSettings):
    """A manifest -> videos and result rows. Run it again to make only what is missing."""

    manifest: Place = Field(description="manifest to run: a Parquet file, folder or prefix that plan wrote")
    output: Place = Field(description="folder or prefix for videos/, results/ and run/")
    model: Place = Field(
        default="wan-nano", description="where the weights are; must hold the revision that was planned"
    )
    method: str | None = Field(default=None, description="only rows of this method")
    samples: CommaStrings = Field(default=(), description="only the rows with these ids, comma separated")
    limit: PositiveInt | None = Field(default=None, description="make at most this many of the missing rows")
    retry_failed: bool = Field(default=False, description="forget the manifest's failed rows first, and try them again")
    adapters: str | None = Field(
        default=None,
        description="adapters of tuned methods: OUT/adapters of jobs/tune.py; default with --tune: this output's",
    )
    tune: bool = Field(default=False, description="first tune the adapters that are missing")
    training: TrainingSettings = TrainingSettings()
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: cuda where the stage has GPUs")
    encode: StageSettings = StageSettings()
    transfer: DenoiseSettings = DenoiseSettings()
    finish: StageSettings = StageSettings()
    rows_per_block: PositiveInt | None = Field(
        default=None, description="rows that are committed together; empty: transfer.batch_rows"
    )
    video: VideoSettings = VideoSettings()
    storage: StorageSettings = StorageSettings()
    limits: LimitSettings = LimitSettings()
    ray: RaySettings = RaySettings()
    progress_s: PositiveFloat = Field(default=5, description="seconds between progress lines")
    stages: str = Field(default="pipelines.stages", description="module of the stage actors; benchmarks replace it")


class MeasuringSettings(JobSettings):
    """Base of the jobs that measure: models of the metrics that need some. Without one, its metrics have no values, and rows say so."""

    clip: str | None = Field(default=None, description="CLIP (folder, hub id, s3:// prefix), for text similarity")
    dino: str | None = Field(default=None, description="DINO ViT-B/16, for subject consistency")
    aesthetic_clip: str | None = Field(default=None, description="CLIP ViT-L/14, for aesthetic quality")
    aesthetic_head: str | None = Field(default=None, description="LAION's linear head, a safetensors file")
    cotracker: str | None = Field(
        default=None, description="CoTracker 3, a safetensors file, for motion fidelity; non-commercial"
    )
    amt: str | None = Field(default=None, description="AMT-S, a safetensors file, for smoothness; non-commercial")


class EvaluateSettings(MeasuringSettings):
    """Results of runs -> metrics of every video, tables of methods. Run it again to measure only what is new."""

    run: list[Place] = Field(min_length=1, description="output of a transfer; may be given several times")
    output: Place = Field(description="folder or prefix for metrics/ and the tables")
    baseline: str = Field(
        default="none", description="method that differences are to, or the label of one of its lines in the tables"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where the encoders run; auto: cuda where measure has GPUs"
    )
    measure: StageSettings = StageSettings(actors=2)
    rows_per_block: PositiveInt = Field(default=16, description="videos that are committed together")
    bootstrap: PositiveInt = Field(default=2000, description="draws of the intervals")
    storage: StorageSettings = StorageSettings()
    limits: LimitSettings = LimitSettings()
    ray: RaySettings = RaySettings()
    progress_s: PositiveFloat = Field(default=5, description="seconds between progress lines")


class BenchSettings(ModelSettings, MeasuringSettings):
    """Plan, tune, transfer, evaluate and report in one command. Run it again to go on."""

    suite: Literal["procedural", "folder"] = Field(
        default="procedural", description="procedural: the world's MotionBench, exact motion; folder: your clips"
    )
    clips: str | None = Field(
        default=None, description="suite folder: clips with prompts, a folder or a references table"
    )
    prompts: str | None = Field(default=None, description="suite folder: prompts for every clip, as in plan")
    quick: bool = Field(
        default=False,
        description="for a look: a quarter of the training steps; procedural: a clip x 2 prompts of two categories, not 10 x 5 of four",
    )
    methods: CommaStrings = Field(
        default=("none", "ditflow", "fastvmt", "follow_your_motion"), description="methods, comma separated"
    )
    baseline: str = Field(
        default="none", description="method that differences are to, or the label of one of its lines in the tables"
    )
    seeds: CommaSeeds = Field(default=(0,), description="seeds, comma separated; 0-3 are four")
    output: Place = Field(description="folder or prefix of everything")
    retry_failed: bool = Field(default=False, description="try failed adapters and videos again")
    method_settings: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="as in plan (in YAML, or as JSON)"
    )
    sweep: dict[str, dict[str, list[Any]]] = Field(default_factory=dict, description="as in plan (in YAML, or as JSON)")
    steps: PositiveInt | None = Field(default=None, le=1000, description="denoising steps; empty: the model's own")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: cuda where a stage has GPUs")
    encode: StageSettings = StageSettings()
    transfer: DenoiseSettings = DenoiseSettings(max_actors=2)
    finish: StageSettings = StageSettings()
    training: TrainingSettings = TrainingSettings()
    measure: StageSettings = StageSettings(actors=2)
    storage: StorageSettings = StorageSettings()
    limits: LimitSettings = LimitSettings()
    ray: RaySettings = RaySettings()
    progress_s: PositiveFloat = Field(default=5, description="seconds between progress lines")


class SynthesizeSettings(JobSettings):
    """Procedural clips with exact tracks -> a dataset of videos and Parquet rows. Run it again to make only what is missing."""

    count: PositiveInt = Field(description="clips in all")
    output: Place = Field(description="folder or prefix for videos/, references/ and run/")
    seed: int = Field(default=0, ge=0, lt=2**60, description="the first clip's; each clip has the next one")
    split: Literal["all", "train", "val", "test"] = Field(
        default="all", description="only seeds of this split (18, 1 and 1 of every 20 seeds)"
    )
    categories: CommaStrings = Field(
        default=("camera", "single", "multiple", "articulated"), description="kinds of motion, in turn"
    )
    height: PositiveInt = Field(default=192, ge=16, le=2048, description="pixels, even")
    width: PositiveInt = Field(default=192, ge=16, le=2048, description="pixels, even")
    frames: PositiveInt = Field(default=17, le=1025, description="of each clip; models want 4k+1")
    fps: PositiveFloat = Field(default=12.0, le=240, allow_inf_nan=False, description="frames per second")
    track_spacing: PositiveInt = Field(default=12, description="pixels between the points that are tracked")
    rows_per_block: PositiveInt = Field(default=100, description="clips that are committed together")
    render: StageSettings = StageSettings(actors=2)
    video: VideoSettings = VideoSettings(preset="veryfast")
    storage: StorageSettings = StorageSettings()
    ray: RaySettings = RaySettings()
    progress_s: PositiveFloat = Field(default=5, description="seconds between progress lines")

    @model_validator(mode="after")
    def _videos_are_even_and_have_tracks(self) -> Self:
        for name in ("height", "width"):
            if getattr(self, name) % 2:
                raise ValueError(
                    f"{name}={getattr(self, name)} is odd, H.264 videos are even; use {getattr(self, name) + 1}"
                )
        if self.track_spacing > min(self.height, self.width):
            raise ValueError(f"track_spacing={self.track_spacing} is over the shorter side: no point would be tracked")
        return self


class TuneSettings(ModelSettings):
    """References -> adapters, one training each, several at once. Run it again to make only what is missing."""

    references: Place = Field(description="what synthesize wrote, or a references table with a caption column")
    output: Place = Field(description="folder or prefix for adapters/, prepared/ and run/")
    method: str = Field(default="follow_your_motion", description="a method that is tuned")
    tuning: dict[str, Any] = Field(
        default_factory=dict,
        description="settings of the method to change, e.g. {rank: 64, temporal: {steps: 500}} (YAML)",
    )
    limit: PositiveInt | None = Field(default=None, description="tune on at most this many of the missing references")
    retry_failed: bool = Field(default=False, description="try failed references again")
    dry_run: bool = Field(default=False, description="say what would be trained, and what it would cost")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: cuda if this machine has a GPU; on a cluster say which"
    )
    training: TrainingSettings = TrainingSettings()
    storage: StorageSettings = StorageSettings()
    limits: LimitSettings = LimitSettings()
    ray: RaySettings = RaySettings()
    progress_s: PositiveFloat = Field(default=5, description="seconds between progress lines")
    tflops: PositiveFloat = Field(default=400, description="sustained TFLOP/s of one GPU, for the estimate of time")


class PretrainSettings(JobSettings):
    """Trains wan-nano, first its autoencoder, then its transformer, from the procedural world. Run again with --resume to go on."""

    stage: Literal["vae", "dit", "decoder"] = Field(
        description="vae first, then dit on its latents; decoder trains the vae's decoder on, and leaves the latents as they are"
    )
    output: Place = Field(
        default="out/pretrain", description="folder or prefix for checkpoints, logs and the exported model"
    )
    start: str | None = Field(
        default=None,
        description="a model whose weights are trained on, wan-nano or a local folder; an autoencoder that stands in output/vae "
        "takes the place of its own; empty: from random ones",
    )
    minutes: PositiveFloat = Field(default=60, description="stop after this long, with a checkpoint")
    resume: bool = Field(default=False, description="go on from the stage's last checkpoint")
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="where to train")
    workers: PositiveInt = Field(
        default=1, description="training processes; each has a GPU of its own with --device cuda"
    )
    threads: PositiveInt | None = Field(default=None, description="torch threads of a worker; empty: all cores")
    seed: int = Field(default=0, ge=0, description="of weights, clips and noise")
    cache: str | None = Field(
        default=None, description="local folder for latents that are trained on; default: in the user's cache"
    )
    steps_scale: PositiveFloat = Field(default=1.0, description="multiplies the steps of every phase, for a quick try")
    compile: bool = Field(
        default=True, description="compile the transformer's blocks (needs a C++ compiler on the CPU)"
    )
    validate_every: PositiveInt = Field(default=250, description="steps")
    validation_clips: PositiveInt | None = Field(default=None, description="held-out clips; empty: as many as is usual")
    checkpoint_minutes: PositiveFloat = Field(default=5, description="minutes between checkpoints")
    storage: StorageSettings = StorageSettings()
    ray: RaySettings = RaySettings()
