"""Every byte in and out: the same promises on disk and on S3, and on an S3 that stumbles."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from pipelines import storage as module
from pipelines.storage import Storage, StorageUnavailable, join, scheme
from schemas import RowError, StorageSettings
from support.fault_proxy import FaultProxy, Rule

DATA = bytes(range(256)) * 400
DIGEST = hashlib.sha256(DATA).hexdigest()
MUCH = 2**30


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    return str(tmp_path / "root") if request.param == "local" else f"s3://{request.getfixturevalue('bucket')}/root"


@pytest.fixture
def storage():
    return Storage(StorageSettings(attempts=3), sleep=lambda seconds: None)


def failure(call, *args, **kwargs):
    with pytest.raises(RowError) as caught:
        call(*args, **kwargs)
    return caught.value.code.value, caught.value.message


# ---- promises that hold everywhere


def test_what_is_written_is_read(storage, root):
    storage.write(f"{root}/a/b.bin", DATA)
    assert storage.read(f"{root}/a/b.bin") == DATA
    storage.write(f"{root}/a/b.bin", b"new")
    assert storage.read(f"{root}/a/b.bin") == b"new"


def test_only_one_can_create(storage, root):
    assert storage.create(f"{root}/lock", b"first")
    assert not storage.create(f"{root}/lock", b"second")
    assert storage.read(f"{root}/lock") == b"first"


def test_objects_are_found_below_a_prefix(storage, root):
    for name in ("b/2.mp4", "a/1.mp4", "a/c/3.txt"):
        storage.write(f"{root}/{name}", b"x")
    assert storage.find(root) == [f"{root}/a/1.mp4", f"{root}/a/c/3.txt", f"{root}/b/2.mp4"]
    assert storage.find(f"{root}/nowhere") == []
    assert storage.glob(f"{root}/*/*.mp4") == [f"{root}/a/1.mp4", f"{root}/b/2.mp4"]
    assert storage.details(f"{root}/a").keys() == {"1.mp4", "c/3.txt"}
    assert storage.is_folder(f"{root}/a")
    assert not storage.is_folder(f"{root}/a/1.mp4")


def test_a_new_object_is_seen_at_once(storage, root):
    assert not storage.exists(f"{root}/a")
    Storage().write(f"{root}/a", b"x")  # by another process, so to say
    assert storage.exists(f"{root}/a")
    storage.delete(f"{root}/a")
    storage.delete(f"{root}/a")
    assert not storage.exists(f"{root}/a")


def test_put_and_fetch(storage, root, tmp_path):
    (tmp_path / "up").write_bytes(DATA)
    storage.put(tmp_path / "up", f"{root}/v.mp4")
    assert storage.fetch(f"{root}/v.mp4", tmp_path / "down", most_bytes=MUCH, digest=DIGEST) == DIGEST
    assert (tmp_path / "down").read_bytes() == DATA


def test_what_cannot_be_fetched_says_why(storage, root, tmp_path):
    storage.write(f"{root}/a/v.mp4", DATA)
    local = tmp_path / "down"
    assert failure(storage.fetch, f"{root}/nowhere", local, most_bytes=MUCH)[0] == "reference_missing"
    assert failure(storage.fetch, f"{root}/a", local, most_bytes=MUCH)[0] == "reference_missing"
    code, message = failure(storage.fetch, f"{root}/a/v.mp4", local, most_bytes=1000)
    assert (code, "limits.max_reference_mib" in message) == ("reference_too_large", True)
    code, message = failure(storage.fetch, f"{root}/a/v.mp4", local, most_bytes=MUCH, digest="0" * 64)
    assert (code, "plan again" in message) == ("reference_changed", True)


def test_arrow_reads_and_writes_the_same_places(storage, root):
    filesystem, path = storage.arrow(f"{root}/table")
    filesystem.create_dir(path, recursive=True)
    pq.write_table(pa.table({"x": [1, 2]}), f"{path}/part.parquet", filesystem=filesystem)
    assert storage.find(f"{root}/table") == [f"{root}/table/part.parquet"]
    assert ds.dataset(path, filesystem=filesystem).to_table()["x"].to_pylist() == [1, 2]


@pytest.mark.parametrize("uri", ["ftp://host/a", "http://host/a", "gs://b/a"])
def test_other_schemes_are_refused(storage, uri):
    code, message = failure(storage.read, uri)
    assert code == "scheme_forbidden"
    assert uri in message


def test_names():
    assert scheme("s3://b/a") == "s3"
    assert scheme("/a:b/c") == scheme("C:/x") == scheme("a.mp4") == "file"
    assert join("s3://b/a/", "c", "d") == "s3://b/a/c/d"


# ---- on disk


def test_a_write_that_breaks_leaves_nothing(storage, tmp_path, monkeypatch):
    def breaks(source, target):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "up").write_bytes(DATA)
    monkeypatch.setattr(module.shutil, "copyfile", breaks)
    with pytest.raises(OSError, match="No space left"):
        storage.put(tmp_path / "up", str(tmp_path / "out" / "v.mp4"))
    assert list((tmp_path / "out").iterdir()) == []


# ---- on an S3 that stumbles


@pytest.fixture
def stumbling(bucket, s3_server):
    """(rules -> storage behind a proxy with these faults, its proxy, the address of an object of DATA)."""
    uri = f"s3://{bucket}/v.mp4"
    Storage().write(uri, DATA)
    with FaultProxy(s3_server) as proxy:

        def behind(*rules, **settings):
            proxy.rules = list(rules)
            options = {"endpoint_url": proxy.url, "attempts": 4, "timeout_s": 2} | settings
            return Storage(StorageSettings(**options), sleep=lambda seconds: None)

        yield behind, proxy, uri


@pytest.mark.parametrize(
    "rule",
    [
        Rule(method="GET", status=503, count=3),
        Rule(method="GET", status=500, code="InternalError", count=2),
        Rule(method="GET", fault="reset", at_byte=5000, count=1),
        Rule(method="GET", fault="truncate", at_byte=5000, count=1),
        Rule(method="GET", fault="corrupt", count=2),
        Rule(method="GET", fault="stall", at_byte=5000, count=1),
        Rule(method="HEAD", status=503, count=2),
    ],
    ids=lambda rule: f"{rule.method}-{rule.fault}-{rule.status}",
)
def test_a_short_fault_of_a_download_is_not_noticed(stumbling, tmp_path, rule):
    behind, proxy, uri = stumbling
    behind(rule).fetch(uri, tmp_path / "down", most_bytes=MUCH, digest=DIGEST)
    assert (tmp_path / "down").read_bytes() == DATA
    assert proxy.hits


@pytest.mark.parametrize(
    "rule",
    [
        Rule(method="PUT", status=503, count=3),
        Rule(method="PUT", fault="reset", count=1),
        Rule(method="PUT", fault="drop_response", count=1),
    ],
    ids=lambda rule: rule.fault,
)
def test_a_short_fault_of_an_upload_is_not_noticed(stumbling, tmp_path, rule):
    behind, proxy, uri = stumbling
    (tmp_path / "up").write_bytes(DATA[::-1])
    behind(rule).put(tmp_path / "up", uri)
    assert Storage().read(uri) == DATA[::-1]
    assert proxy.hits


def test_a_lost_reply_to_a_create_is_not_taken_for_somebody_else(stumbling, bucket):
    behind, proxy, _ = stumbling
    assert behind(Rule(method="PUT", fault="drop_response", count=1)).create(f"s3://{bucket}/lock", b"mine")
    assert proxy.hits


def test_a_long_fault_is_a_transient_error_of_the_row(stumbling, tmp_path):
    behind, _, uri = stumbling
    storage = behind(Rule(status=503), attempts=2)
    code, message = failure(storage.fetch, uri, tmp_path / "down", most_bytes=MUCH)
    assert code == "storage_unavailable"
    assert "still failing after 2 tries" in message
    with pytest.raises(StorageUnavailable):
        storage.write(uri, b"x")
    assert Storage().read(uri) == DATA  # whole, as before


def test_a_refusal_is_not_tried_again(stumbling, tmp_path):
    behind, proxy, uri = stumbling
    storage = behind(Rule(status=403, code="AccessDenied"))
    assert failure(storage.fetch, uri, tmp_path / "down", most_bytes=MUCH)[0] == "reference_forbidden"
    assert len(proxy.hits) <= 2


def test_tables_survive_short_faults_as_well(stumbling, bucket):
    behind, proxy, _ = stumbling
    filesystem, path = behind(Rule(method="PUT", status=503, count=2), Rule(method="GET", status=503, count=2)).arrow(
        f"s3://{bucket}/t.parquet"
    )
    pq.write_table(pa.table({"x": [1]}), path, filesystem=filesystem)
    assert pq.read_table(path, filesystem=filesystem)["x"].to_pylist() == [1]
    assert len(proxy.hits) == 4


def test_messages_hold_no_credentials(stumbling, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    behind, _, uri = stumbling
    for rule in (Rule(status=403, code="AccessDenied"), Rule(status=503)):
        assert "hush" not in failure(behind(rule, attempts=1).fetch, uri, tmp_path / "down", most_bytes=MUCH)[1]
