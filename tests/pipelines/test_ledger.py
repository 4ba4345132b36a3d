"""Results are the truth; the checkpoint is mended to agree with them."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.ledger import Ledger
from pipelines.storage import Storage
from schemas import ResultRow
from support.jobs import row


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def ledger(out):
    return Ledger(Storage(), str(out), report=lambda line: None)


def result(index, *, failed=False):
    values = row(f"prompt {index}").model_dump()
    if failed:
        return ResultRow(**values, status="failed", error_code="truncated", error_message="cut off")
    return ResultRow(**values, status="ok", video_uri="v.mp4")


def commit(out, name, rows):
    """As Ray Data does: result files by partition, and a checkpoint file of the same prefix."""
    for status in {item.status for item in rows}:
        part = [item.model_dump(exclude={"status", "method"}) for item in rows if item.status == status]
        fields = [field for field in ResultRow.arrow_schema() if field.name not in ("status", "method")]
        folder = out / "results" / f"status={status}" / "method=none"
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(part, schema=pa.schema(fields)), folder / f"{name}-0.parquet")
    checkpoint(out, f"{name}.parquet", rows)


def checkpoint(out, name, rows):
    folder = out / "run" / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"sample_id": [item.sample_id for item in rows]}), folder / name)


def committed(out):
    files = (out / "run" / "checkpoint").glob("*.parquet")
    return sorted(value for file in files for value in pq.read_table(file)["sample_id"].to_pylist())


def ids(*rows):
    return sorted(item.sample_id for item in rows)


def test_an_empty_output_is_an_empty_ledger(ledger):
    assert ledger.mend() == {}


def test_done_says_how_each_row_ended(out, ledger):
    good, bad = result(1), result(2, failed=True)
    commit(out, "a", [good, bad])
    assert ledger.mend() == {good.sample_id: None, bad.sample_id: "truncated"}


def test_a_commit_that_was_cut_off_is_undone(out, ledger):
    kept, cut = result(1), result(2)
    commit(out, "a_000000", [kept])
    commit(out, "a_000001", [cut])
    (out / "run/checkpoint/a_000001.parquet").rename(out / "run/checkpoint/a_000001.pending.parquet")
    assert sorted(ledger.mend()) == ids(kept)
    assert committed(out) == ids(kept)
    assert not list(out.glob("run/checkpoint/*.pending.parquet"))


def test_a_half_written_result_file_of_a_cut_off_commit_does_no_harm(out, ledger):
    commit(out, "a_000000", [result(1)])
    checkpoint(out, "a_000001.pending.parquet", [result(2)])
    (out / "results/status=ok/method=none/a_000001-0.parquet").write_bytes(b"PAR1 half")
    assert sorted(ledger.mend()) == ids(result(1))


def test_a_rename_that_left_both_names_keeps_the_rows(out, ledger):
    """On object storage a rename is a copy and a delete; Ray's own recovery would drop these rows for ever."""
    commit(out, "a_000000", [result(1)])
    checkpoint(out, "a_000000.pending.parquet", [result(1)])
    assert sorted(ledger.mend()) == ids(result(1))
    assert committed(out) == ids(result(1))


def test_ids_without_results_are_made_again(out, ledger):
    commit(out, "a", [result(1)])
    checkpoint(out, "lost.parquet", [result(2)])
    ledger.mend()
    assert committed(out) == ids(result(1))


def test_results_without_ids_are_not_made_again(out, ledger):
    commit(out, "a", [result(1)])
    (out / "run/checkpoint/a.parquet").unlink()
    ledger.mend()
    assert committed(out) == ids(result(1))


def test_a_row_that_stands_twice_is_kept_once_and_ok_wins(out, ledger):
    commit(out, "a", [result(1, failed=True), result(2)])
    commit(out, "b", [result(1), result(3)])
    done = ledger.mend()
    assert done == {item.sample_id: None for item in (result(1), result(2), result(3))}
    assert sum(batch.num_rows for batch in ledger.scan(["sample_id"])) == 3


def test_forgotten_rows_are_gone_and_their_neighbours_stay(out, ledger):
    commit(out, "a", [result(1, failed=True), result(2, failed=True), result(3)])
    ledger.forget(ids(result(1)))
    assert sorted(ledger.mend()) == ids(result(2), result(3)) == committed(out)


