"""Every reference is read, encoded and described once, by Ray Data, into a cache that is addressed by content."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from pipelines import cluster, models, tracker
from pipelines.storage import Storage, StorageUnavailable, check_scheme, describe, join
from pipelines.watch import watched
from schemas import AdapterRow, RowError, TuneSettings
from schemas.errors import ErrorCode
from vmt_core import video
from vmt_core.adapters.settings import FollowYourMotion
from vmt_core.faults import out_of_memory
from vmt_core.shapes import Frames

_DECIDES = (
    "reference_digest", "start_frame", "end_frame", "fps", "height", "width", "frames", "caption", "model_revision",
    "tuning_version",
)  # fmt: skip
_OUTCOME = ("status", "error_code", "error_message")


def place(output: str, row: AdapterRow) -> str:
    """Where a row's prepared reference lies: the same for all settings of the tuning that do not change it."""
    values = {name: getattr(row, name) for name in _DECIDES}
    values["stride"] = _stride(row)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]
    return join(output, "prepared", f"{digest}.safetensors")


def _stride(row: AdapterRow) -> int | None:
    """Of the thinned clip, where the tuning has use for one."""
    tuning = FollowYourMotion.model_validate_json(row.tuning)
    return tuning.stride if tuning.sparse == "pixel" else None


def prepare_all(
    settings: TuneSettings, storage: Storage, rows: list[AdapterRow], say: Callable[[str], None]
) -> list[AdapterRow]:
    """Prepares what is not prepared yet; the rows come back, some of them failed."""
    there = set(storage.find(join(settings.output, "prepared")))
    places = [place(settings.output, row) for row in rows]
    missing = {uri: row for uri, row in zip(places, rows, strict=True) if uri not in there}  # one for all that share it
    if not missing:
        return rows
    say(f"{len(missing)} references to prepare")
    context = cluster.quiet_data()
    # ours is first
    context.execution_no_progress_timeout_s = 10 * (settings.limits.row_seconds + settings.ray.stall_s)
    table = pa.Table.from_pylist([row.model_dump() for row in missing.values()], schema=AdapterRow.arrow_schema())
    run = tracker.start()
    data = (
        ray.data.from_arrow(table)
        .repartition(target_num_rows_per_block=1)
        .map_batches(
            Prepare,
            fn_constructor_args=(settings, run),
            batch_size=1,
            batch_format="pyarrow",
            **cluster.pool(settings.training.prepare, len(missing)),
        )
    )
    ended: list[AdapterRow] = []

    def collect() -> None:
        ended.extend(AdapterRow.model_validate(row) for row in data.iter_rows())

    watched(
        collect,
        run,
        (settings.training.prepare,),
        tell=lambda _: say(f"{len(ended)}/{len(missing)} references prepared"),
        progress_s=settings.progress_s,
        stall_s=settings.ray.stall_s,
    )
    outcomes = {place(settings.output, row): {name: getattr(row, name) for name in _OUTCOME} for row in ended}
    return [row.model_copy(update=outcomes.get(uri, {})) for uri, row in zip(places, rows, strict=True)]


class Prepare:
    """An actor with the VAE and the text encoder."""

    def __init__(self, settings: TuneSettings, tracker_of_run: Any) -> None:
        import torch

        from vmt_core.backbone.wan import Backbone

        torch.set_num_threads(settings.training.prepare.threads or max(1, int(settings.training.prepare.cpus)))
        self.settings, self.storage = settings, Storage(settings.storage)
        here = ray.get_runtime_context().get_node_id()
        self.guard = tracker.Guard(tracker_of_run, "prepare", here, settings.limits.row_seconds)
        path = models.local(settings.model, self.storage)
        device = "cuda" if settings.training.prepare.gpus else "cpu"
        self.backbone = Backbone.load(path, parts=("vae", "text"), device=device)

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = [AdapterRow.model_validate(values) for values in table.to_pylist()]
        done = [self._prepare(row) for row in rows]
        return pa.Table.from_pylist([row.model_dump() for row in done], schema=AdapterRow.arrow_schema())

    def _prepare(self, row: AdapterRow) -> AdapterRow:
        from vmt_core.adapters.follow_your_motion import prepare

        failure: dict[str, Any]
        try:
            with self.guard.row(row.adapter_id), tempfile.TemporaryDirectory(prefix="vmt-") as folder:
                clip, file = Path(folder) / "reference", Path(folder) / "prepared.safetensors"
                frames = self._read(row, clip)
                prepare(self.backbone, frames, row.caption, _stride(row)).save(file)
                self.storage.put(file, place(self.settings.output, row))
                return row
        except RowError as error:
            failure = {"error_code": error.code, "error_message": error.message[:2000]}
        except StorageUnavailable as error:
            failure = {"error_code": ErrorCode.STORAGE_UNAVAILABLE, "error_message": str(error)[:2000]}
        except Exception as error:
            code = ErrorCode.OUT_OF_MEMORY if out_of_memory(error) else ErrorCode.INTERNAL
            failure = {"error_code": code, "error_message": describe(error)[:2000]}
        return row.model_copy(update={"status": "failed", **failure})

    def _read(self, row: AdapterRow, clip: Path) -> Frames:
        limits = self.settings.limits
        check_scheme(row.reference_uri, limits.schemes)
        try:
            most = limits.max_reference_mib * 2**20
            self.storage.fetch(row.reference_uri, clip, most_bytes=most, digest=row.reference_digest)
            return video.read(
                clip,
                height=row.height,
                width=row.width,
                frames=row.frames,
                fps=row.fps,
                start=row.start_frame,
                end=row.end_frame,
                limits=limits,
            )
        except RowError as error:
            raise error.renamed(clip, row.reference_uri) from error
