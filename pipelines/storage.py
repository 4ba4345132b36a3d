"""Every byte in and out: local paths and `s3://` through fsspec. No other module asks which of the two it is.

A whole object appears at its final key or nothing does: local files are renamed into place, S3 objects are one PUT (or one
completed multipart upload). Transient faults are retried with exponential backoff and jitter; what is permanent is raised.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import hashlib
import os
import random
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import pyarrow.fs as pafs
import s3fs
from botocore.exceptions import ParamValidationError, ProfileNotFound
from botocore.handlers import add_expect_header
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from schemas.errors import ErrorCode, RowError
from schemas.sections import StorageSettings

T = TypeVar("T")
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
_PERMANENT_ERRNO = {errno.ENOSPC, errno.EROFS, errno.ENAMETOOLONG, errno.EDQUOT}
#: Of botocore, before anything is sent. Missing credentials are not among them: a node's may come late.
_CLIENT_SIDE: dict[type[Exception], type[OSError]] = {
    ParamValidationError: FileNotFoundError,  # no bucket or key can have that name
    ProfileNotFound: PermissionError,
}
_REMOTE = {"s3": "s3", "s3a": "s3"}
_PART = 50 * 2**20  # bytes; s3fs moves larger objects in parts


class StorageUnavailable(OSError):
    """A transient fault that outlasted its retries."""


class Unwritable(OSError):
    """A place that can take no file: the disk is full, the policy forbids it."""


def scheme(uri: str) -> str:
    """The scheme of a URI; plain paths are `file`."""
    found = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]*)://", uri)
    return found[1].lower() if found else "file"


def check_scheme(uri: str, allowed: Collection[str]) -> None:
    """Raises a RowError where a URI's scheme is not among `limits.schemes`."""
    if scheme(uri) not in allowed:
        raise RowError(
            ErrorCode.SCHEME_FORBIDDEN,
            f"{uri}: its scheme {scheme(uri)!r} is not in limits.schemes ({', '.join(allowed)})",
        )


