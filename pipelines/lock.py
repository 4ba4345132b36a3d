"""One run at a time in an output folder, on local disk and on object storage alike.

The lock is an object that only one process can create. It is renewed every few seconds; a lock that nobody renews belongs to
a dead run and is taken over: at once if its process ran on this host, else after watching it for a while.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.cluster import RunFailed
from pipelines.storage import Storage, StorageUnavailable, describe
from schemas import UsageError

RENEW_S = 5.0


@contextlib.contextmanager
def held(storage: Storage, uri: str, *, renew_s: float = RENEW_S) -> Iterator[None]:
    """Holds the lock while the block runs, in the main thread; a process that slept and finds it taken over is interrupted there.

    Raises:
        UsageError: another run holds it, or it cannot be written.
        RunFailed: another run took it over.
        StorageUnavailable: the storage does not answer.
    """
    mine = _identity()
    try:
        _acquire(storage, uri, mine, patience=3 * renew_s)
    except StorageUnavailable:
        raise
    except OSError as error:
        raise UsageError(f"{uri}: cannot be written ({describe(error)})") from error
    stop, lost = threading.Event(), threading.Event()

    def renew() -> None:
        while not stop.wait(renew_s):
            with contextlib.suppress(OSError):  # the next beat may get through; others wait for several
                if _owner(storage, uri).get("token") != mine["token"]:
                    lost.set()
                    break
                storage.write(uri, _beat(mine))
        while not stop.is_set():
            os.kill(os.getpid(), signal.SIGINT)  # wakes the main thread wherever it waits
            stop.wait(
                12 * renew_s
            )  # again, as an interruption of a finalizer is lost; late, as what ends by it takes its time

    def interrupt(*_: Any) -> None:
        if lost.is_set():
            raise KeyboardInterrupt

    # a shell's background jobs ignore SIGINT: theirs is heeded for a lost lock alone
    ignored = (
        threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    )
    if ignored:
        signal.signal(signal.SIGINT, interrupt)
    thread = threading.Thread(target=renew, daemon=True, name="lock")
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if lost.is_set():
            raise RunFailed("another run took this output over; this one stops") from None
        raise
    finally:
        stop.set()
        thread.join()
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        # what went wrong before matters more; a lock that nobody renews is taken over
        with contextlib.suppress(OSError):
            if _owner(storage, uri).get("token") == mine["token"]:
                storage.delete(uri)


def _acquire(storage: Storage, uri: str, mine: dict[str, Any], patience: float) -> None:
    if storage.create(uri, _beat(mine)):
        return
    owner = _owner(storage, uri)
    if not _is_gone(owner):
        deadline = time.monotonic() + patience
        while (now := _owner(storage, uri)) == owner and time.monotonic() < deadline:
            time.sleep(patience / 10)
        if now and now != owner:
            raise UsageError(
                f"{uri}: a run on {now.get('host')} (process {now.get('pid')}, begun {now.get('since')}) is writing here; "
                "wait for it, stop it, or use another output"
            )
    storage.delete(uri)
    taken = storage.create(uri, _beat(mine))
    time.sleep(min(1.0, patience / 10))  # another run may have judged the same lock dead: the last one to create wins
    if not taken or _owner(storage, uri).get("token") != mine["token"]:
        raise UsageError(f"{uri}: another run has just begun to write here")


def _owner(storage: Storage, uri: str) -> dict[str, Any]:
    """What the lock says; empty if it is gone or cut off."""
    try:
        owner = json.loads(storage.read(uri))
    except (FileNotFoundError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _identity() -> dict[str, Any]:
    return {
        "token": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "boot": _boot(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _beat(owner: dict[str, Any]) -> bytes:
    return json.dumps(owner | {"renewed": time.time()}).encode()


def _is_gone(owner: dict[str, Any]) -> bool:
    """True if the owner ran on this host and its process is not there any more (process ids are used again: start times are not)."""
    here = owner.get("host") == socket.gethostname() and owner.get("boot") == _boot()
    return here and owner.get("started") is not None and _started(int(owner["pid"])) != owner["started"]


def _boot() -> str:
    """Identity of this boot of this host and of its process ids, of which containers have their own."""
    file, ids = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return f"{file.read_text().strip()} {os.readlink(ids)}" if file.is_file() and ids.is_symlink() else ""


def _started(pid: int) -> str | None:
    """When a process began, in the kernel's ticks; None if there is none, or if the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return None if fields[0] == "Z" else fields[19]  # a zombie is dead
    except (OSError, IndexError):
        return None
