"""Every setting of every job, each with its unit in its name or description.

A job's settings are a `JobSettings`: read from a YAML file (`--settings FILE`), then the environment (`VMT_…`, nested with
`__`: `VMT_LIMITS__ROW_SECONDS=600`), then the command line (`--limits.row_seconds 600`); the later wins. See `cli.py`.
Credentials are no settings: they come from the AWS environment or profile only, and are never written anywhere.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from pydantic.functional_validators import BeforeValidator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)


def _comma_list(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


CommaStrings = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_comma_list)]
CommaInts = Annotated[tuple[int, ...], NoDecode, BeforeValidator(_comma_list)]


class Section(BaseModel):
    """A named group of settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class StorageSettings(Section):
    """How object storage is reached. Local paths need none of it."""

    endpoint_url: str | None = Field(default=None, description="S3 endpoint; default: AWS_ENDPOINT_URL or AWS itself")
    profile: str | None = Field(default=None, description="AWS profile; default: AWS_PROFILE or the default chain")
    region: str | None = Field(default=None, description="AWS region")
    attempts: PositiveInt = Field(default=5, description="tries per storage operation, with exponential backoff")
    timeout_s: PositiveFloat = Field(default=60, description="seconds without a byte before an operation is retried")


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
    checkpoint: Literal["none", "selective", "full"] = Field(
        default="selective",
        description="what guidance recomputes in its backward pass: nothing, all but attention, everything",
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


class VideoSettings(Section):
    """How results are encoded (H.264, yuv420p)."""

    crf: int = Field(default=18, ge=0, le=51, description="constant rate factor; smaller is better and larger")
    preset: str = Field(default="medium", description="x264 preset")


class DeepSpeedSettings(Section):
    """How the training of one adapter is spread over its workers."""

    zero: int = Field(default=0, ge=0, le=3, description="ZeRO stage: what is parted among the workers")
    offload: bool = Field(default=False, description="keep optimizer state (and, with zero=3, weights) in CPU memory")
    bf16: bool = Field(default=False, description="train in bf16 with fp32 masters; false: fp32")


class TrainingSettings(Section):
    """How adapters are trained: several references at once, each by one or more workers."""

    workers_per_reference: PositiveInt = Field(
        default=1, description="processes that train one adapter; with cuda each has a GPU of its own"
    )
    cpus_per_worker: PositiveFloat = Field(default=1, description="logical CPUs of one process")
    threads: PositiveInt | None = Field(default=None, description="torch threads of a process; empty: its CPUs")
    at_once: PositiveInt | None = Field(
        default=None,
        description="references that are tuned on at the same time; empty: as many as the cluster has room for",
    )
    attempts: PositiveInt = Field(default=3, description="times that a training whose worker dies is begun")
    deepspeed: DeepSpeedSettings = DeepSpeedSettings()
    checkpoint: Literal["none", "selective", "full"] = Field(
        default="selective", description="what the backward pass recomputes: nothing, all but attention, everything"
    )
    export: CommaStrings = Field(default=(), description="other formats beside diffusers': comfyui, merged")
    checkpoint_seconds: PositiveFloat = Field(default=120, description="seconds between checkpoints of a training")
    wandb: str | None = Field(
        default=None, description="Weights & Biases project to log to as well (pip install wandb; WANDB_API_KEY)"
    )
    sample_every: NonNegativeInt = Field(
        default=0, description="steps between videos of the reference's own caption, in OUT/run/samples; 0: none"
    )
    prepare: StageSettings = StageSettings()


class JobSettings(BaseSettings):
    """Base of all jobs' settings."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
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
        return (init_settings, env_settings, YamlConfigSettingsSource(settings_cls))


class PlanSettings(JobSettings):
    """references x prompts x seeds x methods -> a manifest, one row per video to make."""

    references: str = Field(description="folder, glob, s3:// prefix, or a references table (.parquet, .csv, .jsonl)")
    prompts: str | None = Field(
        default=None,
        description="text file, one prompt a line (or VBench's .json), for every clip; clips of a table may have their own",
    )
    methods: CommaStrings = Field(default=("fastvmt",), description="methods, comma separated")
    seeds: CommaInts = Field(default=(0,), description="seeds, comma separated")
    output: str = Field(description="folder or prefix of the manifest to write")
    model: str = Field(
        default="wan-nano", description="wan-nano, a local diffusers folder, a hub id, or an s3:// prefix"
    )
    dtype: Literal["bfloat16", "float32"] = Field(default="bfloat16", description="precision of the transformer")
    preset: str | None = Field(
        default=None, description="methods' preset: default, paper or nano; empty: the model's own"
    )
    method_settings: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="overrides by method, e.g. {fastvmt: {guidance: {inner: 5}}} (YAML only)"
    )
    sweep: dict[str, dict[str, list[Any]]] = Field(
        default_factory=dict,
        description="values to compare, e.g. {fastvmt: {guidance.inner: [5, 10]}}: a row for every combination (YAML only)",
    )
    height: PositiveInt | None = Field(default=None, description="pixels, a multiple of 16; empty: the model's own")
    width: PositiveInt | None = Field(default=None, description="pixels, a multiple of 16; empty: the model's own")
    frames: PositiveInt | None = Field(
        default=None, description="4k+1, fewer for shorter clips; empty: the model's own"
    )
    fps: PositiveFloat | None = Field(
        default=None, allow_inf_nan=False, description="sample references at this rate; empty: as each file has"
    )
    steps: PositiveInt | None = Field(default=None, description="denoising steps; empty: the model's own")
    shift: PositiveFloat | None = Field(default=None, description="flow-matching shift; empty: the model's own")
    guidance_scale: NonNegativeFloat | None = Field(
        default=None, description="classifier-free guidance; empty: the model's own"
    )
    negative_prompt: str = Field(default="", description="what the videos should not show")
    skip_bad: bool = Field(default=False, description="leave bad clips out instead of stopping")
    tflops: PositiveFloat = Field(
        default=400, description="sustained TFLOP/s of one GPU, for the estimate of GPU hours"
    )
    storage: StorageSettings = StorageSettings()
    limits: LimitSettings = LimitSettings()


class TransferSettings(JobSettings):
    """A manifest -> videos and result rows. Run it again to make only what is missing."""

    manifest: str = Field(description="manifest to run: a Parquet file, folder or prefix that plan wrote")
    output: str = Field(description="folder or prefix for videos/, results/ and run/")
    model: str = Field(default="wan-nano", description="where the weights are; must hold the revision that was planned")
    method: str | None = Field(default=None, description="only rows of this method")
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


class EvaluateSettings(JobSettings):
    """Results of runs -> metrics of every video, tables of methods. Run it again to measure only what is new."""

    run: list[str] = Field(min_length=1, description="output of a transfer; may be given several times")
    output: str = Field(description="folder or prefix for metrics/ and the tables")
    baseline: str = Field(default="none", description="method that differences are to")
    clip: str | None = Field(default=None, description="CLIP (folder, hub id, s3:// prefix), for text similarity")
    dino: str | None = Field(default=None, description="DINO ViT-B/16, for subject consistency")
    aesthetic_clip: str | None = Field(default=None, description="CLIP ViT-L/14, for aesthetic quality")
    aesthetic_head: str | None = Field(default=None, description="LAION's linear head, a safetensors file")
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="where the encoders run")
    measure: StageSettings = StageSettings(actors=2)
    rows_per_block: PositiveInt = Field(default=32, description="videos that are committed together")
    bootstrap: PositiveInt = Field(default=2000, description="draws of the intervals")
    storage: StorageSettings = StorageSettings()
    limits: LimitSettings = LimitSettings()
    ray: RaySettings = RaySettings()
    progress_s: PositiveFloat = Field(default=5, description="seconds between progress lines")


class BenchSettings(JobSettings):
    """Plan, tune, transfer, evaluate and report in one command. Run it again to go on."""

    suite: Literal["procedural", "folder"] = Field(
        default="procedural", description="procedural: the world's MotionBench, exact motion; folder: your clips"
    )
    clips: str | None = Field(
        default=None, description="suite folder: clips with prompts, a folder or a references table"
    )
    prompts: str | None = Field(default=None, description="suite folder: prompts for every clip, as in plan")
    quick: bool = Field(default=False, description="procedural: 2 clips x 1 prompt a category instead of 10 x 5")
    methods: CommaStrings = Field(
        default=("none", "ditflow", "fastvmt", "follow_your_motion"), description="methods, comma separated"
    )
    baseline: str = Field(default="none", description="method that differences are to")
    seeds: CommaInts = Field(default=(0,), description="seeds, comma separated")
    output: str = Field(description="folder or prefix of everything")
    model: str = Field(
        default="wan-nano", description="wan-nano, a local diffusers folder, a hub id, or an s3:// prefix"
    )
    preset: str | None = Field(default=None, description="methods' preset; empty: the model's own")
    method_settings: dict[str, dict[str, Any]] = Field(default_factory=dict, description="as in plan (YAML only)")
    sweep: dict[str, dict[str, list[Any]]] = Field(default_factory=dict, description="as in plan (YAML only)")
    height: PositiveInt | None = Field(default=None, description="pixels, a multiple of 16; empty: the model's own")
    width: PositiveInt | None = Field(default=None, description="pixels, a multiple of 16; empty: the model's own")
    frames: PositiveInt | None = Field(default=None, description="4k+1; empty: the model's own")
    steps: PositiveInt | None = Field(default=None, description="denoising steps; empty: the model's own")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: cuda where a stage has GPUs")
    clip: str | None = Field(default=None, description="CLIP, as in evaluate")
    dino: str | None = Field(default=None, description="DINO, as in evaluate")
    aesthetic_clip: str | None = Field(default=None, description="CLIP ViT-L/14, as in evaluate")
    aesthetic_head: str | None = Field(default=None, description="LAION's linear head, as in evaluate")
    encode: StageSettings = StageSettings()
    transfer: DenoiseSettings = DenoiseSettings()
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
    output: str = Field(description="folder or prefix for videos/, references/ and run/")
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
    def _videos_are_even(self) -> Self:
        for name in ("height", "width"):
            if getattr(self, name) % 2:
                raise ValueError(
                    f"{name}={getattr(self, name)} is odd, H.264 videos are even; use {getattr(self, name) + 1}"
                )
        return self


class TuneSettings(JobSettings):
    """References -> adapters, one training each, several at once. Run it again to make only what is missing."""

    references: str = Field(description="folder, glob, s3:// prefix, or a references table, with captions")
    output: str = Field(description="folder or prefix for adapters/, prepared/ and run/")
    method: str = Field(default="follow_your_motion", description="a method that is tuned")
    model: str = Field(
        default="wan-nano", description="wan-nano, a local diffusers folder, a hub id, or an s3:// prefix"
    )
    preset: str | None = Field(
        default=None, description="the method's preset: default, paper, code or nano; empty: the model's own"
    )
    tuning: dict[str, Any] = Field(
        default_factory=dict,
        description="settings of the method to change, e.g. {rank: 64, temporal: {steps: 500}} (YAML)",
    )
    caption: str | None = Field(default=None, description="of references that have none")
    height: PositiveInt | None = Field(default=None, description="pixels, a multiple of 16; empty: the model's own")
    width: PositiveInt | None = Field(default=None, description="pixels, a multiple of 16; empty: the model's own")
    frames: PositiveInt | None = Field(
        default=None, description="4k+1, fewer for shorter clips; empty: the model's own"
    )
    fps: PositiveFloat | None = Field(
        default=None, allow_inf_nan=False, description="sample references at this rate; empty: as each file has"
    )
    limit: PositiveInt | None = Field(default=None, description="tune on at most this many of the missing references")
    retry_failed: bool = Field(default=False, description="try failed references again")
    dry_run: bool = Field(default=False, description="say what would be trained, and what it would cost")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: cuda where the cluster has GPUs")
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
    output: str = Field(
        default="out/pretrain", description="folder or prefix for checkpoints, logs and the exported model"
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
    checkpoint_minutes: PositiveFloat = Field(default=5, description="minutes between checkpoints")
    storage: StorageSettings = StorageSettings()
    ray: RaySettings = RaySettings()
