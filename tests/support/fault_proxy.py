"""A reverse proxy that stands between an S3 client and a test S3 server and breaks chosen requests.

The faults happen on real sockets, so the retry, timeout and checksum code of any client is tested as it is.
"""

import asyncio
import fcntl
import re
import socket
import struct
import termios
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self
from urllib.parse import unquote, urlsplit

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect", "te", "trailer"}


@dataclass(frozen=True)
class Rule:
    """Which requests to break, and how.

    Of the requests that match `method` and `key` (also those another rule breaks) it hits the `nth` ones, from 1,
    or the first `count`, or all when both are None. Of several rules that hit, the first is applied.
    """

    method: str = "*"
    key: str = ".*"  # regex searched in the percent-decoded path and query
    nth: tuple[int, ...] | None = None
    fault: Literal["status", "reset", "stall", "truncate", "corrupt", "drop_response"] = "status"
    status: int = 503
    code: str = "SlowDown"  # S3 error code in the body of a "status" fault
    at_byte: int = 0  # body bytes sent before reset, truncate or stall; byte to corrupt (0: the middle one)
    seconds: float = 60  # silence of a "stall"; the rest of the body follows it
    count: int | None = None


@dataclass
class Message:
    """One HTTP request or response, its body read in full and without transfer coding."""

    start: str
    headers: list[tuple[str, str]]
    body: bytes = b""

    def get(self, name: str) -> str:
        return next((value for key, value in self.headers if key.lower() == name), "")

    def head(self, length: str, connection: str) -> bytes:
        """The head to send on: Host stays, so that signatures hold and URLs in answers lead back to the proxy."""
        kept = [(key, value) for key, value in self.headers if key.lower() not in HOP_BY_HOP]
        pairs = [*kept, ("Content-Length", length), ("Connection", connection)]
        return "\r\n".join([self.start, *(f"{key}: {value}" for key, value in pairs), "", ""]).encode("latin-1")


async def read_head(reader: asyncio.StreamReader) -> Message:
    start, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip("\r\n").split("\r\n")
    return Message(start, [(key, value.strip()) for key, _, value in (line.partition(":") for line in lines)])


async def read_body(reader: asyncio.StreamReader, message: Message, until_eof: bool) -> bytes:
    """Read a body by chunks or Content-Length, or up to the end of the stream where `until_eof` allows that."""
    if "chunked" in message.get("transfer-encoding").lower():
        chunks: list[bytes] = []
        while size := int((await reader.readuntil(b"\n")).split(b";")[0], 16):
            chunks.append((await reader.readexactly(size + 2))[:-2])
        while (await reader.readuntil(b"\n")).strip():  # trailers
            pass
        return b"".join(chunks)
    if length := message.get("content-length"):
        return await reader.readexactly(int(length))
    return await reader.read() if until_eof else b""


def error_response(status: int, code: str) -> Message:
    """An S3 error document; with status 200 this is the late failure of CopyObject and CompleteMultipartUpload."""
    xml = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{code}</Message></Error>'
    return Message(f"HTTP/1.1 {status} {code}", [("Content-Type", "application/xml")], xml.encode())


async def abort_with_reset(writer: asyncio.StreamWriter) -> None:
    """Close with a TCP RST, but only once the peer has acknowledged all bytes: RST discards the unsent ones."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    while not writer.is_closing() and any(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))):
        await asyncio.sleep(0.01)
    writer.transport.abort()


class FaultProxy:
    """Forward HTTP/1.1 to `upstream` from a daemon thread and break the requests that `rules` choose.

    `hits` lists (method, decoded path and query, fault); a truncate or corrupt rule that finds no body byte to
    take (HEAD, empty or short answers) changes nothing and is not listed.
    """

    def __init__(self, upstream: str, rules: Sequence[Rule] = ()) -> None:
        self._upstream = urlsplit(upstream)
        self.rules = list(rules)  # a newly assigned list starts all counts anew
        self._counted: tuple[list[Rule], Counter[int]] = (self.rules, Counter())
        self.hits: list[tuple[str, str, str]] = []
        self.requests = 0
        self._ready = threading.Event()

    def __enter__(self) -> Self:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._serve, sock=self._socket, limit=1 << 20)
        self._ready.set()
        await self._stop.wait()  # at the return asyncio.run cancels the connections still open
        server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.set_write_buffer_limits(0)  # makes drain() wait until all is in the kernel
        try:
            while await self._answer(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client or the upstream left, or the proxy is stopping
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; return whether to keep the connection."""
        request = await read_head(reader)
        if request.get("expect").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.body = await read_body(reader, request, until_eof=False)
        method, target, version = request.start.split(" ")
        self.requests += 1
        rule = self._choose(method, unquote(target))
        fault, at = (rule.fault, rule.at_byte) if rule else (None, 0)
        local = error_response(rule.status, rule.code) if rule and fault == "status" else None
        response = local or await self._forward(request, method)
        body, length = response.body, str(len(response.body))
        if method == "HEAD":
            body, length = b"", response.get("content-length") or "0"
        if (fault == "truncate" and at >= len(body)) or (fault == "corrupt" and not body):
            fault = None
        if fault:
            self.hits.append((method, unquote(target), fault))
        if fault == "drop_response":
            return False
        if fault == "corrupt":
            at = min(at or len(body) // 2, len(body) - 1)
            body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        cut = at if fault in ("reset", "stall", "truncate") else len(body)
        keep = version == "HTTP/1.1" and request.get("connection").lower() != "close"
        writer.write(response.head(length, "keep-alive" if keep else "close") + body[:cut])
        await writer.drain()
        if fault == "reset":
            await abort_with_reset(writer)
        for _ in range(round(rule.seconds / 0.05) if rule and fault == "stall" else 0):
            if reader.at_eof() or reader.exception():
                return False  # the client gave up
            await asyncio.sleep(0.05)
        if fault in ("reset", "truncate"):
            return False
        writer.write(body[cut:])
        await writer.drain()
        return keep

    def _choose(self, method: str, path: str) -> Rule | None:
        """Count the request in every rule it matches; return the first rule that hits it."""
        if self._counted[0] is not self.rules:
            self._counted = (self.rules, Counter())
        (rules, seen), chosen = self._counted, None
        for i, rule in enumerate(rules):
            if rule.method in ("*", method) and re.search(rule.key, path):
                seen[i] += 1
                hit = (rule.nth is None or seen[i] in rule.nth) and (rule.count is None or seen[i] <= rule.count)
                chosen = chosen or (rule if hit else None)
        return chosen

    async def _forward(self, request: Message, method: str) -> Message:
        """Send the request upstream on a connection of its own and read the whole answer."""
        reader, writer = await asyncio.open_connection(self._upstream.hostname, self._upstream.port, limit=1 << 20)
        try:
            writer.write(request.head(str(len(request.body)), "close") + request.body)
            await writer.drain()
            response = await read_head(reader)
            if method != "HEAD" and response.start.split(" ")[1] not in ("204", "304"):
                response.body = await read_body(reader, response, until_eof=True)
            return response
        finally:
            writer.close()