class Storage:
    """File operations on URIs, with retries. Cheap to make and to pickle; connections are made on first use, per process."""

    def __init__(self, settings: StorageSettings | None = None, sleep: Callable[[float], None] = time.sleep) -> None:
        self.settings = settings or StorageSettings()
        self._sleep = sleep

    def filesystem(self, uri: str, tries: int = 1) -> tuple[AbstractFileSystem, str]:
        """The fsspec filesystem of a URI and the path in it.

        Args:
            tries: of each of its requests; one where the whole operation is retried.

        Raises:
            RowError: a scheme that is not supported.
        """
        kind = scheme(uri)
        if kind == "file":
            return LocalFileSystem(auto_mkdir=True), os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))
        if kind not in _REMOTE:
            raise RowError(
                ErrorCode.SCHEME_FORBIDDEN, f"{uri}: scheme {kind!r} is not supported (local paths and s3://)"
            )
        return _s3(self.settings, tries), uri.split("://", 1)[1].rstrip("/")

    def arrow(self, uri: str) -> tuple[pafs.FileSystem, str]:
        """The pyarrow filesystem of a URI and the path in it."""
        fs, path = self.filesystem(uri, self.settings.attempts)  # who writes through Arrow has no retries of its own
        if isinstance(fs, LocalFileSystem):
            return pafs.LocalFileSystem(), path
        return pafs.PyFileSystem(pafs.FSSpecHandler(fs)), path

    def read(self, uri: str) -> bytes:
        """A whole object."""
        fs, path = self.filesystem(uri)
        in_one = (
            {} if isinstance(fs, LocalFileSystem) else {"max_concurrency": 1}
        )  # else S3 is asked for the size first
        return self._retry(f"read {uri}", lambda: bytes(fs.cat_file(path, **in_one)))

    def write(self, uri: str, data: bytes) -> None:
        """A whole object, atomically."""
        fs, path = self.filesystem(uri)
        if isinstance(fs, LocalFileSystem):
            _write_local(path, lambda temporary: Path(temporary).write_bytes(data))
        else:
            self._retry(f"write {uri}", lambda: fs.pipe_file(path, data))

    def create(self, uri: str, data: bytes) -> bool:
        """Creates an object only if there is none; False if there is."""
        fs, path = self.filesystem(uri)
        try:
            if isinstance(fs, LocalFileSystem):
                _create_local(path, data)
            else:
                self._retry(f"create {uri}", lambda: fs.pipe_file(path, data, mode="create"))
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):  # it is gone again
                return bool(self.read(uri) == data)  # ours, if the reply to the first try was lost
            return False
        return True

    def put(self, local: str | Path, uri: str) -> None:
        """Uploads a local file and checks the size that arrived.

        Raises:
            StorageUnavailable: the storage does not answer.
            Unwritable: no file can be written there.
        """
        try:
            self._put(local, uri)
        except StorageUnavailable:
            raise
        except OSError as error:
            raise Unwritable(f"{uri}: cannot be written ({describe(error)})") from error

    def _put(self, local: str | Path, uri: str) -> None:
        size = os.path.getsize(local)
        fs, path = self.filesystem(uri, self._tries(size))
        if isinstance(fs, LocalFileSystem):
            _write_local(path, lambda temporary: shutil.copyfile(local, temporary))
            return

        def upload() -> None:
            fs.pipe_file(path, Path(local).read_bytes())
            arrived = fs.info(path)["size"]
            if arrived != size:
                raise OSError(errno.EIO, f"{uri}: {arrived} of {size} bytes arrived")

        self._retry(f"write {uri}", upload)

    def fetch(self, uri: str, local: str | Path, *, most_bytes: float, digest: str | None = None) -> str:
        """Downloads an object; returns the SHA-256 of its bytes.

        Raises:
            RowError: missing, forbidden, too large, unavailable, or (with `digest`) not the bytes that were expected.
        """
        try:
            fs, path = self.filesystem(uri)
            info = self._retry(f"look at {uri}", lambda: fs.info(path))
            if info["type"] == "directory":
                raise RowError(ErrorCode.REFERENCE_MISSING, f"{uri}: is a folder, not a video")
            if info["size"] > most_bytes:
                mib = info["size"] / 2**20
                raise RowError(
                    ErrorCode.REFERENCE_TOO_LARGE,
                    f"{uri}: {mib:.1f} MiB is over limits.max_reference_mib={most_bytes / 2**20:g}",
                )

            source, _ = self.filesystem(uri, self._tries(info["size"]))

            def download() -> str:
                source.get_file(path, str(local))
                size = os.path.getsize(local)
                if size != info["size"]:
                    raise OSError(errno.EIO, f"{uri}: {size} of {info['size']} bytes arrived")
                found = sha256(local)
                if digest is not None and found != digest:
                    raise _Changed(found)
                return found

            return self._retry(f"read {uri}", download)
        except _Changed as error:
            raise RowError(
                ErrorCode.REFERENCE_CHANGED,
                f"{uri}: its bytes (sha256 {error.args[0][:12]}…) are not those that were planned ({str(digest)[:12]}…); plan again",
            ) from error
        except FileNotFoundError as error:
            raise RowError(ErrorCode.REFERENCE_MISSING, f"{uri}: no such object") from error
        except PermissionError as error:
            raise RowError(
                ErrorCode.REFERENCE_FORBIDDEN, f"{uri}: access denied; check credentials and policy"
            ) from error
        except OSError as error:
            raise RowError(ErrorCode.STORAGE_UNAVAILABLE, str(error)) from error

    def exists(self, uri: str) -> bool:
        fs, path = self.filesystem(uri)
        return self._retry(f"look at {uri}", lambda: bool(fs.exists(path)))

    def find(self, uri: str) -> list[str]:
        """All objects below a prefix, as URIs, sorted; empty if there is none."""
        fs, path = self.filesystem(uri)
        try:
            found = self._retry(f"list {uri}", lambda: fs.find(path))
        except FileNotFoundError:
            return []
        return sorted(self._uri(uri, name) for name in found if not name.endswith("/"))  # the mark of an empty folder

    def details(self, uri: str) -> dict[str, dict[str, Any]]:
        """All objects below a prefix: path relative to it -> size and etag (S3) of each."""
        fs, path = self.filesystem(uri)
        found = self._retry(f"list {uri}", lambda: fs.find(path, detail=True))
        inside = {
            str(PurePosixPath(name).relative_to(path)): info for name, info in found.items() if not name.endswith("/")
        }
        if outside := [name for name in inside if ".." in name.split("/")]:  # a local copy would be written elsewhere
            raise PermissionError(f"{uri}: holds an object that is named {outside[0]!r}; names with '..' are refused")
        return inside

    def glob(self, pattern: str) -> list[str]:
        """Objects that match a pattern, as URIs, sorted."""
        fs, path = self.filesystem(pattern)
        return sorted(self._uri(pattern, str(name)) for name in self._retry(f"list {pattern}", lambda: fs.glob(path)))

    def is_folder(self, uri: str) -> bool:
        fs, path = self.filesystem(uri)
        return self._retry(f"look at {uri}", lambda: bool(fs.isdir(path)))

    def delete(self, uri: str) -> None:
        """Removes an object; none there is fine."""
        fs, path = self.filesystem(uri)
        with contextlib.suppress(FileNotFoundError):
            self._retry(f"delete {uri}", lambda: fs.rm_file(path))

    def delete_all(self, uris: Collection[str]) -> None:
        """The same for many, side by side."""
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(self.delete, uris))

    def _uri(self, like: str, path: str) -> str:
        kind = scheme(like)
        return path if kind == "file" else f"{kind}://{path}"

    def _tries(self, size: int) -> int:
        """Of each request of a transfer: what goes in parts must not begin anew for each part that fails."""
        return self.settings.attempts if size > _PART else 1

    def _retry(self, what: str, operation: Callable[[], T]) -> T:
        """The operation's result; transient faults are tried again `settings.attempts` times in all."""
        for attempt in range(1, self.settings.attempts + 1):
            try:
                return operation()
            except Exception as error:
                if not transient(error):
                    if kind := _CLIENT_SIDE.get(type(error)):
                        raise kind(f"{what}: {describe(error)}") from error
                    if type(error) in _PERMANENT and not error.errno:  # from S3, which does not say what it is about
                        raise type(error)(f"{what}: {error}") from error
                    raise
                if attempt == self.settings.attempts:
                    if isinstance(error, _Changed):
                        raise
                    raise StorageUnavailable(
                        f"{what}: still failing after {attempt} tries: {describe(error)}"
                    ) from error
            self._sleep(min(20.0, 0.2 * 2**attempt) * random.uniform(0.5, 1.0))
        raise AssertionError("unreachable")


