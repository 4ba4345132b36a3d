"""The fleet: every reference is prepared once by Ray Data, then one Ray Train run each tunes its adapter, several at once.

OUT/prepared/<key>.safetensors                       latents and caption of a reference
OUT/adapters/method=…/<adapter_id>/                  see vmt_core/adapters/files.py
OUT/adapters/index/<adapter_id>.parquet              a row for each reference: what it was, how it ended
OUT/run/training/<adapter_id>/                       Ray Train's checkpoints, while it lasts
OUT/run/tensorboard/<adapter_id>/                    losses and gradients, step by step
OUT/run/samples/<adapter_id>/                        videos on the way, if asked for
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import ray
from pydantic import ValidationError

from pipelines import adapters, cluster, lock, models, parquet, progress
from pipelines.cluster import RunFailed
from pipelines.prepare import prepare_all
from pipelines.references import Clip, open_all, references
from pipelines.storage import Storage, absolute, describe, join
from schemas import AdapterRow, ErrorCode, Reference, RowError, StageSettings, TuneSettings, UsageError, first_fault
from vmt_core import flops
from vmt_core.adapters.settings import TUNING_VERSION, FollowYourMotion
from vmt_core.backbone.geometry import Geometry
from vmt_core.methods import METHODS
from vmt_core.presets import NANO, native

_SHOWN_BAD = 20
_SILENCE_S = 60  # the longest; a training takes minutes to hours
_HOPELESS = 5  # trainings that crash with none between them that ends otherwise: that is not because of the references
_OF_THE_MACHINE = {ErrorCode.CRASHED, ErrorCode.OUT_OF_MEMORY, ErrorCode.STORAGE_UNAVAILABLE}
_LOOK_S = 5  # between looks at the cluster
_MOST_AHEAD = 8  # trainings that wait for nodes to come; each is a process on the driver's node


def run(settings: TuneSettings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Tunes the missing adapters of all references; returns the summary that it also writes to OUT/run/summary.json.

    Raises:
        UsageError: what was asked cannot be done; nothing was made.
        RunFailed: it stopped before its end; the same command goes on from there.
    """
    storage = Storage(settings.storage)
    return tune(settings, storage, rows(settings, storage, say), say)


def rows(settings: TuneSettings, storage: Storage, say: Callable[[str], None]) -> list[AdapterRow]:
    """A row for every reference; what cannot be tuned on has failed already.

    Raises:
        UsageError: no method, model or reference to tune with.
    """
    tuning = method_tuning(settings, storage)
    try:
        revision = models.revision(settings.model, storage)
    except FileNotFoundError as error:
        raise UsageError(f"--model {error}") from error
    clips, bad = open_all(storage, settings, references(storage, settings.references), say)
    for _, error in bad[:_SHOWN_BAD]:
        say(f"bad clip: {error.code}: {error.message}")
    defaults = native(settings.model)
    common = {
        "method": settings.method,
        "tuning": tuning.model_dump_json(),
        "height": settings.height or defaults.height,
        "width": settings.width or defaults.width,
        "model": settings.model,
        "model_revision": revision,
        "tuning_version": TUNING_VERSION,
    }
    found = [_row(common, clip.reference, clip) for clip in clips]
    found += [_row(common, reference, None).model_copy(update=_failure(error)) for reference, error in bad]
    unique = {row.adapter_id: row for row in reversed(found)}
    if len(unique) < len(found):
        say(f"{len(found) - len(unique)} references are clips that stand there twice")
    return list(reversed(unique.values()))


def method_tuning(settings: TuneSettings, storage: Storage) -> FollowYourMotion:
    """The method's settings.

    Raises:
        UsageError: it is no method that is tuned, or a setting is wrong.
    """
    tuned = {name for name, make in METHODS.items() if make().adapter is not None}
    if settings.method not in tuned:
        raise UsageError(f"--method {settings.method!r} is not one of {', '.join(sorted(tuned))}")
    preset = settings.preset or native(settings.model).preset
    try:
        tuning = FollowYourMotion.preset(preset, **settings.tuning)
    except ValidationError as error:
        raise UsageError(f"tuning: {first_fault(error)}") from error
    except ValueError as error:
        raise UsageError(f"--preset {preset}: {error}") from error
    adapters.check_head_file(storage, tuning, settings.limits.schemes)
    return tuning


