"""The actor of the evaluation: reads a result's video and its reference, computes every metric there is a way to, commits its block.

A block's rows are written by the actor itself, at a name that follows from them, so a block that is made twice overwrites itself.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch
from pydantic import ValidationError

from pipelines import models, parquet
from pipelines.stage import Cache
from pipelines.storage import Storage, StorageUnavailable, describe, join
from pipelines.tracker import Guard
from schemas import EvaluateSettings, MeasuringSettings, MetricRow, RowError
from vmt_core import video
from vmt_core.faults import out_of_memory
from vmt_core.metrics import encoders, noncommercial
from vmt_core.metrics.motion import packed
from vmt_core.metrics.suite import VERSIONS, Reference, Suite, Video
from vmt_core.shapes import Frames
from vmt_core.world import Scene

T = TypeVar("T")
_COMMON = (
    "sample_id", "method", "method_settings", "prompt", "seed", "category", "reference_uri", "reference_digest", "video_uri",
    "model", "model_revision", "evaluations",
)  # fmt: skip
_MOST_WEIGHTS = 2**30  # bytes of a file of weights
_SECONDS = ("seconds_encode", "seconds_transfer", "seconds_finish")
_SAMPLING = (
    "steps",
    "shift",
    "guidance_scale",
    "negative_prompt",
    "height",
    "width",
    "dtype",
    "model_revision",
    "video_version",
)
#: What decides a video beside the method.
_PAIR = (
    "reference_digest",
    "start_frame",
    "end_frame",
    "fps",
    "frames",
    "prompt",
    "seed",
    *_SAMPLING,
)
#: Columns of a result row that are needed.
COLUMNS = tuple(dict.fromkeys((*_COMMON, *_PAIR, *_SECONDS, "error_code", "error_message", "reference_video_uri")))


def pair_of(row: Mapping[str, Any]) -> str:
    """The same for videos that nothing but their method sets apart."""
    return hashlib.sha256(json.dumps([row[name] for name in _PAIR]).encode()).hexdigest()[:32]


def suite_of(settings: EvaluateSettings) -> str:
    """What decides the values: versions of the metrics, and the models; JSON."""
    given = {name: getattr(settings, name) for name in MeasuringSettings.model_fields}
    return json.dumps(
        {"metrics": VERSIONS, "models": given, "rows": 3}, sort_keys=True
    )  # 3: pair and sampling name weights and code


def folder_of(settings: EvaluateSettings) -> str:
    """Where the metrics of this suite lie; those of another one stay beside."""
    digest = hashlib.sha256(suite_of(settings).encode()).hexdigest()[:12]
    return join(settings.output, "metrics", f"suite_id={digest}")


def unmeasured(table: pa.Table, done: Collection[str]) -> pa.Table:
    """The result rows that are not measured yet."""
    return table.filter(pc.invert(pc.is_in(table["sample_id"], pa.array(done, pa.string()))))


class Measure:
    """Loads the encoders that were given once; then batches of result rows become metric rows."""

    def __init__(self, settings: EvaluateSettings, run: str, tracker: Any) -> None:
        torch.set_num_threads(settings.measure.threads or max(1, int(settings.measure.cpus)))
        self.settings, self.run = settings, run
        self.storage = Storage(settings.storage)
        self.references: Cache[Reference] = Cache(4)
        self.guard = Guard(tracker, run, ray.get_runtime_context().get_node_id(), settings.limits.row_seconds)
        self.suite = Suite(
            clip=self._clip(settings.clip),
            dino=encoders.Dino(models.local(settings.dino, self.storage), settings.device) if settings.dino else None,
            aesthetic_clip=self._clip(settings.aesthetic_clip),
            aesthetic_head=self._from_file(encoders.AestheticHead, settings.aesthetic_head),
            cotracker=self._from_file(partial(noncommercial.CoTracker, device=settings.device), settings.cotracker),
            amt=self._from_file(partial(noncommercial.Amt, device=settings.device), settings.amt),
        )

    def __call__(self, table: pa.Table) -> pa.Table:
        measured = [self._measure(row) for row in table.to_pylist()]
        if measured:
            made = pa.Table.from_pylist([row.model_dump() for row in measured], schema=MetricRow.arrow_schema())
            digest = hashlib.sha256("".join(row.run + row.sample_id for row in measured).encode()).hexdigest()[:24]
            parquet.write(self.storage, join(folder_of(self.settings), f"{digest}.parquet"), made)
        failed = sum(row.status == "failed" for row in measured)
        return pa.table({"measured": [len(measured)], "failed": [failed]})

    def _measure(self, row: dict[str, Any]) -> MetricRow:
        seconds = [row[name] for name in _SECONDS if row[name] is not None]
        common = {name: row[name] for name in _COMMON} | {
            "run": self.run,
            "pair": pair_of(row),
            "sampling": json.dumps({name: row[name] for name in _SAMPLING}),
            "seconds": sum(seconds) if seconds else None,
            "suite": suite_of(self.settings),
        }
        if row["error_code"] is not None:
            return MetricRow(
                **common, status="failed", error_code=row["error_code"], error_message=row["error_message"]
            )
        try:
            with self.guard.row(row["sample_id"]):
                with tempfile.TemporaryDirectory(prefix="vmt-") as folder:
                    frames, _ = self._read(row, row["video_uri"], Path(folder) / "video.mp4")
                seen = ("reference_video_uri", "height", "width", "frames", "fps", "start_frame")
                reference = self.references.get(tuple(row[name] for name in seen), lambda: self._reference(row))
                about = Video(frames, reference, row["prompt"])
                values, reasons = self.suite.measure(about)
                tracks = {"tracks": about.tracks, "reference_tracks": reference.tracks}
                drawn = {name: packed(found, *frames.shape[-2:]) for name, found in tracks.items()}
        except RowError as error:
            return MetricRow(**common, status="failed", error_code=error.code.value, error_message=error.message[:2000])
        except StorageUnavailable as error:
            return MetricRow(
                **common, status="failed", error_code="storage_unavailable", error_message=str(error)[:2000]
            )
        except Exception as error:
            code = "out_of_memory" if out_of_memory(error) else "internal"
            return MetricRow(**common, status="failed", error_code=code, error_message=describe(error)[:2000])
        exact = reference.scene is not None
        return MetricRow(**common, **values, **drawn, status="ok", exact=exact, absent=json.dumps(reasons))

    def _reference(self, row: dict[str, Any]) -> Reference:
        with tempfile.TemporaryDirectory(prefix="vmt-") as folder:
            frames, tags = self._read(row, row["reference_video_uri"], Path(folder) / "reference.mp4")
        return Reference(frames, _scene(row, tags))

    def _read(self, row: dict[str, Any], uri: str, local: Path) -> tuple[Frames, dict[str, str]]:
        limits = self.settings.limits
        try:
            self.storage.fetch(uri, local, most_bytes=limits.max_reference_mib * 2**20)
            frames = video.read(
                local, height=row["height"], width=row["width"], frames=row["frames"], fps=row["fps"], limits=limits
            )
            return frames, video.tags(local)
        except RowError as error:
            raise error.renamed(local, uri) from error

    def _clip(self, model: str | None) -> encoders.Clip | None:
        return encoders.Clip(models.local(model, self.storage), self.settings.device) if model else None

    def _from_file(self, load: Callable[[Path], T], uri: str | None) -> T | None:
        if uri is None:
            return None
        with tempfile.TemporaryDirectory(prefix="vmt-") as folder:
            self.storage.fetch(uri, Path(folder) / "weights.safetensors", most_bytes=_MOST_WEIGHTS)
            return load(Path(folder) / "weights.safetensors")


def _scene(row: dict[str, Any], tags: dict[str, str]) -> Scene | None:
    """The scene of a procedural reference, at the size of the video, if the video saw all of it from its start."""
    try:
        scene = Scene.model_validate_json(tags["scene"])
    except (KeyError, ValidationError):
        return None
    whole = row["start_frame"] == 0 and abs(scene.fps - row["fps"]) < 1e-3 and scene.frames == row["frames"]
    if not whole or scene.height * row["width"] != scene.width * row["height"]:
        return None
    return scene.model_copy(update={"height": row["height"], "width": row["width"]})
