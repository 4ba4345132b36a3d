"""One run of the main job: check everything that can be checked, stream what is missing through the actors, account for every row."""

from __future__ import annotations

import contextlib
import importlib
import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import ray
from ray.data import Dataset
from ray.data.checkpoint import CheckpointConfig

from pipelines import adapters, cluster, lock, manifest, models, progress, report, tune
from pipelines.cluster import RunFailed
from pipelines.ledger import ID, PARTITIONS, Ledger
from pipelines.stage import begin
from pipelines.storage import Storage, absolute, join
from pipelines.tracker import start as tracker_of_run
from pipelines.watch import watched
from schemas import AdapterRow, ManifestRow, ResultRow, TransferSettings, TuneSettings, UsageError
from vmt_core.adapters import files
from vmt_core.backbone import nano

REPORT_ADAPTERS = 24
_SUMS = ("seconds_encode", "seconds_transfer", "seconds_finish")


def run(settings: TransferSettings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Makes the missing videos of a manifest; returns the summary that it also writes to OUT/run/summary.json, and its adapters for a page.

    Args:
        settings: of the job.
        say: told what happens, in lines.

    Raises:
        UsageError: what was asked cannot be run; nothing was made.
        RunFailed: it stopped before its end; the same command goes on from there.
    """
    storage = Storage(settings.storage)
    places = {name: absolute(place) for name in ("output", "adapters") if (place := getattr(settings, name))}
    places["model"] = models.anywhere(settings.model)
    settings = settings.model_copy(update=places)  # actors of a running cluster have another directory
    started = datetime.now(UTC)
    try:
        revision = models.revision(settings.model, storage)
    except FileNotFoundError as error:
        raise UsageError(f"--model {error}") from error
    stages = {name: getattr(settings, name) for name in ("encode", "transfer", "finish")}
    if note := cluster.unreserved(settings.ray, settings.device, stages):
        say(note)
    if not settings.transfer.gpus and settings.device != "cuda" and settings.model != nano.NAME:
        say("note: transfer.gpus=0: the transformer runs on CPUs; --transfer.gpus 1 gives each actor a GPU")
    bare = [name for name in ("encode", "finish") if not getattr(settings, name).gpus]
    if settings.transfer.gpus and settings.device != "cuda" and bare:
        say(
            f"note: {' and '.join(bare)} without GPUs ({bare[0]}.gpus=0): the VAE and the text encoder run on CPUs there, which is slow"
        )
    selection = manifest.check(
        storage, settings.manifest, revision=revision, method=settings.method, samples=settings.samples
    )
    settings = _with_adapters(settings, storage, selection, say)
    with lock.held(storage, join(settings.output, "run", "lock.json")):
        run_id = f"{started:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}"
        storage.write(join(settings.output, "run", "settings.json"), _json(settings.model_dump(mode="json")))
        ledger = Ledger(storage, settings.output, say)
        chosen, left = _choose(settings, ledger, selection.ids, say)
        began, working = time.monotonic(), 0.0
        if chosen:
            with _source(settings, storage, chosen, whole=not (left or settings.method or settings.samples)) as source:
                working = _execute(settings, storage, ledger, source, chosen, run_id, say)
        ledger.gather()
        summary = {
            "title": "Motion transfer",
            "run_id": run_id,
            "started_at": started.isoformat(timespec="seconds"),
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - began, 3),
            "seconds_working": round(working, 3),  # without the start of Ray and the loading of models
            "manifest": settings.manifest,
            "model": settings.model,
            "model_revision": revision,
            "again": _where(settings),
            "notice": nano.NOTICE if settings.model == nano.NAME else None,
            **_account(ledger, selection.ids, run_id),
        }
        summary["videos_per_hour"] = round(3600 * summary["made_ok"] / working, 1) if working else 0.0
        storage.write(join(settings.output, "run", "summary.json"), _json(summary))
        page = join(settings.output, "run", "report.html")
        about = {**summary, "adapters": _tuned(settings, storage, selection)}
        storage.write(page, report.render(_shown(ledger, selection.ids), about, settings.output).encode())
        shown = [("videos", join(settings.output, "videos")), ("results", ledger.results), ("report", page)]
        say(progress.ending(summary, shown))
        if (summary["made"], summary["left"]) != (len(chosen), left):
            raise RunFailed(
                f"{len(chosen)} rows were to be made and {left} to be left, but {summary['made']} were made and "
                f"{summary['left']} are left; the same command makes the missing ones"
            )
    return about


def _with_adapters(
    settings: TransferSettings, storage: Storage, selection: manifest.Selection, say: Callable[[str], None]
) -> TransferSettings:
    """The settings with the place of the adapters; with `--tune` the missing ones are made there first.

    Raises:
        UsageError: a method needs adapters, and nothing says where they are.
    """
    if not selection.adapters:
        return settings
    place = settings.adapters or join(settings.output, "adapters")
    if settings.tune:
        if not place.endswith("/adapters"):
            raise UsageError(f"--adapters {place}: with --tune it must end in /adapters, as jobs/tune.py writes it")
        wanted = _needed(settings, storage, selection)
        if not wanted:
            return settings.model_copy(update={"adapters": place})
        tuning = TuneSettings.like(
            settings,
            references=settings.manifest,
            output=place.removesuffix("/adapters"),
            method=wanted[0].method,
            limit=None,
            device="cuda" if settings.device == "auto" and settings.transfer.gpus else settings.device,
        )
        tune.tune(tuning, storage, wanted, say)
    elif settings.adapters is None:
        name = next(iter(selection.adapters.values())).method
        raise UsageError(f"{name} needs adapters: give --adapters OUT/adapters of jobs/tune.py, or --tune them now")
    elif lacking := {row.adapter_id for row in adapters.lacking(storage, place, selection.adapters.values())}:
        needed = _needed(settings, storage, selection)
        if missing := [row for row in needed if row.adapter_id in lacking]:
            text = (
                f"{len(missing)} of {len(needed)} adapters are not in {place}, that of {missing[0].reference_uri} first"
            )
            text += adapters.why(storage, place, missing[0])
            if len(missing) == len(needed):
                raise UsageError(f"--adapters: {text}")
            say(f"note: {text}; their rows fail with adapter_missing")
    return settings.model_copy(update={"adapters": place})


def _needed(settings: TransferSettings, storage: Storage, selection: manifest.Selection) -> list[AdapterRow]:
    """The adapters of the rows that are to be made now."""
    try:
        done = Ledger(storage, settings.output).done()
    except ValueError as error:
        raise RunFailed(str(error)) from error
    again = {row for row, code in done.items() if code is not None} if settings.retry_failed else set()
    missing = [row for row in selection.ids if row not in done or row in again][: settings.limit]
    chosen = dict.fromkeys(selection.needs[row] for row in missing if row in selection.needs)
    return [selection.adapters[adapter] for adapter in chosen]


def _tuned(settings: TransferSettings, storage: Storage, selection: manifest.Selection) -> list[dict[str, Any]]:
    """What the page shows of the adapters: of the first REPORT_ADAPTERS that there are."""
    shown = []
    for row in list(selection.adapters.values())[:REPORT_ADAPTERS]:
        folder = join(str(settings.adapters), f"method={row.method}", row.adapter_id)
        try:
            about = json.loads(storage.read(join(folder, files.DONE)))
            heads = storage.read(join(folder, files.HEADS))
        except FileNotFoundError:  # its rows failed, and say so
            continue
        shown.append({**about, "heads": heads, "reference_uri": row.reference_uri, "caption": row.caption})
    return shown


def _where(settings: TransferSettings) -> list[str]:
    """Flags that the command for one row needs beside its manifest and its model."""
    places = {"--adapters": settings.adapters, "--storage.endpoint-url": settings.storage.endpoint_url}
    return [word for flag, place in places.items() if place for word in (flag, place)]


def _choose(
    settings: TransferSettings, ledger: Ledger, ids: list[str], say: Callable[[str], None]
) -> tuple[list[str], int]:
    """The rows to make now, and how many missing ones are left for another run."""
    try:
        done = ledger.mend()
    except ValueError as error:
        raise RunFailed(str(error)) from error
    if settings.retry_failed:
        again = {row for row in ids if done.get(row) is not None}
        say(f"forgetting {len(again)} failed rows, to try them again")
        ledger.forget(again)
        done = {row: code for row, code in done.items() if row not in again}
    missing = [row for row in ids if row not in done]
    chosen = missing[: settings.limit]
    say(f"{len(ids)} rows selected, {len(ids) - len(missing)} done before, {len(chosen)} to make now")
    return chosen, len(missing) - len(chosen)


@contextlib.contextmanager
def _source(settings: TransferSettings, storage: Storage, chosen: list[str], *, whole: bool) -> Iterator[str]:
    """What the graph reads: the manifest, or with `--limit` a copy of the chosen rows."""
    if whole:
        yield settings.manifest
        return
    copy = join(settings.output, "run", "chosen.parquet")
    manifest.subset(storage, settings.manifest, copy, set(chosen).__contains__)
    try:
        yield copy
    finally:
        storage.delete(copy)


def graph(settings: TransferSettings, storage: Storage, source: str, tracker: Any, run_id: str) -> Dataset:
    """MANIFEST -> Encode -> Transfer -> Finish, lazily; blocks of a few rows, because a block is what is committed."""
    stages = importlib.import_module(settings.stages)
    filesystem, path = storage.arrow(source)
    rows = settings.rows_per_block or settings.transfer.batch_rows
    data = ray.data.read_parquet(
        path,
        filesystem=filesystem,
        schema=ManifestRow.arrow_schema(),
        partitioning=None,  # or a folder `seed=7` above the manifest would be every row's seed
    )
    data = data.repartition(target_num_rows_per_block=rows)
    data = data.map_batches(begin, batch_size=rows, batch_format="pyarrow", num_cpus=1)
    for actor, pool in (
        (stages.Encode, settings.encode),
        (stages.Transfer, settings.transfer),
        (stages.Finish, settings.finish),
    ):
        data = data.map_batches(
            actor,
            fn_constructor_args=(settings, tracker, run_id),
            batch_size=rows,
            batch_format="pyarrow",
            **cluster.pool(pool),
        )
    return data


def _execute(
    settings: TransferSettings,
    storage: Storage,
    ledger: Ledger,
    source: str,
    chosen: list[str],
    run_id: str,
    say: Callable[[str], None],
) -> float:
    """Runs the graph in a thread, while this one watches and tells; returns the seconds since the first row began.

    Raises:
        RunFailed: the engine gave up, or nothing moves any more.
    """
    pools = (settings.encode, settings.transfer, settings.finish)
    with cluster.connected(settings.ray, pools):
        tracker = tracker_of_run()
        _configure(settings, storage, ledger)
        data = graph(settings, storage, source, tracker, run_id)
        filesystem, path = storage.arrow(ledger.results)
        watched(
            lambda: data.write_parquet(path, filesystem=filesystem, partition_cols=PARTITIONS),
            tracker,
            pools,
            tell=lambda now: say(progress.line(now, len(chosen))),
            progress_s=settings.progress_s,
            stall_s=settings.ray.stall_s,
        )
        return float(ray.get(tracker.snapshot.remote())["working_s"])


def _configure(settings: TransferSettings, storage: Storage, ledger: Ledger) -> None:
    """Ray Data's own switches: resume by the checkpoint, no silent dropping, no stacks of progress bars."""
    context = cluster.quiet_data()
    filesystem, path = storage.arrow(ledger.checkpoint)
    context.checkpoint_config = CheckpointConfig(
        id_column=ID, checkpoint_path=path, override_filesystem=filesystem, delete_checkpoint_on_success=False
    )
    context.max_errored_blocks = 0
    context.max_consecutive_actor_init_deaths = 2
    context.execution_no_progress_timeout_s = 10 * (settings.limits.row_seconds + settings.ray.stall_s)  # ours is first
    context.retried_io_errors = [*context.retried_io_errors, *_RETRIED]
    context.write_file_retry_on_errors = [*context.write_file_retry_on_errors, *_RETRIED]


_RETRIED = (
    "SlowDown",
    "ServiceUnavailable",
    "InternalError",
    "reduce your request rate",
    "onnection",
    "imed out",
    "imeout",
)


def _account(ledger: Ledger, ids: list[str], run_id: str) -> dict[str, Any]:
    """Counts over the selected rows, from the results alone."""
    selected = set(ids)
    failed: Counter[str] = Counter()
    sums: Counter[str] = Counter()
    versions: dict[str, str] = {}
    ok = made = made_ok = calls = evaluations = 0
    columns = [ID, "error_code", "run_id", "denoiser_calls", "evaluations", "versions", *_SUMS]
    for batch in ledger.scan(columns):
        for row in batch.to_pylist():
            if row[ID] not in selected:
                continue
            selected.discard(row[ID])
            code = row["error_code"]
            mine = row["run_id"] == run_id
            made += mine
            if code is not None:
                failed[code] += 1
                continue
            ok += 1
            made_ok += mine
            calls += row["denoiser_calls"] or 0 if mine else 0
            evaluations += row["evaluations"] or 0 if mine else 0
            sums.update({name: row[name] or 0.0 for name in _SUMS})
            versions = versions or json.loads(row["versions"])
    return {
        "selected": len(ids),
        "ok": ok,
        "failed": sum(failed.values()),
        "left": len(selected),
        "made": made,
        "made_ok": made_ok,
        "denoiser_calls": calls,
        "evaluations": evaluations,
        "failed_by_code": dict(failed.most_common()),
        "seconds_by_stage": {name.removeprefix("seconds_"): round(sums[name] / ok, 4) for name in _SUMS} if ok else {},
        "versions": versions,
    }


def _shown(ledger: Ledger, ids: list[str]) -> list[dict[str, Any]]:
    """Rows for the page, in the manifest's order: at most report.ROWS, the failed ones among them first of all."""
    order = {row: place for place, row in enumerate(ids)}
    if len(ids) > report.ROWS:
        done = ledger.done()
        first = sorted((row for row in ids if row in done), key=lambda row: done[row] is None)[: report.ROWS]
        order = {row: order[row] for row in first}
    columns = list(ResultRow.model_fields)
    rows = [row for batch in ledger.scan(columns, order.keys()) for row in batch.to_pylist()]
    return sorted(rows, key=lambda row: order[row[ID]])


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
