"""Each fault of the proxy as a real S3 client sees it."""

import http.client
import io
import random
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import boto3
import pytest
import s3fs
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    FlexibleChecksumError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from pyarrow.fs import S3FileSystem

from .fault_proxy import FaultProxy, Rule
from .s3 import CREDENTIALS, REGION, make_bucket, moto_server

DATA = random.Random(0).randbytes(9 << 20)
SMALL = DATA[:100_000]
AUTHORIZATION = "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request"  # else moto answers 403


@pytest.fixture(scope="module")
def upstream() -> Iterator[str]:
    with moto_server() as url:
        make_bucket(url, "bkt")
        client(url).put_object(Bucket="bkt", Key="small", Body=SMALL)
        client(url).put_object(Bucket="bkt", Key="large", Body=DATA)
        yield url


@pytest.fixture
def proxy(upstream: str) -> Iterator[FaultProxy]:
    with FaultProxy(upstream, []) as proxy:
        yield proxy


def client(url: str, attempts: int = 1, **config: Any) -> Any:
    """A boto3 client that gives up after `attempts`, so that a single fault shows."""
    settings = Config(retries={"total_max_attempts": attempts}, s3={"addressing_style": "path"}, **config)
    return boto3.client("s3", endpoint_url=url, region_name=REGION, config=settings, **CREDENTIALS)


def s3fs_at(url: str, attempts: int = 1) -> s3fs.S3FileSystem:
    fs = s3fs.S3FileSystem(
        key="test",
        secret="test",
        endpoint_url=url,
        client_kwargs={"region_name": REGION},
        config_kwargs={"retries": {"total_max_attempts": attempts}},
        skip_instance_cache=True,
    )
    fs.retries = attempts
    return fs


def send(url: str, start: str, *headers: str) -> socket.socket:
    """Send the head of a request on a bare socket, which shows what no client library lets through."""
    parts = urlsplit(url)
    sock = socket.create_connection((parts.hostname, parts.port), timeout=10)
    lines = [f"{start} HTTP/1.1", f"Host: {parts.netloc}", f"Authorization: {AUTHORIZATION}", *headers, "", ""]
    sock.sendall("\r\n".join(lines).encode())
    return sock


def receive_all(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(65536), b""))


def test_multipart_round_trip_is_identical(proxy: FaultProxy) -> None:
    s3 = client(proxy.url)
    parts = TransferConfig(multipart_threshold=5 << 20, multipart_chunksize=5 << 20)
    s3.upload_fileobj(io.BytesIO(DATA), "bkt", "copy", Config=parts)
    head = s3.head_object(Bucket="bkt", Key="copy")
    assert head["ContentLength"] == len(DATA) and head["ETag"].endswith('-2"')  # it went in two parts
    assert s3.get_object(Bucket="bkt", Key="copy")["Body"].read() == DATA
    assert s3fs_at(proxy.url).cat_file("bkt/copy") == DATA
    assert proxy.hits == []


def test_s3fs_round_trip_is_identical(proxy: FaultProxy) -> None:
    fs = s3fs_at(proxy.url)
    with fs.open("bkt/s3fs", "wb", block_size=5 << 20) as file:
        file.write(DATA)
    assert fs.cat_file("bkt/s3fs") == DATA


def test_pyarrow_round_trip_is_identical(proxy: FaultProxy) -> None:
    fs = S3FileSystem(access_key="test", secret_key="test", region=REGION, endpoint_override=proxy.url)
    with fs.open_output_stream("bkt/arrow") as stream:
        stream.write(DATA)
    with fs.open_input_stream("bkt/arrow") as stream:
        assert stream.read() == DATA


def test_key_with_special_characters_passes_and_matches_decoded(proxy: FaultProxy) -> None:
    proxy.rules = [Rule(method="GET", key="/bkt/day=1/a b\\+é$")]
    s3 = client(proxy.url)
    s3.put_object(Bucket="bkt", Key="day=1/a b+é", Body=b"x")
    assert [item["Key"] for item in s3.list_objects_v2(Bucket="bkt", Prefix="day=1/")["Contents"]] == ["day=1/a b+é"]
    with pytest.raises(ClientError):
        s3.get_object(Bucket="bkt", Key="day=1/a b+é")
    assert proxy.hits == [("GET", "/bkt/day=1/a b+é", "status")]


