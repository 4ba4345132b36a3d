"""Every byte in and out: the same promises on disk and on S3, and on an S3 that stumbles."""

import contextlib
import errno
import hashlib
import os
import pickle
import resource
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import boto3
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from botocore.config import Config

from pipelines import storage as module
from pipelines.storage import Storage, StorageUnavailable, Unwritable, join, scheme, sha256, transient
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
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    travelled = pickle.dumps(Storage())
    assert len(travelled) < 1000 and b"hush" not in travelled
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


def test_what_is_deleted_is_gone_one_or_many_there_or_not(storage, root):
    uris = [f"{root}/{number}" for number in range(40)]
    for uri in uris:
        storage.write(uri, b"x")
    storage.delete(uris[0])
    storage.delete(uris[0])
    storage.delete_all(uris[:30])
    assert storage.find(root) == sorted(uris[30:])
    storage.delete_all([])


def test_a_new_object_is_seen_at_once(storage, root):
    assert not storage.exists(f"{root}/a")
    assert storage.find(root) == []
    Storage().write(f"{root}/a", b"x")  # by another process, so to say
    assert storage.find(root) == [f"{root}/a"]
    assert storage.exists(f"{root}/a")
    storage.delete(f"{root}/a")
    storage.delete(f"{root}/a")
    assert not storage.exists(f"{root}/a")


def test_put_and_fetch(storage, root, tmp_path):
    (tmp_path / "up").write_bytes(DATA)
    storage.put(tmp_path / "up", f"{root}/v.mp4")
    assert storage.fetch(f"{root}/v.mp4", tmp_path / "down", most_bytes=MUCH, digest=DIGEST) == DIGEST
    assert (tmp_path / "down").read_bytes() == DATA


def test_a_place_that_takes_no_file_is_told_from_one_that_does_not_answer(storage, tmp_path, monkeypatch):
    (tmp_path / "videos").write_text("a file")
    with pytest.raises(Unwritable, match=r"videos/v\.mp4: cannot be written"):
        storage.put(__file__, str(tmp_path / "videos" / "v.mp4"))
    monkeypatch.setattr(module, "_write_local", Mock(side_effect=StorageUnavailable("503")))
    with pytest.raises(StorageUnavailable, match="503"):
        storage.put(__file__, str(tmp_path / "v.mp4"))


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


