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


def no_sleep(seconds):
    pass


@pytest.fixture
def storage():
    return Storage(StorageSettings(attempts=3), sleep=no_sleep)


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


def test_of_many_at_once_one_creates(storage, root):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda n: storage.create(f"{root}/lock", b"%d" % n), range(8)))
    assert sum(made) == 1
    assert storage.read(f"{root}/lock") == b"%d" % made.index(True)


def test_what_was_there_and_went_away_was_not_created_here(storage, root, monkeypatch):
    storage.write(f"{root}/lock", b"theirs")
    monkeypatch.setattr(Storage, "read", Mock(side_effect=FileNotFoundError))
    assert not storage.create(f"{root}/lock", b"mine")


@pytest.mark.parametrize("name", ["a b.mp4", "é🎈.mp4", "a+b%20c#d&e.mp4", "day=1/x.mp4"])
def test_names_are_taken_as_they_are(storage, root, name):
    storage.write(f"{root}/{name}", DATA)
    assert storage.find(root) == [f"{root}/{name}"]
    assert storage.read(f"{root}/{name}") == DATA


@pytest.mark.parametrize("size", [0, 1, len(DATA)])
def test_any_size_arrives(storage, root, tmp_path, size):
    storage.write(f"{root}/a", DATA[:size])
    found = storage.fetch(f"{root}/a", tmp_path / "down", most_bytes=size)
    assert found == hashlib.sha256(DATA[:size]).hexdigest() == sha256(tmp_path / "down")


def test_a_prefix_ends_at_a_slash(storage, root):
    storage.write(f"{root}/a/1", b"x")
    storage.write(f"{root}/ab/2", b"x")
    assert storage.find(f"{root}/a") == [f"{root}/a/1"]
    assert storage.find(f"{root}/a/") == [f"{root}/a/1"]


def test_storage_travels_between_processes_without_its_connections(storage, root, monkeypatch):
    storage.write(f"{root}/a", DATA)
    travelled = pickle.dumps(storage)
    assert b"AWS" not in travelled and b"test" not in travelled.replace(b"test_storage", b"")
    assert pickle.loads(travelled).read(f"{root}/a") == DATA


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


@pytest.mark.parametrize("uri", ["ftp://host/a", "http://host/a", "https://host/a", "gs://b/a", "concat://[a"])
def test_other_schemes_are_refused(storage, uri):
    code, message = failure(storage.read, uri)
    assert code == "scheme_forbidden"
    assert uri in message


def test_names():
    assert scheme("s3://b/a") == scheme("S3://b/[1") == "s3"
    assert scheme("/a:b/c") == scheme("C:/x") == scheme("a.mp4") == scheme("file:///a") == "file"
    assert join("s3://b/a/", "c", "d") == "s3://b/a/c/d"


# ---- on disk


class Broken(io.FileIO):
    """A disk that is full after some bytes."""

    def write(self, data):
        super().write(data[:100])
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("way", ["write", "create", "put"])
@pytest.mark.parametrize("before", [[], ["v.mp4"]])
def test_a_write_that_breaks_leaves_what_was_there(storage, tmp_path, monkeypatch, way, before):
    (tmp_path / "up").write_bytes(DATA)
    out = tmp_path / "out"
    out.mkdir()
    for name in before:
        (out / name).write_bytes(b"old")
    if way == "create" and before:
        return
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(builtins, "open", lambda path, mode="r", *_: real_open(path, mode))
        patch.setattr(io, "open", lambda path, mode="r", *_, **__: real_open(path, mode))
        patch.setattr(module.shutil, "copyfile", lambda source, target: real_open(target, "wb").write(DATA))
        getattr(storage, way)(*((tmp_path / "up", str(out / "v.mp4")) if way == "put" else (str(out / "v.mp4"), DATA)))
    assert [path.name for path in out.iterdir()] == before
    assert all((out / name).read_bytes() == b"old" for name in before)


def test_home_and_file_urls_are_paths(storage, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    storage.write("~/a", b"x")
    assert storage.read(f"file://{tmp_path}/a") == b"x"
    assert storage.find(f"file://{tmp_path}") == [f"{tmp_path}/a"]


def test_a_file_that_may_not_be_read_is_forbidden(storage, tmp_path, monkeypatch):
    monkeypatch.setattr(module.LocalFileSystem, "info", Mock(side_effect=PermissionError(errno.EACCES, "denied")))
    assert failure(storage.fetch, str(tmp_path / "a"), tmp_path / "down", most_bytes=MUCH)[0] == "reference_forbidden"


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
            return Storage(StorageSettings(**options), sleep=no_sleep)

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
