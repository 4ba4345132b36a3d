"""Whole Parquet files, one and many."""

from collections import Counter

import pyarrow as pa
import pytest
import s3fs

from pipelines import parquet
from pipelines.storage import Storage, join

SCHEMA = pa.schema([("name", pa.string()), ("new", pa.float64()), ("number", pa.int64())])


@pytest.fixture(params=["disk", "s3"])
def folder(request, tmp_path):
    return str(tmp_path) if request.param == "disk" else f"s3://{request.getfixturevalue('bucket')}/tables"


def test_what_was_written_is_read_whole_or_in_part(folder):
    table = pa.table({"number": [1, 2], "name": ["a", None]})
    uri = join(folder, "one.parquet")
    parquet.write(Storage(), uri, table)
    assert parquet.read(Storage(), uri) == table
    assert parquet.read(Storage(), uri, ["name"]).to_pylist() == [{"name": "a"}, {"name": None}]
    assert parquet.read(Storage(), uri, ["name", "number"]).column_names == ["name", "number"]
    with pytest.raises(KeyError, match="new"):
        parquet.read(Storage(), uri, ["new"])


def test_columns_of_a_later_version_are_null_and_types_are_those_of_the_schema(tmp_path):
    uri = str(tmp_path / "old.parquet")
    parquet.write(Storage(), uri, pa.table({"number": pa.array([7], pa.int32()), "gone": [True]}))
    found = parquet.read(Storage(), uri, schema=SCHEMA)
    assert found.schema == SCHEMA
    assert found.to_pylist() == [{"name": None, "new": None, "number": 7}]
    assert parquet.read(Storage(), uri, ["new"], SCHEMA).to_pylist() == [{"new": None}]


def test_many_files_come_in_order_with_no_more_than_a_few_read_ahead(tmp_path, monkeypatch):
    uris = [str(tmp_path / f"{number:03d}.parquet") for number in range(3 * parquet._AHEAD)]
    for number, uri in enumerate(uris):
        parquet.write(Storage(), uri, pa.table({"number": [number]}))
    asked, read = [], parquet.read
    monkeypatch.setattr(parquet, "read", lambda storage, uri, *rest: asked.append(uri) or read(storage, uri, *rest))
    found = parquet.each(Storage(), uris)
    for number, uri in enumerate(uris):
        at, table = next(found)
        assert (at, table.to_pylist()) == (uri, [{"number": number}])
        assert len(asked) <= number + parquet._AHEAD
    assert list(found) == []
    asked.clear()
    one = parquet.each(Storage(), iter(uris))
    next(one)
    one.close()  # who stops early waits for nothing
    assert len(asked) <= parquet._AHEAD
    assert list(parquet.each(Storage(), [])) == []


def test_a_file_that_is_none_is_named(folder):
    for name, content in (("text", b"no table"), ("cut", None)):
        uri = join(folder, f"{name}.parquet")
        parquet.write(Storage(), uri, pa.table({"number": list(range(1000))}))
        Storage().write(uri, content or Storage().read(uri)[:-20])
        with pytest.raises(pa.ArrowInvalid, match=rf"{name}\.parquet: "):
            list(parquet.each(Storage(), [uri]))


def test_a_file_on_s3_is_one_request(bucket, monkeypatch):
    uris = [f"s3://{bucket}/{number}.parquet" for number in range(5)]
    for uri in uris:
        parquet.write(Storage(), uri, pa.table({"number": [1]}))
    calls, call = Counter(), s3fs.S3FileSystem._call_s3

    async def counted(self, method, *args, **kwargs):
        calls[method] += 1
        return await call(self, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counted)
    assert sum(table.num_rows for _, table in parquet.each(Storage(), uris, ["number"])) == 5
    assert calls == {"get_object": 5}
