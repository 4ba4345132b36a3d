"""The rows that flow: a reference, a manifest row (one video to make), a result row (what became of it).

`arrow_schema` derives the Parquet schema of each, so that the pydantic model is the only definition.
"""

from __future__ import annotations

import hashlib
import json
import types
from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from schemas.errors import ErrorCode
from schemas.sections import Seed

SAMPLE_ID_PATTERN = r"^[0-9a-f]{32}$"
#: Of a video, as far as Wan's table of positions goes: 1024 latents of four frames, 1024 tokens of 16 pixels a side.
MOST_FRAMES, MOST_SIDE = 4093, 16_384


class Row(BaseModel):
    """A flat row of scalars; unknown columns are an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @classmethod
    def arrow_schema(cls) -> pa.Schema:
        """The Arrow schema of the row: one field per model field, nullable where the model allows None."""
        return pa.schema([_arrow_field(name, field.annotation) for name, field in cls.model_fields.items()])


class Reference(Row):
    """A clip to take motion from, as a user lists it in a references table. Only `uri` is required."""

    uri: str = Field(description="path or URL of the video")
    start_frame: int = Field(default=0, ge=0, lt=2**31, description="first frame that counts, in frames of the file")
    end_frame: int | None = Field(
        default=None, ge=1, lt=2**31, description="one past the last frame that counts; empty: to the end"
    )
    fps: float | None = Field(
        default=None,
        gt=0,
        le=240,
        allow_inf_nan=False,
        description="frames per second to sample at; empty: as the file has",
    )
    caption: str | None = Field(default=None, description="what the clip shows")
    prompts: str | None = Field(default=None, description="prompts of its own, one a line; beside those of --prompts")
    category: str | None = Field(default=None, description="kind of motion, for tables and filters")
    licence: str | None = Field(default=None, description="licence of the clip, carried through to the result")

    @field_validator("prompts", mode="before")
    @classmethod
    def _prompts_may_be_a_list(cls, prompts: Any) -> Any:
        if isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts):
            return "\n".join(" ".join(prompt.split()) for prompt in prompts)
        return prompts

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> Self:
        if self.end_frame is not None and self.end_frame <= self.start_frame:
            raise ValueError(f"end_frame={self.end_frame} is not after start_frame={self.start_frame}")
        return self


class WorldClip(Reference):
    """A procedural clip that was made. A valid reference; what it shows follows from `scene` alone."""

    clip_id: str = Field(description="digest of the scene")
    seed: int = Field(description="what the scene was sampled from")
    split: Literal["train", "val", "test"]
    motion: str = Field(description="kind of motion within the category")
    motion_caption: str = Field(description="how it moves, in words; `caption` says only what is seen")
    scene: str = Field(description="JSON of vmt_core.world.Scene")
    height: int
    width: int
    frames: int
    video_bytes: int
    video_sha256: str


class ManifestRow(Row):
    """One video to make. `sample_id` is the digest of all that decides the video (see `decides`)."""

    sample_id: str = Field(pattern=SAMPLE_ID_PATTERN)
    reference_uri: str
    reference_digest: str = Field(description="SHA-256 of the file's bytes")
    start_frame: int = Field(ge=0)
    end_frame: int | None = None
    fps: float = Field(
        gt=0, allow_inf_nan=False, description="frames per second of the sampled reference and of the result"
    )
    height: int = Field(ge=16, le=MOST_SIDE, multiple_of=16)
    width: int = Field(ge=16, le=MOST_SIDE, multiple_of=16)
    frames: int = Field(ge=5, le=MOST_FRAMES, description="4k+1")
    prompt: str
    negative_prompt: str = ""
    method: str = Field(pattern=r"^[a-z0-9_]{1,64}$")
    method_settings: str = Field(default="{}", description="JSON, complete: every setting of the method")
    seed: Seed
    steps: int = Field(ge=1, le=1000)
    shift: float = Field(gt=0, le=1000, allow_inf_nan=False)
    guidance_scale: float = Field(ge=0, le=1000, allow_inf_nan=False)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    model: str
    model_revision: str
    video_version: int = Field(ge=1, description="bumped when a change of the code alters the videos")
    adapter_id: str | None = Field(default=None, description="of a tuned method: the adapter that is needed")
    caption: str | None = None
    category: str | None = None
    licence: str | None = None

    @model_validator(mode="after")
    def _frames_fit_the_vae(self) -> Self:
        if self.frames % 4 != 1:
            low = self.frames - (self.frames - 1) % 4
            raise ValueError(f"frames={self.frames} is not 4k+1; use {low} or {low + 4}")
        return self

    @model_validator(mode="after")
    def _text_can_be_stored(self) -> Self:
        _storable(self, ManifestRow.model_fields)
        return self

    @classmethod
    def planned(cls, **values: Any) -> Self:
        """A row with its `sample_id` computed from the other values."""
        row = cls(sample_id="0" * 32, **values)
        return row.model_copy(update={"sample_id": sample_id(row.model_dump())})  # of its values, not of 12 for 12.0


def _storable(row: Row, names: Iterable[str]) -> None:
    """Raises ValueError where a text is no valid Unicode, as half an emoji is, which Parquet cannot hold."""
    for name in names:
        try:
            str(getattr(row, name)).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name}: {getattr(row, name)!r:.60} is no valid Unicode") from error


#: Columns that say where something lies or what it is called, but do not change the video.
NOT_DECISIVE = frozenset({"sample_id", "reference_uri", "model", "caption", "category", "licence"})


#: Columns that came later count only where they have a value, so that ids of before stay what they were.
_LATER = frozenset({"adapter_id"})


def sample_id(values: dict[str, Any]) -> str:
    """The identity of a video: 128 bits of SHA-256 over every deciding column, in a canonical JSON.

    Missing columns count with the model's default, so that old manifests keep their ids.
    """
    decides = {
        name: values.get(name, field.default)
        for name, field in ManifestRow.model_fields.items()
        if name not in NOT_DECISIVE and not (name in _LATER and values.get(name) is None)
    }
    return _digest(decides)


def _digest(values: dict[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class AdapterRow(Row):
    """An adapter that was tuned on a reference, or why there is none. `adapter_id` is the digest of all that decides it."""

    adapter_id: str = Field(pattern=SAMPLE_ID_PATTERN)
    method: str
    tuning: str = Field(description="JSON, complete: every setting of the tuning")
    reference_uri: str
    reference_digest: str
    start_frame: int = Field(ge=0)
    end_frame: int | None = None
    fps: float = Field(gt=0, allow_inf_nan=False)
    height: int = Field(ge=16, le=MOST_SIDE, multiple_of=16)
    width: int = Field(ge=16, le=MOST_SIDE, multiple_of=16)
    frames: int = Field(ge=0, le=MOST_FRAMES, description="4k+1; 0 where the clip could not be opened")
    caption: str
    model: str
    model_revision: str
    tuning_version: int = Field(ge=1, description="bumped when a change of the code alters the adapters")
    category: str | None = None
    status: Literal["planned", "ok", "failed"] = "planned"
    error_code: ErrorCode | None = None
    error_message: str | None = None
    folder: str | None = Field(default=None, description="where its files lie")
    workers: int | None = None
    spatial_steps: int | None = None
    temporal_steps: int | None = None
    spatial_loss: float | None = Field(default=None, description="last validation loss")
    temporal_loss: float | None = None
    seconds: float | None = Field(default=None, description="of the training, without the start of its workers")
    finished_at: str | None = None
    dtype: str | None = Field(default=None, description="precision of the base model in the training")

    @model_validator(mode="after")
    def _text_can_be_stored(self) -> Self:
        _storable(self, ("reference_uri", "caption", "category", "model"))
        return self

    @classmethod
    def planned(cls, **values: Any) -> Self:
        """A row with its `adapter_id` computed from the other values."""
        row = cls(adapter_id="0" * 32, **values)
        return row.model_copy(update={"adapter_id": adapter_id(row.model_dump())})


#: Columns of an AdapterRow that its id is the digest of.
ADAPTER_DECIDES = (
    "method", "tuning", "reference_digest", "start_frame", "end_frame", "fps", "height", "width", "frames", "caption",
    "model_revision", "tuning_version",
)  # fmt: skip


def adapter_id(values: dict[str, Any]) -> str:
    """The identity of an adapter: 128 bits of SHA-256 over every deciding column, in a canonical JSON."""
    return _digest({name: values[name] for name in ADAPTER_DECIDES})


class ResultRow(ManifestRow):
    """What became of a manifest row: its columns, and how it ended. The table's only truth about what is done."""

    status: Literal["ok", "failed"]
    error_code: ErrorCode | None = None
    error_message: str | None = None
    stage: Literal["encode", "transfer", "finish"] | None = Field(default=None, description="where it failed")
    attempts: int = Field(default=1, ge=1, description="times that work on the row began, worker deaths included")
    notes: str | None = Field(default=None, description="repairs that did not fail the row, such as a smaller batch")
    reference_video_uri: str | None = Field(
        default=None, description="the reference as the model saw it: cropped, resampled"
    )
    video_uri: str | None = None
    video_bytes: int | None = None
    video_sha256: str | None = None
    seconds_encode: float | None = None
    seconds_transfer: float | None = Field(default=None, description="the row's share of its batch")
    seconds_finish: float | None = None
    evaluations: int | None = Field(
        default=None, description="guidance gradients computed, each one forward + backward"
    )
    denoiser_calls: int | None = Field(default=None, description="full forwards of the denoiser")
    skipped_gradients: int | None = Field(default=None, description="non-finite gradients that were not applied")
    guidance_loss_first: float | None = None
    guidance_loss_last: float | None = None
    versions: str = Field(default="{}", description="JSON: versions of the packages that made the video")
    run_id: str = ""
    finished_at: str = Field(default="", description="UTC, ISO 8601")

    @model_validator(mode="after")
    def _failed_rows_say_why(self) -> Self:
        if self.status == "failed" and (self.error_code is None or not self.error_message):
            raise ValueError("a failed row needs error_code and error_message")
        if self.status == "ok" and self.video_uri is None:
            raise ValueError("an ok row needs video_uri")
        return self