@contextlib.contextmanager
def full_disk():
    """No file may grow over 1000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


WAYS = {
    "write": lambda storage, local, uri: storage.write(uri, local.read_bytes()),
    "put": lambda storage, local, uri: storage.put(local, uri),
    "create": lambda storage, local, uri: storage.create(uri, local.read_bytes()),
}


@pytest.mark.parametrize(
    ("way", "before"), [("write", []), ("put", []), ("create", []), ("write", [b"x"]), ("put", [b"x"])]
)
@pytest.mark.parametrize("size", [2000, len(DATA)])
def test_a_write_that_breaks_leaves_what_was_there_before(storage, tmp_path, way, before, size):
    (tmp_path / "up").write_bytes(DATA[:size])
    out = tmp_path / "out"
    for content in before:
        storage.write(str(out / "v.mp4"), content)
    with pytest.raises(OSError, match="File too large"), full_disk():
        WAYS[way](storage, tmp_path / "up", str(out / "v.mp4"))
    assert [(path.name, path.read_bytes()) for path in out.iterdir()] == [("v.mp4", content) for content in before]


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
    bare = Config(request_checksum_calculation="when_required")  # else clients catch corruption before we do
    boto3.client("s3", endpoint_url=s3_server, config=bare).put_object(Bucket=bucket, Key="v.mp4", Body=DATA)
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
    storage = behind(rule, timeout_s=1 if rule.fault == "stall" else 10)
    began = time.monotonic()
    storage.fetch(uri, tmp_path / "down", most_bytes=MUCH, digest=DIGEST)
    assert time.monotonic() - began < 30  # a stall goes on for 60
    assert (tmp_path / "down").read_bytes() == DATA
    assert proxy.hits


@pytest.mark.parametrize(
    ("way", "rule"),
    [
        ("put", Rule(method="PUT", status=503, count=3)),
        ("put", Rule(method="PUT", status=500, code="InternalError", count=3)),
        ("put", Rule(method="PUT", fault="reset", count=1)),
        ("put", Rule(method="PUT", fault="drop_response", count=1)),
        ("write", Rule(method="PUT", fault="reset", count=1)),
        ("create", Rule(method="PUT", status=503, count=1)),
        ("create", Rule(method="PUT", fault="drop_response", count=1)),  # not taken for somebody else's
    ],
    ids=lambda value: f"{value.fault}-{value.status}" if isinstance(value, Rule) else value,
)
def test_a_short_fault_of_an_upload_is_not_noticed(stumbling, bucket, tmp_path, way, rule):
    behind, proxy, _ = stumbling
    (tmp_path / "up").write_bytes(DATA)
    assert WAYS[way](behind(rule), tmp_path / "up", f"s3://{bucket}/new") in (None, True)
    assert Storage().read(f"s3://{bucket}/new") == DATA
    assert proxy.hits


@pytest.mark.parametrize(("way", "fault"), [("write", "status"), ("put", "drop_response"), ("create", "status")])
def test_a_long_fault_of_an_upload_leaves_a_whole_object_or_none(stumbling, bucket, tmp_path, way, fault):
    behind, _, _ = stumbling
    (tmp_path / "up").write_bytes(DATA)
    with pytest.raises(StorageUnavailable, match=f"s3://{bucket}/new: still failing after 4 tries"):
        WAYS[way](behind(Rule(fault=fault)), tmp_path / "up", f"s3://{bucket}/new")
    found = [Storage().read(uri) for uri in Storage().find(f"s3://{bucket}") if uri.endswith("/new")]
    assert found in ([], [DATA])


READS = {
    "read": lambda storage, uri, local: storage.read(uri),
    "fetch": lambda storage, uri, local: storage.fetch(uri, local, most_bytes=MUCH),
    "exists": lambda storage, uri, local: storage.exists(uri),
    "is_folder": lambda storage, uri, local: storage.is_folder(uri),
    "find": lambda storage, uri, local: storage.find(uri),
    "glob": lambda storage, uri, local: storage.glob(f"{uri}/*"),
    "details": lambda storage, uri, local: storage.details(uri),
    "delete": lambda storage, uri, local: storage.delete(uri),
}


@pytest.mark.parametrize("way", READS)
def test_a_long_fault_is_tried_as_often_as_was_asked_and_said_with_the_address(stumbling, tmp_path, way):
    behind, proxy, uri = stumbling
    waited = []
    storage = behind(Rule())
    storage._sleep = waited.append
    with pytest.raises((StorageUnavailable, RowError), match="still failing after 4 tries") as caught:
        READS[way](storage, uri, tmp_path / "down")
    assert getattr(caught.value, "code", "storage_unavailable") == "storage_unavailable"
    assert uri in str(caught.value)
    assert len(proxy.hits) == 4  # and no loop around it or in it makes them more
    assert len(waited) == 3 and waited[0] < waited[1] < waited[2] <= 20


def test_waiting_has_an_upper_bound_and_is_not_the_same_for_all():
    def waited():
        found = []
        storage = Storage(StorageSettings(attempts=20), sleep=found.append)
        with pytest.raises(StorageUnavailable):
            storage._retry("x", Mock(side_effect=OSError("busy")))
        return found

    assert max(waited()) <= 20
    assert waited() != waited()


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (OSError(errno.EBUSY, "SlowDown"), True),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (FileNotFoundError(), False),
        (PermissionError(), False),
        (FileExistsError(), False),
        (OSError(errno.ENOSPC, "full"), False),
        (ValueError("a bug"), False),
        (RowError("truncated", "a fact"), False),
    ],
)
def test_what_another_try_may_mend_is_tried_again(error, again):
    tried = Mock(side_effect=error)
    assert transient(error) == again
    with pytest.raises(StorageUnavailable if again else type(error)):
        Storage(StorageSettings(attempts=3), sleep=no_sleep)._retry("x", tried)
    assert tried.call_count == (3 if again else 1)


@pytest.mark.parametrize("way", ["put", "fetch"])
def test_bytes_that_do_not_all_arrive_are_tried_again_and_never_taken_for_whole(storage, tmp_path, monkeypatch, way):
    short = Mock()
    short.info.return_value = {"type": "file", "size": len(DATA) - 1 if way == "put" else len(DATA) + 1}
    short.get_file.side_effect = lambda path, local: (tmp_path / "down").write_bytes(DATA)
    monkeypatch.setattr(module, "_s3", lambda *_: short)
    (tmp_path / "up").write_bytes(DATA)
    with pytest.raises((StorageUnavailable, RowError), match=r"after 3 tries.* of \d+ bytes arrived"):
        if way == "put":
            storage.put(tmp_path / "up", "s3://b/a")
        else:
            storage.fetch("s3://b/a", tmp_path / "down", most_bytes=MUCH)
    assert max(short.get_file.call_count, short.pipe_file.call_count) == 3


@pytest.mark.parametrize(("size", "tries"), [(50 * 2**20, 1), (50 * 2**20 + 1, 4)])
def test_requests_are_retried_by_themselves_only_where_an_object_goes_in_parts(tmp_path, monkeypatch, size, tries):
    asked = []
    fake = Mock()
    fake.info.return_value = {"type": "file", "size": size}
    fake.get_file.side_effect = lambda path, local: os.truncate(local, size)
    monkeypatch.setattr(module, "_s3", lambda settings, tries: asked.append(tries) or fake)
    (tmp_path / "down").touch()
    Storage(StorageSettings(attempts=4)).fetch("s3://b/a", tmp_path / "down", most_bytes=MUCH)
    assert asked == [1, tries]


def test_a_refusal_is_not_tried_again(stumbling, tmp_path):
    behind, proxy, uri = stumbling
    storage = behind(Rule(status=403, code="AccessDenied"))
    assert failure(storage.fetch, uri, tmp_path / "down", most_bytes=MUCH)[0] == "reference_forbidden"
    with pytest.raises(PermissionError, match=f"read {uri}"):
        storage.read(uri)
    assert len(proxy.hits) == 2


def test_a_name_that_no_bucket_can_have_is_a_fact_about_the_row(storage, bucket, tmp_path):
    code, message = failure(storage.fetch, "s3://no bucket/v.mp4", tmp_path / "down", most_bytes=MUCH)
    assert code == "reference_missing" and "s3://no bucket/v.mp4" in message
    with pytest.raises(Unwritable, match=r"s3://no bucket/v\.mp4: cannot be written .*Invalid bucket name"):
        storage.put(__file__, "s3://no bucket/v.mp4")


def test_a_profile_that_is_not_there_is_said_at_once(tmp_path, bucket):
    sleep = Mock()
    with pytest.raises(PermissionError, match=r"The config profile \(nobody\) could not be found"):
        Storage(StorageSettings(profile="nobody"), sleep=sleep).read(f"s3://{bucket}/v.mp4")
    assert not sleep.called


def test_a_bucket_that_is_not_there_is_named(storage, s3_server):
    with pytest.raises(FileNotFoundError, match="write s3://no-such-bucket/a"):
        storage.write("s3://no-such-bucket/a", b"x")
    assert storage.find("s3://no-such-bucket/a") == []
    assert not storage.exists("s3://no-such-bucket/a")


def test_what_another_process_makes_is_seen_at_once(storage, bucket, s3_server):
    other = boto3.client("s3", endpoint_url=s3_server)
    names = []
    for name in ("a/1", "a/2"):
        other.put_object(Bucket=bucket, Key=name, Body=b"x")
        names.append(f"s3://{bucket}/{name}")
        assert storage.find(f"s3://{bucket}/a") == storage.glob(f"s3://{bucket}/a/*") == names
        assert storage.exists(names[-1])
        assert len(storage.details(f"s3://{bucket}/a")) == len(names)


def test_markers_of_folders_are_no_objects(storage, bucket, s3_server):
    boto3.client("s3", endpoint_url=s3_server).put_object(Bucket=bucket, Key="clips/", Body=b"")
    storage.write(f"s3://{bucket}/clips/a.mp4", b"x")
    assert storage.find(f"s3://{bucket}/clips") == [f"s3://{bucket}/clips/a.mp4"]
    assert storage.details(f"s3://{bucket}/clips").keys() == {"a.mp4"}


@pytest.mark.parametrize(
    "faults",
    [
        [Rule(method="PUT", status=503, count=1), Rule(method="GET", status=503, count=1)],
        [Rule(method="PUT", status=500, code="InternalError", count=1), Rule(method="HEAD", status=503, count=1)],
        [Rule(method="PUT", fault="drop_response", count=1), Rule(method="GET", fault="reset", at_byte=10, count=1)],
        [
            Rule(method="HEAD", fault="drop_response", count=1),
            Rule(method="GET", fault="truncate", at_byte=10, count=1),
        ],
    ],
    ids=lambda faults: "-".join(f"{rule.method}-{rule.fault}-{rule.status}" for rule in faults),
)
def test_tables_survive_short_faults_as_well(stumbling, bucket, faults):
    behind, proxy, _ = stumbling
    filesystem, path = behind(*faults).arrow(f"s3://{bucket}/t.parquet")
    filesystem = pickle.loads(pickle.dumps(filesystem))  # as the workers that write get it
    pq.write_table(pa.table({"x": [1]}), path, filesystem=filesystem)
    assert pq.read_table(path, filesystem=filesystem)["x"].to_pylist() == [1]
    assert len(proxy.hits) == 2


def write_table(storage, local, uri):
    filesystem, path = storage.arrow(uri)
    pq.write_table(pa.table({"x": [1]}), path, filesystem=filesystem)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("way", [*WAYS.values(), write_table], ids=[*WAYS, "arrow"])
def test_an_upload_to_a_server_that_never_answers_is_given_up(s3_server, tmp_path, way):
    (tmp_path / "up").write_bytes(DATA)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        storage = Storage(StorageSettings(endpoint_url=url, attempts=1, timeout_s=0.2))
        with pytest.raises(Exception, match="Read timeout"):
            way(storage, tmp_path / "up", "s3://bucket/a")


@pytest.mark.timeout(30)
def test_an_upload_to_a_server_that_stops_reading_is_given_up(s3_server):
    with socket.create_server(("127.0.0.1", 0)) as full:
        url = f"http://127.0.0.1:{full.getsockname()[1]}"
        storage = Storage(StorageSettings(endpoint_url=url, attempts=1, timeout_s=0.2))
        with pytest.raises(StorageUnavailable):
            storage.write("s3://bucket/a", bytes(16 * 2**20))  # more than the sockets hold


def test_messages_hold_no_credentials(stumbling, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    behind, _, uri = stumbling
    for rule in (Rule(status=403, code="AccessDenied"), Rule(status=503)):
        assert "hush" not in failure(behind(rule, attempts=1).fetch, uri, tmp_path / "down", most_bytes=MUCH)[1]
