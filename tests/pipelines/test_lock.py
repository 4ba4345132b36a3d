"""One run at a time in an output."""

import json
import signal
import subprocess
import sys
import threading
import time
from unittest.mock import Mock

import pytest

from pipelines import lock
from pipelines.cluster import RunFailed
from pipelines.storage import Storage, StorageUnavailable
from schemas import UsageError

FAST = 0.05


@pytest.fixture
def uri(tmp_path):
    return str(tmp_path / "run" / "lock.json")


def stale(uri, **changes):
    """A lock as another process left it."""
    owner = lock._identity() | {"token": "theirs"} | changes
    Storage().write(uri, json.dumps(owner).encode())


def test_it_is_released_at_the_end(uri):
    with lock.held(Storage(), uri):
        assert Storage().exists(uri)
    assert not Storage().exists(uri)


def test_a_second_run_is_refused_and_told_who_holds_it(uri):
    with lock.held(Storage(), uri, renew_s=FAST), pytest.raises(UsageError, match=r"process \d+.*wait for it"):  # noqa: SIM117
        with lock.held(Storage(), uri, renew_s=FAST):
            pass


@pytest.mark.timeout(60)
def test_the_lock_of_a_dead_process_of_this_host_is_taken_over_at_once(uri):
    process = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    stale(uri, pid=int(process.stdout), started="1")
    with lock.held(Storage(), uri, renew_s=3600):
        pass


def test_a_lock_of_another_host_that_nobody_renews_is_taken_over_after_watching_it(uri):
    stale(uri, host="elsewhere")
    with lock.held(Storage(), uri, renew_s=FAST):
        pass


def test_a_lock_of_another_host_that_is_renewed_is_respected(uri):
    with lock.held(Storage(), uri, renew_s=FAST):
        owner = json.loads(Storage().read(uri))
        assert owner["host"]
        with pytest.raises(UsageError):
            lock._acquire(Storage(), uri, lock._identity() | {"host": "elsewhere"}, patience=10 * FAST)


def test_of_two_runs_that_take_a_dead_lock_over_the_last_one_wins(uri, monkeypatch):
    stale(uri, pid=2**22 + 1, started="1")
    create = Storage.create

    def overtaken(self, place, content):
        made = create(self, place, content)
        if json.loads(content)["token"] != "theirs":
            self.write(place, json.dumps(lock._identity() | {"token": "theirs"}).encode())
        return made

    monkeypatch.setattr(Storage, "create", overtaken)
    with pytest.raises(UsageError, match="another run has just begun"), lock.held(Storage(), uri, renew_s=FAST):
        pass


def test_a_reused_process_id_does_not_look_alive(uri):
    stale(uri, started="1")  # this process's id, begun at another time
    with lock.held(Storage(), uri, renew_s=1):
        pass


@pytest.mark.timeout(60)
def test_a_run_whose_interruption_gets_lost_is_interrupted_again(uri):
    """In a finalizer Python reports an exception, and goes on."""
    interrupted = []
    with pytest.raises(RunFailed, match="took this output over"), lock.held(Storage(), uri, renew_s=FAST):
        while True:
            stale(uri)
            try:
                threading.Event().wait(2)
            except KeyboardInterrupt:
                interrupted.append(True)
                if len(interrupted) == 2:
                    raise


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["foreground", "background"])
def _started(request):
    """A shell's background jobs ignore SIGINT."""
    before = signal.signal(signal.SIGINT, request.param)
    yield
    assert signal.getsignal(signal.SIGINT) == request.param
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_started")
def test_a_run_that_slept_and_lost_the_lock_stops_wherever_it_waits(uri):
    began = time.monotonic()
    with pytest.raises(RunFailed, match="took this output over"), lock.held(Storage(), uri, renew_s=FAST):
        while time.monotonic() - began < 30:
            stale(uri)  # as who took it over renews it: a beat of ours may have crossed the first
            threading.Event().wait(2)
    assert time.monotonic() - began < 10
    assert Storage().exists(uri)  # it is theirs now


def test_an_interrupt_of_the_user_stays_one(uri):
    with pytest.raises(KeyboardInterrupt), lock.held(Storage(), uri):
        raise KeyboardInterrupt
    assert not Storage().exists(uri)


def test_a_lock_that_was_cut_off_while_written_is_taken_over(uri):
    Storage().write(uri, b'{"tok')
    with lock.held(Storage(), uri, renew_s=FAST):
        pass


def test_a_storage_that_does_not_answer_is_no_wrong_usage(uri, monkeypatch):
    def fails(*_):
        raise StorageUnavailable("503")

    monkeypatch.setattr(Storage, "create", fails)
    with pytest.raises(StorageUnavailable, match="503"), lock.held(Storage(), uri):
        pass


def test_what_went_wrong_is_not_hidden_by_a_lock_that_cannot_be_released(uri, monkeypatch):
    with pytest.raises(RunFailed, match="the disk is full"), lock.held(Storage(), uri):
        monkeypatch.setattr(Storage, "read", Mock(side_effect=StorageUnavailable("503")))
        raise RunFailed("the disk is full")


def test_a_process_of_another_container_on_this_host_is_not_taken_for_dead(uri, monkeypatch):
    theirs = lock._identity() | {"pid": 2**22 + 1, "boot": f"{lock._boot()} of another namespace"}
    assert not lock._is_gone(theirs)
    assert lock._is_gone(theirs | {"boot": lock._boot()})