class MetricRow(Row):
    """What was measured of a result row; null where there is no value, `absent` says why."""

    sample_id: str = Field(pattern=SAMPLE_ID_PATTERN)
    run: str = Field(description="output of the run")
    status: Literal["ok", "failed"] = Field(description="failed: the video was not made, or could not be measured")
    error_code: str | None = None
    error_message: str | None = None
    method: str
    method_settings: str
    prompt: str
    seed: int
    category: str | None = None
    reference_uri: str
    reference_digest: str
    video_uri: str | None = None
    model: str
    model_revision: str
    pair: str = Field(
        description="digest of what methods have in common that are compared: clip, prompt, seed, sampling"
    )
    sampling: str = Field(description="JSON: steps, sizes and scales, which a method's videos share that are averaged")
    seconds: float | None = Field(default=None, description="of all stages, the tuning not counted")
    evaluations: int | None = None
    motion: float | None = None
    motion_followed: float | None = Field(default=None, description="share of what moves that `motion` is a mean of")
    motion_matched: float | None = None
    moving: float | None = None
    moving_reference: float | None = None
    smoothness: float | None = None
    flow_consistency: float | None = None
    background_leak: float | None = None
    text_similarity: float | None = None
    temporal_consistency: float | None = None
    subject_consistency: float | None = None
    background_consistency: float | None = None
    aesthetic_quality: float | None = None
    motion_fidelity: float | None = None
    motion_smoothness: float | None = None
    exact: bool = Field(default=False, description="the reference's motion is known exactly")
    tracks: str | None = Field(
        default=None, description="of some points, for the eye: see vmt_core.metrics.motion.packed"
    )
    reference_tracks: str | None = Field(default=None, description="the same of the reference")
    absent: str = Field(default="{}", description="JSON: metric -> why there is no value")
    suite: str = Field(default="{}", description="JSON: metric -> version, and the models that were used")


_ARROW_TYPES: dict[type, pa.DataType] = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}


def _arrow_field(name: str, annotation: Any) -> pa.Field:
    """One Arrow field from a scalar annotation; Optional makes it nullable, enums and literals are strings."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    nullable = False
    if get_origin(annotation) in (Union, types.UnionType):
        options = [option for option in get_args(annotation) if option is not type(None)]
        nullable = len(options) < len(get_args(annotation))
        (annotation,) = options
    if get_origin(annotation) is Literal or (isinstance(annotation, type) and issubclass(annotation, StrEnum)):
        annotation = str
    if annotation not in _ARROW_TYPES:
        raise TypeError(f"{name}: a row holds scalars only, not {annotation}")
    return pa.field(name, _ARROW_TYPES[annotation], nullable=nullable)
