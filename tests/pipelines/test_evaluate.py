"""What evaluate makes of rows that are measured already: tables, summary and page, however many there are."""

import json
import re
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import evaluate, measure
from pipelines.storage import Storage
from schemas import EvaluateSettings, MetricRow, ResultRow
from support.jobs import row

METHODS = ("none", "fastvmt")


def measured(folder, count):
    """Settings of an evaluation of `count` results whose metrics are there; every tenth has failed."""
    settings = EvaluateSettings(run=[str(folder / "out")], output=str(folder / "eval"), bootstrap=100)
    base = row("a red circle").model_dump()
    results, metrics = [], []
    for number in range(count):
        ended = {"status": "ok", "video_uri": "v.mp4"}
        if number % 10 == 0:
            ended = {"status": "failed", "error_code": "truncated", "error_message": "cut off"}
        method, twin = METHODS[number % 2], number // 2
        own = {"sample_id": f"{number:032x}", "method": method, "prompt": f"prompt {twin}", "seed": twin}
        results.append(ResultRow.model_validate(base | own | ended))
        values = {"motion": twin % 7 / 10 + number % 2 / 4, "tracks": "t" * 64} if ended["status"] == "ok" else {}
        about = {name: value for name, value in results[-1].model_dump().items() if name in MetricRow.model_fields}
        absent = json.dumps({"text_similarity": "no CLIP was given"})
        about |= {"pair": str(twin), "sampling": "{}"}
        metrics.append(MetricRow(**about, run=settings.run[0], absent=absent, **values))
    for status, method in {(item.status, item.method) for item in results}:
        part = [item for item in results if (item.status, item.method) == (status, method)]
        write(folder / "out" / "results" / f"status={status}" / f"method={method}", part, ("status", "method"))
    write(measure.folder_of(settings), metrics)
    return settings


def write(folder, rows, partitions=()):
    Path(folder).mkdir(parents=True)
    schema = pa.schema([field for field in type(rows[0]).arrow_schema() if field.name not in partitions])
    values = [item.model_dump(exclude=set(partitions)) for item in rows]
    pq.write_table(pa.Table.from_pylist(values, schema=schema), Path(folder) / "rows.parquet")


def test_nothing_is_lost_between_results_tables_and_page(tmp_path):
    settings = measured(tmp_path, 200)
    summary = evaluate.run(settings, say=lambda line: None)
    assert (summary["results"], summary["measured"], summary["failed"]) == (200, 180, 20)
    assert summary["failed_by_code"] == {"truncated": 20}
    assert summary["absent"] == {"text_similarity": "no CLIP was given"}
    lines = (tmp_path / "eval" / "comparison.csv").read_text().splitlines()
    assert [line.split(",")[:4] for line in lines[1:]] == [["none", "all", "80", "20"], ["fastvmt", "all", "100", "0"]]
    page = (tmp_path / "eval" / "report.html").read_text()
    assert set(re.findall(r'"([0-9a-f]{32})"', page)) >= {f"{number:032x}" for number in range(200)}


def test_the_page_has_the_failures_first_when_there_are_too_many_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.report, "ROWS", 25)
    settings = measured(tmp_path, 200)
    evaluate.run(settings, say=lambda line: None)
    page = (tmp_path / "eval" / "report.html").read_text()
    shown = {int(found, 16) for found in re.findall(r'"(0{16}[0-9a-f]{16})"', page)}  # the page's nonce looks alike
    assert len(shown) == 25 and shown >= set(range(0, 200, 10))


def test_a_page_of_several_runs_knows_the_run_of_a_row(tmp_path):
    one, other = measured(tmp_path / "one", 10), measured(tmp_path / "other", 10)
    (metrics,) = Path(measure.folder_of(other)).rglob("*.parquet")
    metrics.rename(Path(measure.folder_of(one)) / "other.parquet")
    both = one.model_copy(update={"run": [*one.run, *other.run]})
    for settings, known in ((one, False), (both, True)):
        evaluate.run(settings, say=lambda line: None)
        page = (tmp_path / "one" / "eval" / "report.html").read_text()
        assert [f'"{run}"' in page for run in both.run] == [known, known]


def test_metrics_that_no_longer_agree_with_their_results_are_measured_again(tmp_path):
    """One result is gone, one was made again after it had failed, metrics of good videos failed, one stands twice."""
    settings = measured(tmp_path, 30)
    (path,) = (tmp_path / "eval" / "metrics").rglob("*.parquet")
    rows = pq.read_table(path, partitioning=None).to_pylist()
    rows[1] |= {"status": "failed", "error_code": "storage_unavailable"}
    rows[7] |= {"status": "failed", "error_code": "internal"}
    rows[3] |= {"status": "failed", "error_code": "reference_forbidden"}
    table = pa.Table.from_pylist([*rows, rows[2]], schema=MetricRow.arrow_schema())
    pq.write_table(table, path)
    results = {f"{number:032x}": None if number % 10 else "truncated" for number in range(30)}
    del results[f"{5:032x}"]
    results[f"{10:032x}"] = None
    kept = evaluate.mend(settings, Storage(), {settings.run[0]: results}, retry=False)  # as after a run
    assert {int(sample, 16) for sample in kept[settings.run[0]]} == set(range(30)) - {5, 10}
    done = evaluate.mend(settings, Storage(), {settings.run[0]: results})
    assert {int(sample, 16) for sample in done[settings.run[0]]} == set(range(30)) - {1, 3, 5, 7, 10}
    kept = [row.sample_id for row in evaluate.read(settings, Storage())]
    assert sorted(kept) == sorted(done[settings.run[0]])


def test_memory_does_not_grow_with_the_rows(tmp_path, monkeypatch):
    few, many = 1_000, 9_000
    monkeypatch.setattr(evaluate.report, "ROWS", 100)
    peaks = []
    for count in (few, many):
        settings = measured(tmp_path / str(count), count)
        tracemalloc.start()
        evaluate.run(settings, say=lambda line: None)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    print(f"{(peaks[1] - peaks[0]) / (many - few):.0f} bytes a row, {peaks[0] / 2**20:.1f} MiB")
    assert (peaks[1] - peaks[0]) / (many - few) < 1_000  # bytes a row: its id and its numbers, not the row


def test_a_video_that_could_not_be_measured_is_a_failure_on_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "_stale", lambda *_: False)  # else it would be measured again
    settings = measured(tmp_path, 30)
    (path,) = (tmp_path / "eval" / "metrics").rglob("*.parquet")
    rows = pq.read_table(path, partitioning=None).to_pylist()
    rows[1] |= {"status": "failed", "error_code": "reference_missing", "error_message": "v.mp4: is gone"}
    pq.write_table(pa.Table.from_pylist(rows, schema=MetricRow.arrow_schema()), path)
    evaluate.run(settings, say=lambda line: None)
    assert "v.mp4: is gone" in (tmp_path / "eval" / "report.html").read_text()


def test_settings_name_the_same_metrics_wherever_they_are_read(tmp_path, monkeypatch):
    """Paths of models are part of a suite's name; actors have another directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip").mkdir()
    settings = evaluate.everywhere(
        EvaluateSettings(run=["out"], output="eval", clip="clip", aesthetic_head="h.safetensors")
    )
    monkeypatch.chdir("/")
    assert (settings.clip, settings.aesthetic_head) == (str(tmp_path / "clip"), str(tmp_path / "h.safetensors"))
    assert evaluate.everywhere(settings) == settings
    assert settings.device == "cpu"  # auto, without GPUs
    assert evaluate.everywhere(EvaluateSettings(run=["out"], output="eval", measure={"gpus": 0.5})).device == "cuda"