def tune(
    settings: TuneSettings, storage: Storage, wanted: list[AdapterRow], say: Callable[[str], None]
) -> dict[str, Any]:
    """Makes the adapters of rows that have none yet.

    Raises:
        RunFailed: some rows neither have an adapter now nor failed.
    """
    if settings.training.wandb and importlib.util.find_spec("wandb") is None:
        raise UsageError("--training.wandb: the package is not installed; pip install wandb")
    wanted = [_captioned(row) for row in wanted]
    config = models.config(settings.model, storage)
    # Workers of Ray Train have a directory of their own.
    settings = settings.model_copy(
        update={"output": absolute(settings.output), "model": models.anywhere(settings.model)}
    )
    _workers_share(wanted, settings.training.workers_per_reference)
    began, held = time.monotonic(), lock.held(storage, join(settings.output, "run", "lock.json"))
    with contextlib.nullcontext() if settings.dry_run else held:
        made = index(storage, settings.output)  # under the lock: another driver may have been at it
        done = {key: row for key, row in made.items() if row.status == "ok" or not settings.retry_failed}
        missing = [row for row in wanted if row.status == "planned" and row.adapter_id not in done]
        chosen = missing[: settings.limit]
        unfit = [row for row in wanted if row.status == "failed" and row.adapter_id not in done]
        before = len(wanted) - len(missing) - len(unfit)
        say(
            f"{len(wanted)} references, {before} done before, {len(chosen)} to tune now"
            + (f", {len(unfit)} unfit" if unfit else "")
        )
        say(estimate(chosen, config, settings))
        if settings.dry_run:
            for row in unfit[:_SHOWN_BAD]:
                say(f"unfit: {row.reference_uri}: {row.error_code}: {row.error_message}")
            return {"planned": len(chosen), "failed": 0}
        for adapter_id in {row.adapter_id for row in done.values() if row.status == "ok"} & _kept(settings, storage):
            _forget(settings, storage, adapter_id)  # a driver was killed before it could
        made |= {row.adapter_id: _keep(storage, settings.output, row) for row in unfit}
        if chosen:
            made |= {row.adapter_id: row for row in _make(settings, storage, chosen, say)}
    ended = [made[row.adapter_id] for row in wanted if row.adapter_id in made]
    failed: dict[str, int] = {}
    for row in ended:
        if row.status == "failed":
            failed[str(row.error_code)] = failed.get(str(row.error_code), 0) + 1
    summary = {
        "title": "Tuning",
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - began, 3),
        "model": settings.model,
        "method": settings.method,
        "selected": len(wanted),
        "ok": sum(row.status == "ok" for row in ended),
        "failed": sum(failed.values()),
        "left": len(wanted) - len(ended),
        "failed_by_code": failed,
    }
    storage.write(join(settings.output, "run", "summary.json"), json.dumps(summary, indent=2).encode())
    for row in [row for row in ended if row.status == "failed"][:_SHOWN_BAD]:
        say(f"failed: {row.reference_uri}: {row.error_code}: {row.error_message}")
    say(
        f"{summary['ok']} adapters, {summary['failed']} failed, {summary['left']} left, "
        f"{progress.duration(time.monotonic() - began)} in this run"
    )
    say(f"adapters  {join(settings.output, 'adapters')}")
    if summary["left"] > len(missing) - len(chosen):  # less where a row that failed before waits for its turn
        raise RunFailed(f"{summary['left']} references were not finished; the same command goes on from there")
    return summary


def _make(
    settings: TuneSettings, storage: Storage, chosen: list[AdapterRow], say: Callable[[str], None]
) -> list[AdapterRow]:
    """Prepares and trains on the chosen rows; each ends in the index, and is given back as it stands there."""
    gpus = uses_gpus(settings)
    worker = StageSettings(
        actors=settings.training.workers_per_reference, cpus=settings.training.cpus_per_worker, gpus=float(gpus)
    )
    if worker.gpus and not settings.training.prepare.gpus:
        say("note: training.prepare.gpus=0: references are encoded on CPUs, which is slow")
    with cluster.connected(settings.ray, (settings.training.prepare,), (worker,)):
        storage.write(join(settings.output, "run", "settings.json"), settings.model_dump_json(indent=2).encode())
        ready = prepare_all(settings, storage, chosen, say)
        unready = [_keep(storage, settings.output, row) for row in ready if row.status == "failed"]
        fit = [row for row in ready if row.status == "planned"]
        return unready + _train_all(settings, storage, fit, say, gpus=gpus)