def test_status_carries_code_and_does_not_reach_upstream(proxy: FaultProxy) -> None:
    proxy.rules = [Rule(method="PUT", status=500, code="InternalError")]
    with pytest.raises(ClientError) as error:
        client(proxy.url).put_object(Bucket="bkt", Key="never", Body=b"x")
    assert error.value.response["Error"]["Code"] == "InternalError"
    assert error.value.response["ResponseMetadata"]["HTTPStatusCode"] == 500
    assert "Contents" not in client(proxy.url).list_objects_v2(Bucket="bkt", Prefix="never")


def test_retry_after_503_works(proxy: FaultProxy) -> None:
    proxy.rules = [Rule(method="GET", key="/bkt/small", count=2)]
    assert client(proxy.url, attempts=3).get_object(Bucket="bkt", Key="small")["Body"].read() == SMALL
    assert [hit[2] for hit in proxy.hits] == ["status"] * 2 and proxy.requests == 3


def test_s3fs_retries_503(proxy: FaultProxy) -> None:
    proxy.rules = [Rule(method="GET", key="/bkt/small", nth=(1,))]
    assert s3fs_at(proxy.url, attempts=2).cat_file("bkt/small") == SMALL
    assert len(proxy.hits) == 1


def test_status_on_head_has_no_body(proxy: FaultProxy) -> None:
    proxy.rules = [Rule(method="HEAD", count=1)]
    s3 = client(proxy.url)
    with pytest.raises(ClientError, match="503"):
        s3.head_object(Bucket="bkt", Key="small")
    assert s3.head_object(Bucket="bkt", Key="small")["ContentLength"] == len(SMALL)


@pytest.mark.parametrize("at_byte", [0, 1000, 5 << 20])
def test_reset_is_a_real_rst_after_at_byte(proxy: FaultProxy, at_byte: int) -> None:
    proxy.rules = [Rule(fault="reset", at_byte=at_byte)]
    received = b""
    with send(proxy.url, "GET /bkt/large") as sock, pytest.raises(ConnectionResetError):
        while block := sock.recv(65536):
            received += block
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"Content-Length: %d\r\n" % len(DATA) in head
    assert body == DATA[:at_byte]


def test_reset_is_a_connection_error_in_clients(proxy: FaultProxy) -> None:
    proxy.rules = [Rule(method="GET", key="/bkt/large", fault="reset", at_byte=1000)]
    with pytest.raises(ResponseStreamingError, match="reset by peer"):
        client(proxy.url).get_object(Bucket="bkt", Key="large")["Body"].read()
    with pytest.raises(aiohttp.ClientPayloadError, match="ConnectionResetError"):
        s3fs_at(proxy.url).cat_file("bkt/large")
    assert [hit[2] for hit in proxy.hits] == ["reset"] * 2


def test_stall_hits_the_read_timeout(proxy: FaultProxy) -> None:
    proxy.rules = [Rule(method="GET", fault="stall", seconds=60)]
    begin = time.monotonic()
    with pytest.raises(ReadTimeoutError):
        client(proxy.url, read_timeout=1).get_object(Bucket="bkt", Key="small")["Body"].read()
    assert 0.9 < time.monotonic() - begin < 10


def test_stall_ends_with_the_body(proxy: FaultProxy) -> None:
    proxy.rules = [Rule(method="GET", fault="stall", seconds=0.5, at_byte=10)]
    begin = time.monotonic()
    assert client(proxy.url).get_object(Bucket="bkt", Key="small")["Body"].read() == SMALL
    assert time.monotonic() - begin >= 0.5


def test_leaving_the_proxy_ends_a_stall(upstream: str) -> None:
    with FaultProxy(upstream, [Rule(fault="stall", seconds=600)]) as proxy:
        sock = send(proxy.url, "GET /bkt/small")
        assert sock.recv(4096).startswith(b"HTTP/1.1 200")
    with sock:
        assert sock.recv(4096) == b""


def test_truncate_is_an_incomplete_read(proxy: FaultProxy) -> None:
    proxy.rules = [Rule(method="GET", key="/bkt/small", fault="truncate", at_byte=500)]
    with pytest.raises((IncompleteReadError, ResponseStreamingError)):
        client(proxy.url).get_object(Bucket="bkt", Key="small")["Body"].read()
    with send(proxy.url, "GET /bkt/small") as sock:
        head, _, body = receive_all(sock).partition(b"\r\n\r\n")
    assert b"Content-Length: %d\r\n" % len(SMALL) in head and body == SMALL[:500]
    assert len(proxy.hits) == 2


