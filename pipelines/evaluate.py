"""Runs -> metrics of every video -> tables. Results are streamed from storage through a pool of actors; what is measured stays measured.

EVAL/metrics/suite_id=…/….parquet       a row for every result row (`schemas.MetricRow`), joined by run and sample_id
EVAL/comparison.csv                  a line for every method; categories.csv one for every method and category, as comparison.parquet
EVAL/comparison.{md,tex}             the same to read and to print
EVAL/paper.md                        the columns of the papers' tables, with the published numbers beside ours
"""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from heapq import nsmallest
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import ray
from ray.data.datasource import Partitioning

from pipelines import cluster, formats, lock, models, parquet, progress, report, tables
from pipelines.cluster import RunFailed
from pipelines.ledger import Ledger
from pipelines.measure import COLUMNS, Measure, folder_of, unmeasured
from pipelines.storage import Storage, absolute, join
from pipelines.tracker import start as tracker_of_run
from pipelines.watch import watched
from schemas import EvaluateSettings, MetricRow, ResultRow, UsageError
from vmt_core.metrics.noncommercial import NOTICE

_DRAWN = 500  # of those, the ones whose tracks can be drawn over the videos


def run(settings: EvaluateSettings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures what is not measured yet and writes the tables; returns the summary that it also writes to EVAL/run/summary.json.

    Raises as `compared` does.
    """
    return compared(settings, say)[0]


def compared(settings: EvaluateSettings, say: Callable[[str], None]) -> tuple[dict[str, Any], list[tables.Line]]:
    """The same, with the lines of the comparison.

    Raises:
        UsageError: a run has no results.
        RunFailed: it stopped before its end; the same command goes on from there.
    """
    storage, began = Storage(settings.storage), time.monotonic()
    if note := cluster.unreserved(settings.ray, settings.device, {"measure": settings.measure}):
        say(note)
    settings = everywhere(settings)
    try:
        found = {output: Ledger(storage, output).done() for output in settings.run}
    except ValueError as error:
        raise RunFailed(str(error)) from error
    for output, results in found.items():
        if not results:
            raise UsageError(f"--run {output}: has no results; make some with jobs/transfer.py")
    with lock.held(storage, join(settings.output, "run", "lock.json")):
        storage.write(join(settings.output, "run", "settings.json"), settings.model_dump_json(indent=2).encode())
        done, count = mend(settings, storage, found), sum(map(len, found.values()))
        missing = count - sum(map(len, done.values()))
        say(f"{count} results, {count - missing} measured before, {missing} to measure now")
        if missing:
            _measure(settings, storage, {run: len(results) for run, results in found.items()}, done, say)
            mend(settings, storage, found, retry=False)
        lines = tables.compare(read(settings, storage), settings.baseline, settings.bootstrap)
        told, failed, absent = _tally(read(settings, storage))
        summary = {
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - began, 3),
            "results": count,
            "measured": told - sum(failed.values()),
            "failed": sum(failed.values()),
            "failed_by_code": dict(failed.most_common()),
            "absent": absent,
        }
        for name, text in {
            "comparison.csv": formats.to_csv([line for line in lines if line.category == tables.ALL]),
            "categories.csv": formats.to_csv(lines),
            "comparison.md": formats.to_markdown(lines),
            "comparison.tex": formats.to_latex(lines),
            "paper.md": formats.papers_shape(lines),
            "run/summary.json": json.dumps(summary, indent=2),
        }.items():
            storage.write(join(settings.output, name), text.encode())
        title = {"title": "Evaluation", "ok": summary["measured"], "left": count - told} | {
            name: summary[name] for name in ("finished_at", "failed", "failed_by_code")
        }
        storage.write(
            join(settings.output, "report.html"), page(settings, storage, title, settings.output, lines).encode()
        )
        table = pacsv.read_csv(io.BytesIO(formats.to_csv(lines).encode()))
        parquet.write(storage, join(settings.output, "comparison.parquet"), table)
    if told != count:
        raise RunFailed(f"{count} results, but {told} were measured; the same command goes on from there")
    for line in lines:
        if line.category == tables.ALL:
            say(_line(line))
    if all(settings.baseline not in (line.method, line.label) for line in lines):
        say(f"--baseline {settings.baseline}: no videos of it, so there are no differences")
    elif any(line.method == settings.baseline and line.compared for line in lines):
        say(
            f"--baseline {settings.baseline}: made with several settings; differences are to those of {lines[0].label!r}"
        )
    if failed:
        say(f"{summary['failed']} without metrics: {progress.codes(failed)}")
    for name, model in (("motion_fidelity", settings.cotracker), ("motion_smoothness", settings.amt)):
        if model:
            say(f"{name}: {NOTICE}")
    for name, reason in summary["absent"].items():
        say(f"{name}: not measured ({reason})")
    say(f"tables  {join(settings.output, 'comparison.md')}")
    return summary, lines


def everywhere(settings: EvaluateSettings) -> EvaluateSettings:
    """The settings with places that mean the same to actors, which have another directory, and with the device where they compute.

    The places name the metrics' suite as well.
    """
    places: dict[str, Any] = {
        "run": list(dict.fromkeys(map(absolute, settings.run))),
        "output": absolute(settings.output),
    }
    for name in ("clip", "dino", "aesthetic_clip"):
        places[name] = models.anywhere(model) if (model := getattr(settings, name)) else None
    for name in ("aesthetic_head", "cotracker", "amt"):
        places[name] = absolute(file) if (file := getattr(settings, name)) else None
    if settings.device == "auto":
        places["device"] = "cuda" if settings.measure.gpus else "cpu"
    return settings.model_copy(update=places)


def page(
    settings: EvaluateSettings,
    storage: Storage,
    summary: Mapping[str, Any],
    output: str,
    lines: Sequence[tables.Line],
) -> str:
    """The report: the comparison of methods above a gallery of videos with their metrics.

    Args:
        settings: as `everywhere` gives them.
        summary: as `report.render` wants it.
        output: folder that the page is written to.
        lines: of the comparison of what was measured.
    """
    first = nsmallest(
        report.ROWS,
        read(settings, storage),
        key=lambda row: (row.status == "ok", row.reference_uri, row.prompt, row.seed),
    )
    metrics = {(row.run, row.sample_id): row for row in first}
    tracks = {
        (row.run, row.sample_id): {"tracks": row.tracks, "reference_tracks": row.reference_tracks}
        for row in read(settings, storage, tracks_of=[row.sample_id for row in first if row.status == "ok"][:_DRAWN])
    }
    shown = []
    for run in settings.run:
        ids = {sample for other, sample in metrics if other == run}
        for batch in Ledger(storage, run).scan(list(ResultRow.model_fields), ids):
            for row in batch.to_pylist():
                key = (run, row["sample_id"])
                values = {name: getattr(metrics[key], name) for name in tables.BETTER if name != "seconds"}
                fault = None
                if row["status"] == "ok" and metrics[key].status == "failed":
                    fault = f"{metrics[key].error_code}: {metrics[key].error_message}"
                of = {"run": run} if len(settings.run) > 1 else {}
                shown.append(row | of | {"metrics": values, "fault": fault} | tracks.get(key, {}))
    # methods as in the comparison: what others are compared to comes first
    order = {method: place for place, method in enumerate(dict.fromkeys(line.method for line in lines))}
    shown.sort(key=lambda row: (row["reference_uri"], row["prompt"], row["seed"], order.get(row["method"], len(order))))
    return report.render(shown, summary, output, lines=lines, place="", runs=settings.run)


def read(
    settings: EvaluateSettings, storage: Storage, *, tracks_of: Collection[str] | None = None
) -> Iterator[MetricRow]:
    """Every metric row of the runs that were asked for, or those of some samples with their tracks, which weigh more than all else."""
    columns, runs, samples = list(MetricRow.model_fields), set(settings.run), set(tracks_of or ())
    if tracks_of is None:
        columns = [name for name in columns if name not in ("tracks", "reference_tracks")]
    for _, table in parquet.each(storage, _files(settings, storage), columns, MetricRow.arrow_schema()):
        for batch in table.to_batches(max_chunksize=1000):
            for values in batch.to_pylist():
                if values["run"] in runs and (tracks_of is None or values["sample_id"] in samples):
                    yield MetricRow.model_validate(values)


def mend(
    settings: EvaluateSettings,
    storage: Storage,
    results: Mapping[str, Mapping[str, str | None]],
    *,
    retry: bool = True,
) -> dict[str, set[str]]:
    """Ids of the rows that are measured, by run. Metrics that no longer agree with their result go, and second ones.

    Args:
        results: of each run, sample_id -> error code, or None for ok.
        retry: forget measurements of good videos that failed; after a run they stand.
    """
    done: dict[str, set[str]] = {run: set() for run in results}
    files, columns = _files(settings, storage), ["run", "sample_id", "status", "error_code", "video_uri"]
    for uri, table in parquet.each(storage, files, columns, MetricRow.arrow_schema()):
        keep = []
        for row in table.to_pylist():
            run, sample = row["run"], row["sample_id"]
            if run not in results:  # of an evaluation of other runs
                keep.append(True)
                continue
            keep.append(
                sample in results[run] and sample not in done[run] and not _stale(row, results[run][sample], retry)
            )
            if keep[-1]:
                done[run].add(sample)
        if any(keep) and not all(keep):
            parquet.write(storage, uri, parquet.read(storage, uri).filter(pa.array(keep)))
        elif not any(keep):
            storage.delete(uri)
    return done


def _stale(row: Mapping[str, Any], result: str | None, retry: bool) -> bool:
    """Whether a metric row says another thing than its result now does, or (`retry`) failed although the video is good.

    Why it failed lay outside it then, and may be gone: a policy, a mount, memory, a fault of this code.
    """
    if result is not None:
        return bool(row["error_code"] != result)
    made = row["video_uri"] is not None  # when it was measured
    return row["status"] == "failed" and (not made or retry)


def _measure(
    settings: EvaluateSettings,
    storage: Storage,
    counts: Mapping[str, int],
    done: Mapping[str, set[str]],
    say: Callable[[str], None],
) -> None:
    """Runs the pool over the results of every run that has some to measure.

    Args:
        counts: results of each run.
        done: ids of those that are measured.

    Raises:
        RunFailed: the engine gave up, or nothing moves any more.
    """
    missing = sum(counts.values()) - sum(map(len, done.values()))
    with cluster.connected(settings.ray, (settings.measure,)):
        context = cluster.quiet_data()
        actors = min(settings.measure.max_actors or settings.measure.actors, missing)
        a_block = min(settings.rows_per_block, -(-missing // actors))  # few rows are shared by all actors, too
        context.execution_no_progress_timeout_s = a_block * settings.limits.row_seconds + settings.ray.stall_s
        tracker = tracker_of_run()
        ended, failed, began = 0, 0, time.monotonic()

        def work() -> None:
            nonlocal ended, failed
            for output in settings.run:
                if len(done[output]) == counts[output]:
                    continue
                files = parquet.files(storage, join(output, "results"))
                filesystem, _ = storage.arrow(files[0])
                paths = [storage.arrow(file)[1] for file in files]
                folders = Partitioning("hive", base_dir=storage.arrow(join(output, "results"))[1])
                data = (
                    ray.data.read_parquet(paths, filesystem=filesystem, columns=[*COLUMNS], partitioning=folders)
                    .map_batches(unmeasured, fn_args=(sorted(done[output]),), batch_size=None, batch_format="pyarrow")
                    .repartition(target_num_rows_per_block=a_block)
                    .map_batches(
                        Measure,
                        fn_constructor_args=(settings, output, tracker),
                        batch_size=a_block,
                        batch_format="pyarrow",
                        **cluster.pool(settings.measure, missing),
                    )
                )
                for row in data.iter_rows():
                    ended, failed = ended + row["measured"], failed + row["failed"]

        def tell(_: Mapping[str, Any]) -> None:
            if ended:
                rate = ended / (time.monotonic() - began)
                left = progress.duration((missing - ended) / rate)
                say(f"{ended}/{missing} videos · {failed} failed · {60 * rate:,.0f} videos/min · {left} left")

        pools = (settings.measure,)
        watched(work, tracker, pools, tell=tell, progress_s=settings.progress_s, stall_s=settings.ray.stall_s)


def _files(settings: EvaluateSettings, storage: Storage) -> list[str]:
    return parquet.files(storage, folder_of(settings))


def _tally(rows: Iterable[MetricRow]) -> tuple[int, Counter[str], dict[str, str]]:
    """How many rows, how many of them failed by code, and the metrics that no video has, with the commonest reason."""
    told, ok, failed = 0, 0, Counter[str]()
    reasons: dict[str, Counter[str]] = {}
    for row in rows:
        told += 1
        if row.status == "failed":
            failed[str(row.error_code)] += 1
            continue
        ok += 1
        for name, reason in json.loads(row.absent).items():
            reasons.setdefault(name, Counter())[reason] += 1
    absent = {name: counts.most_common(1)[0][0] for name, counts in reasons.items() if counts.total() == ok}
    return told, failed, absent


def _line(line: tables.Line) -> str:
    """`fastvmt: motion 0.512 (+0.31 [+0.22, +0.40]), 12.1 s, 48 videos`."""
    motion, seconds = line.cells.get("motion"), line.cells.get("seconds")
    parts = []
    if motion is not None:
        gain = (
            ""
            if motion.difference is None
            else f" ({motion.difference:+.3f} [{motion.difference_low:+.3f}, {motion.difference_high:+.3f}])"
        )
        rest = formats.few(line, "motion")
        parts.append(f"motion {motion.mean:.3f}{gain}" + (f" of {rest} videos" if rest else ""))
    if seconds is not None:
        parts.append(f"{seconds.mean:.3g} s a video")
    parts.append(f"{line.made} videos" + (f", {line.failed} failed" if line.failed else ""))
    return f"{line.label}: {', '.join(parts)}"