def _captioned(row: AdapterRow) -> AdapterRow:
    """The row, failed if there is nothing to tell the model of the clip."""
    if row.status == "failed" or row.caption.strip():
        return row
    error = RowError(
        ErrorCode.CAPTION_EMPTY, f"{row.reference_uri}: has no caption; give one in a references table (column caption)"
    )
    return row.model_copy(update=_failure(error))


def _workers_share(wanted: list[AdapterRow], workers: int) -> None:
    for text in {row.tuning for row in wanted}:
        tuning = FollowYourMotion.model_validate_json(text)
        for name, schedule in {"spatial": tuning.spatial, "temporal": tuning.temporal}.items():
            if schedule.draws % workers:
                raise UsageError(
                    f"training.workers_per_reference={workers}: {schedule.draws} draws a step cannot be shared evenly by {workers} "
                    f"workers; set {name}.draws to a multiple of {workers}"
                )


def index(storage: Storage, output: str) -> dict[str, AdapterRow]:
    """What became of every reference so far, by adapter id."""
    return adapters.index(storage, join(output, "adapters"))


def uses_gpus(settings: TuneSettings) -> bool:
    """Whether workers have GPUs; `auto` asks this machine.

    Raises:
        UsageError: this machine has none, but a cluster's nodes may, and the model is no small one.
    """
    if settings.device != "auto":
        return settings.device == "cuda"
    import torch

    if not torch.cuda.is_available() and cluster.address_of(settings.ray) and native(settings.model) is not NANO:
        raise UsageError("--device auto: no GPU is seen from here; say cuda or cpu, for the nodes of the cluster")
    return torch.cuda.is_available()