def test_an_unreadable_result_file_is_an_error_that_names_it(out, ledger):
    commit(out, "a", [result(1)])
    (out / "results/status=ok/method=none/a-0.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match=r"a-0\.parquet"):
        ledger.mend()


def test_scan_gives_the_partition_columns_and_only_the_rows_asked_for(out, ledger):
    commit(out, "a", [result(1), result(2, failed=True)])
    (batch,) = [batch for batch in ledger.scan(["sample_id", "status", "method"], ids(result(2))) if batch.num_rows]
    assert batch.to_pylist() == [{"sample_id": result(2).sample_id, "status": "failed", "method": "none"}]
    assert sum(batch.num_rows for batch in ledger.scan(["sample_id"], set())) == 0


def test_a_checkpoint_of_many_files_becomes_one(out, ledger, monkeypatch):
    """Ray reads every file of it before a run begins."""
    monkeypatch.setattr("pipelines.ledger._MANY", 2)
    for number in range(3):
        commit(out, f"a_{number:06d}", [result(number)])
    everything = ids(*map(result, range(3)))
    assert sorted(ledger.mend()) == everything == committed(out)
    assert len(list((out / "run/checkpoint").iterdir())) == 1
    assert len(list(out.glob("results/*/*/*.parquet"))) == 3
    commit(out, "b_000000", [result(3)])
    ledger.mend()
    assert len(list((out / "run/checkpoint").iterdir())) == 2


@pytest.fixture
def many(out, monkeypatch):
    """Results in five files of one folder and one of another; the first is of a version with another column."""
    monkeypatch.setattr("pipelines.ledger._MANY", 4)
    for number in range(5):
        commit(out, f"a_{number:06d}", [result(2 * number), result(2 * number + 1)])
    commit(out, "b_000000", [result(10, failed=True)])
    first = out / "results/status=ok/method=none/a_000000-0.parquet"
    table = pq.read_table(first, partitioning=None)
    pq.write_table(table.drop_columns(["notes"]).append_column("older", pa.array([1.0, 2.0])), first)
    return [result(number) for number in range(10)] + [result(10, failed=True)]


@pytest.mark.parametrize(("rows", "files"), [(1000, 1), (4, 3)])
def test_many_result_files_become_few_with_all_that_was_in_them(out, ledger, many, monkeypatch, rows, files):
    monkeypatch.setattr("pipelines.ledger._ROWS", rows)
    columns = [field.name for field in ResultRow.arrow_schema()]
    before = {row["sample_id"]: row for table in ledger.scan(columns) for row in table.to_pylist()}
    ledger.gather()
    assert len(list(out.glob("results/status=ok/*/*.parquet"))) == files
    assert len(list(out.glob("results/status=failed/*/b_000000-0.parquet"))) == 1
    after = [row for table in ledger.scan(columns) for row in table.to_pylist()]
    assert len(after) == len(before) == len(many)
    assert {row["sample_id"]: row for row in after} == before
    assert sorted(ledger.mend()) == ids(*many) == committed(out)
    made = [pq.ParquetFile(file).read() for file in out.glob("results/status=ok/*/*.parquet")]
    older = [value for table in made if "older" in table.column_names for value in table["older"].to_pylist()]
    assert [value for value in older if value] == [1.0, 2.0]
    names = sorted(out.rglob("*.parquet"))
    monkeypatch.setattr("pipelines.ledger._MANY", 0)
    (out / "results/status=failed/method=none/b_000000-0.parquet").unlink()
    ledger.gather()
    assert sorted(out.glob("results/status=ok/*/*.parquet")) == [name for name in names if "status=ok" in str(name)]


def test_gathering_that_dies_leaves_every_row_once_after_mending(out, ledger, many, monkeypatch):
    def dies(_):
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(ledger._storage, "delete_all", dies)
        with pytest.raises(OSError, match="killed"):
            ledger.gather()
    assert len(list(out.glob("results/status=ok/*/*.parquet"))) == 6
    assert sorted(ledger.mend()) == ids(*many)
    assert sum(table.num_rows for table in ledger.scan(["sample_id"])) == len(many)