def test_truncate_beyond_the_body_is_no_hit(proxy: FaultProxy) -> None:
    proxy.rules = [Rule(fault="truncate", at_byte=len(SMALL))]
    assert client(proxy.url).get_object(Bucket="bkt", Key="small")["Body"].read() == SMALL
    assert proxy.hits == []


@pytest.mark.parametrize("at_byte", [0, 7, 10**9])
def test_corrupt_flips_one_bit(proxy: FaultProxy, at_byte: int) -> None:
    proxy.rules = [Rule(method="GET", fault="corrupt", at_byte=at_byte)]
    s3 = client(proxy.url, response_checksum_validation="when_required")
    body = s3.get_object(Bucket="bkt", Key="small")["Body"].read()
    flipped = int.from_bytes(body, "big") ^ int.from_bytes(SMALL, "big")
    assert len(body) == len(SMALL) and flipped.bit_count() == 1


def test_corrupt_is_caught_by_a_checksum_of_the_client(proxy: FaultProxy) -> None:
    proxy.rules = [Rule(method="GET", fault="corrupt")]
    client(proxy.url).put_object(Bucket="bkt", Key="summed", Body=SMALL, ChecksumAlgorithm="CRC32")
    with pytest.raises(FlexibleChecksumError):
        client(proxy.url).get_object(Bucket="bkt", Key="summed", ChecksumMode="ENABLED")["Body"].read()


def test_drop_response_takes_effect_upstream(proxy: FaultProxy, upstream: str) -> None:
    proxy.rules = [Rule(method="PUT", fault="drop_response")]
    with pytest.raises(ConnectionClosedError):
        client(proxy.url).put_object(Bucket="bkt", Key="dropped", Body=b"done")
    assert client(upstream).get_object(Bucket="bkt", Key="dropped")["Body"].read() == b"done"
    assert proxy.hits == [("PUT", "/bkt/dropped", "drop_response")]


def test_counts_order_and_replacement_of_rules(proxy: FaultProxy) -> None:
    def status() -> int:
        with send(proxy.url, "HEAD /bkt/small", "Connection: close") as sock:
            return int(receive_all(sock).split()[1])

    proxy.rules = [Rule(nth=(1, 3)), Rule(count=3, status=500), Rule(method="PUT", status=400)]
    assert [status() for _ in range(4)] == [503, 500, 503, 200]
    proxy.rules = [Rule(count=1)]
    assert [status() for _ in range(2)] == [503, 200]


def test_chunked_body_and_expect_on_one_connection(proxy: FaultProxy, upstream: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=10)
    sockets = []
    for _ in range(2):
        body, headers = iter([b"ab", b"c" * 70_000]), {"Authorization": AUTHORIZATION}
        connection.request("PUT", "/bkt/chunked", body, headers, encode_chunked=True)
        response = connection.getresponse()
        assert (response.status, response.read()) == (200, b"")
        sockets.append(connection.sock)
    assert sockets[0] is sockets[1] is not None  # http.client would open a new one by itself
    assert client(upstream).get_object(Bucket="bkt", Key="chunked")["Body"].read() == b"ab" + b"c" * 70_000
    connection.close()

    expecting = ("Content-Length: 3", "Connection: close", "Expect: 100-continue")
    with send(proxy.url, "PUT /bkt/expected", *expecting) as sock:
        assert sock.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"abc")
        assert sock.recv(4096).startswith(b"HTTP/1.1 200")
    assert client(upstream).get_object(Bucket="bkt", Key="expected")["Body"].read() == b"abc"


def test_host_header_reaches_upstream_unchanged() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    with server, FaultProxy(f"http://127.0.0.1:{server.getsockname()[1]}", []) as proxy:
        connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=10)
        connection.request("GET", "/bkt/k?x=%2F", headers={"Host": "bucket.s3.example:99"})
        upstream, _ = server.accept()
        with upstream:
            request = upstream.recv(65536)
            upstream.sendall(b"HTTP/1.1 200 OK\r\n\r\nuntil the end")
        assert request.startswith(b"GET /bkt/k?x=%2F HTTP/1.1\r\n")
        assert request.count(b"Host:") == 1 and b"\r\nHost: bucket.s3.example:99\r\n" in request
        assert connection.getresponse().read() == b"until the end"
        connection.close()