def estimate(chosen: list[AdapterRow], config: dict[str, Any], settings: TuneSettings) -> str:
    """Steps, FLOPs and time of what is to be trained, in a line."""
    total, steps, memory = 0.0, 0, 0.0
    for row in chosen:
        tuning = FollowYourMotion.model_validate_json(row.tuning)
        clip = Geometry.of_latents(
            ((row.frames - 1) // 4 + 1, row.height // 8, row.width // 8), tuple(config["patch_size"])
        )
        cost = flops.tuning(config, clip, tuning)
        total += cost.flops
        steps += tuning.spatial.steps + tuning.temporal.steps
        memory = max(memory, cost.parameters)
    return (
        f"estimate: {steps:,} steps, {total:.3g} FLOPs, {progress.gpu_time(total, settings.tflops)}, "
        f"{memory / 1e6:,.3g} M trained weights an adapter "
        f"({16 * memory / 2**30:.2g} GiB with gradients and optimizer)"
    )


def _row(common: dict[str, Any], reference: Reference, clip: Clip | None) -> AdapterRow:
    try:
        return AdapterRow.planned(
            **common,
            reference_uri=absolute(reference.uri).encode(errors="backslashreplace").decode(),
            reference_digest=clip.digest if clip else f"unread {reference.uri}",
            start_frame=reference.start_frame,
            end_frame=reference.end_frame,
            fps=clip.fps if clip else reference.fps or 1.0,
            frames=clip.frames if clip else 0,
            caption=reference.caption or "",
            category=reference.category,
        )
    except ValidationError as error:
        raise UsageError(first_fault(error)) from error


def _failure(error: RowError) -> dict[str, Any]:
    return {"status": "failed", "error_code": error.code, "error_message": error.message[:2000]}


def _keep(storage: Storage, output: str, row: AdapterRow) -> AdapterRow:
    """Writes a row into the index; returns it as it stands there."""
    row = row.model_copy(update={"finished_at": datetime.now(UTC).isoformat(timespec="seconds")})
    table = pa.Table.from_pylist([row.model_dump()], schema=AdapterRow.arrow_schema())
    parquet.write(storage, adapters.index_file(join(output, "adapters"), row.adapter_id), table)
    return row


def _kept(settings: TuneSettings, storage: Storage) -> set[str]:
    """Adapters that there are checkpoints of."""
    place = join(settings.output, "run", "training")
    return {uri.removeprefix(place).lstrip("/").split("/")[0] for uri in storage.find(place)}


def _forget(settings: TuneSettings, storage: Storage, adapter_id: str) -> None:
    """Deletes the checkpoints of an adapter that is whole and stands in the index."""
    storage.delete_all(storage.find(join(settings.output, "run", "training", adapter_id)))


def _train_all(
    settings: TuneSettings, storage: Storage, chosen: list[AdapterRow], say: Callable[[str], None], *, gpus: bool
) -> list[AdapterRow]:
    """Trains on every row, as many at once as there is room for; each ends in the index, and is given back as it stands there."""
    from pipelines.training import train_adapter  # brings torch

    began, stopping, telling = time.monotonic(), threading.Event(), threading.Lock()
    ended: list[AdapterRow] = []
    told, crashes = began, 0

    def one(row: AdapterRow) -> None:
        try:
            finished = row.model_copy(update={"status": "ok", **train_adapter(settings, storage, row, gpus=gpus)})
        except RowError as error:
            if stopping.is_set():  # Ray was shut down under it: that says nothing of the reference
                return
            finished = row.model_copy(update=_failure(error))
        finished = _keep(storage, settings.output, finished)
        if finished.status == "ok":
            _forget(settings, storage, row.adapter_id)
        nonlocal crashes
        with telling:
            ended.append(finished)
            crashes = crashes + 1 if finished.error_code in _OF_THE_MACHINE else 0
            tell()

    def tell() -> None:
        nonlocal told
        told = time.monotonic()
        seconds, failed = told - began, sum(row.status == "failed" for row in ended)
        left = progress.duration((len(chosen) - len(ended)) * seconds / len(ended)) if ended else "?"
        say(
            f"{len(ended)}/{len(chosen)} references  {60 * len(ended) / seconds:.2f}/min  {left} left  {failed} failed  "
            f"after {progress.duration(seconds)}"
        )

    pool = ThreadPoolExecutor(max_workers=max(1, len(chosen)), thread_name_prefix="tune")
    waiting, running, room = deque(chosen), set[Future[None]](), 0
    try:
        while waiting or running:
            if waiting and (found := _room(settings, gpus=gpus)) != room:  # nodes come and go
                room = found
                say(f"{len(waiting) + len(running)} to train, {min(room, len(waiting) + len(running))} at once")
            while waiting and len(running) < room + _ahead(settings, room):
                running.add(pool.submit(one, waiting.popleft()))
            over, running = wait(running, timeout=_LOOK_S, return_when=FIRST_COMPLETED)
            for future in over:
                future.result()
            if crashes >= _HOPELESS and (waiting or running):
                last = ended[-1]
                raise RunFailed(
                    f"{crashes} trainings one after the other ended with a fault of the machine or of the settings, the last with "
                    f"{last.error_code}: {last.error_message}; see to that, then the same command with --retry-failed goes on from there"
                )
            with telling:
                if time.monotonic() - told >= max(_SILENCE_S, settings.progress_s):
                    tell()
    except BaseException as error:
        stopping.set()
        if isinstance(error, Exception) and not isinstance(error, RunFailed):
            raise RunFailed(f"{describe(error)}; the same command goes on from there") from error
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # what still runs ends with Ray
    return ended


def _room(settings: TuneSettings, *, gpus: bool) -> int:
    """How many trainings fit into the cluster as it is now, or as many as the settings say."""
    if settings.training.at_once:
        return settings.training.at_once
    each = settings.training.workers_per_reference
    room = cluster.cpus(settings.ray) / (each * settings.training.cpus_per_worker)
    if gpus:
        room = min(room, ray.cluster_resources().get("GPU", 0) / each)
    return max(1, int(room))


def _ahead(settings: TuneSettings, room: int) -> int:
    """Trainings that are begun beyond that: they wait in Ray for a place, which is what an autoscaler adds nodes for."""
    return 0 if settings.training.at_once or not cluster.address_of(settings.ray) else min(room, _MOST_AHEAD)