class _Changed(OSError):
    """Bytes with another digest: perhaps corrupted on the way, so worth another download."""


def transient(error: BaseException) -> bool:
    """True for what another try may mend: timeouts, resets, 5xx, 429; False for what is permanent or a bug."""
    if isinstance(error, _PERMANENT) or (isinstance(error, OSError) and error.errno in _PERMANENT_ERRNO):
        return False
    if isinstance(error, OSError | asyncio.TimeoutError | TimeoutError):
        return True
    if type(error) in _CLIENT_SIDE:
        return False
    return type(error).__module__.split(".")[0] in {"botocore", "aiobotocore", "aiohttp", "urllib3", "http"}


def describe(error: BaseException) -> str:
    """One line of an error, with its type."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def sha256(path: str | Path) -> str:
    """Hex digest of a local file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def join(uri: str, *parts: str) -> str:
    """A URI below another."""
    return "/".join([uri.rstrip("/"), *parts])


def absolute(uri: str) -> str:
    """A URI that means the same wherever it is read: local paths become absolute."""
    return (
        os.path.abspath(os.path.expanduser(uri.removeprefix("file://"))) if scheme(uri) == "file" else uri.rstrip("/")
    )


def _socket(timeout_s: float, address: tuple[Any, ...]) -> socket.socket:
    """A socket that breaks when what was sent is not taken for so long: aiohttp has no timeout while it sends."""
    made = socket.socket(*address[:3])
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * timeout_s))
    return made


class _S3FileSystem(s3fs.S3FileSystem):
    """Sends bodies without asking first: aiohttp waits for `100 Continue` without a timeout, so a silent server hangs it."""

    async def set_session(self, *args: Any, **kwargs: Any) -> Any:
        client = await super().set_session(*args, **kwargs)
        client.meta.events.unregister("before-call.s3", add_expect_header)
        return client


@functools.lru_cache(maxsize=8)
def _s3(settings: StorageSettings, tries: int) -> AbstractFileSystem:
    """A connection of this process; listings are never cached, since other processes write too."""
    fs = _S3FileSystem(
        profile=settings.profile,
        endpoint_url=settings.endpoint_url,
        client_kwargs={"region_name": settings.region} if settings.region else {},
        config_kwargs={
            "connect_timeout": min(10, settings.timeout_s),
            "read_timeout": settings.timeout_s,
            "connector_args": {"socket_factory": functools.partial(_socket, settings.timeout_s)},
            "retries": {"total_max_attempts": tries, "mode": "standard"},
        },
        use_listings_cache=False,
        skip_instance_cache=True,
    )
    fs.retries = tries  # s3fs has a loop of its own around each request
    return fs


def _write_local(path: str, fill: Callable[[str], Any]) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)[:100]}.{uuid.uuid4().hex}.tmp")
    try:
        fill(temporary)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _create_local(path: str, data: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "xb") as file:
        try:
            file.write(data)
            file.flush()
        except BaseException:
            os.unlink(path)
            raise
