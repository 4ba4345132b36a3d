"""Attempts, quarantine, and the numbers that people see."""

import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import lock, progress
from pipelines.tracker import Guard, Tracker, Watchdog
from schemas import RowError


class World:
    """A clock and a set of nodes that a test moves."""

    def __init__(self):
        self.now, self.nodes = 100.0, {"n1", "n2"}

    def tracker(self):
        return Tracker(clock=lambda: self.now, nodes=lambda: self.nodes)


@pytest.fixture
def world():
    return World()


@pytest.fixture
def tracker(world):
    return world.tracker()


def admit(tracker, *rows):
    return {row: action for row, (action, _) in tracker.admit("transfer", list(rows)).items()}


def crash(tracker, *rows, node="n1", budget=60):
    """Work on rows begins and never ends."""
    tracker.begin("transfer", list(rows), node, budget)


def test_a_row_that_ended_may_come_again(tracker):
    for _ in range(3):
        assert admit(tracker, "a") == {"a": "run"}
        tracker.begin("transfer", ["a"], "n1", 60)
        tracker.end("transfer", ["a"])


def test_the_second_crash_is_the_last(tracker):
    assert admit(tracker, "a") == {"a": "run"}
    crash(tracker, "a")
    assert admit(tracker, "a") == {"a": "alone"}
    crash(tracker, "a")
    assert admit(tracker, "a") == {"a": "crashed"}


def test_the_neighbours_of_a_poison_row_are_innocent(tracker):
    crash(tracker, "good", "poison")
    assert admit(tracker, "good", "poison") == {"good": "alone", "poison": "alone"}
    tracker.begin("transfer", ["good"], "n1", 60)
    tracker.end("transfer", ["good"])
    crash(tracker, "poison")
    assert admit(tracker, "good", "poison") == {"good": "run", "poison": "crashed"}


def test_a_row_alone_and_over_its_budget_is_timed_out(tracker, world):
    crash(tracker, "a", budget=60)
    world.now += 60
    assert admit(tracker, "a") == {"a": "timed_out"}


def test_a_batch_over_its_budget_is_taken_apart(tracker, world):
    crash(tracker, "a", "b", budget=60)
    world.now += 60
    assert admit(tracker, "a", "b") == {"a": "alone", "b": "alone"}


def test_a_node_that_went_away_is_not_the_rows_fault(tracker, world):
    for _ in range(5):
        crash(tracker, "a")
        world.nodes = {"n2"}
        assert admit(tracker, "a") == {"a": "run"}
        world.nodes = {"n1", "n2"}


def test_a_lost_node_neither_accuses_nor_acquits(tracker, world):
    crash(tracker, "a")
    assert admit(tracker, "a") == {"a": "alone"}
    crash(tracker, "a", node="gone")
    assert admit(tracker, "a") == {"a": "alone"}
    crash(tracker, "a")
    assert admit(tracker, "a") == {"a": "crashed"}


def test_a_row_that_was_admitted_but_not_begun_is_innocent(tracker):
    assert admit(tracker, "a", "b") == {"a": "run", "b": "run"}
    crash(tracker, "a")  # the worker died before it came to b
    assert admit(tracker, "a", "b") == {"a": "alone", "b": "run"}


def test_living_nodes_are_only_asked_for_when_something_died():
    def nodes():
        raise AssertionError("asked")

    tracker = Tracker(nodes=nodes)
    assert admit(tracker, "a") == {"a": "run"}


def test_stages_count_for_themselves(tracker):
    tracker.begin("encode", ["a"], "n1", 60)
    assert admit(tracker, "a") == {"a": "run"}


def test_attempts_count_every_beginning_wherever_it_was_lost(tracker, world):
    assert tracker.admit("transfer", ["a"])["a"] == ("run", 1)
    crash(tracker, "a")
    assert tracker.admit("transfer", ["a"])["a"] == ("alone", 2)
    crash(tracker, "a", node="gone")
    assert tracker.admit("transfer", ["a"])["a"] == ("alone", 3)
    tracker.begin("transfer", ["a"], "n1", 60)
    tracker.end("transfer", ["a"])
    assert tracker.admit("finish", ["a"])["a"] == ("run", 3)


@given(
    st.lists(st.sampled_from(["good", "poison", "slow", "flaky"]), min_size=1, max_size=12),
    st.integers(1, 5),
    st.booleans(),
)
def test_whatever_dies_every_row_ends_and_only_the_guilty_are_failed(kinds, group, many):
    """A worker as Ray runs it: a batch comes again until nothing dies in it."""
    world = World()
    tracker, ends, began = world.tracker(), {}, Counter()

    def work(rows):
        """True if the worker lived."""
        tracker.begin("transfer", rows, "n1", 60 * len(rows))
        began.update(rows)
        guilty = {kinds[int(row)] for row in rows if kinds[int(row)] != "flaky" or began[row] == 1} - {"good"}
        if guilty:
            world.now += 60 * len(rows) if guilty == {"slow"} else 1
            return False
        tracker.end("transfer", rows)
        ends.update(dict.fromkeys(rows, "ok"))
        return True

    def batch(rows):
        together, alone = [], []
        for row, (action, _) in tracker.admit("transfer", rows).items():
            if action in ("run", "alone"):
                (together if action == "run" else alone).append(row)
            else:
                ends[row] = action
        groups = [together[i : i + group] for i in range(0, len(together), group)] + [[row] for row in alone]
        return all(work(rows) for rows in groups)

    rows = [str(i) for i in range(len(kinds))]
    deaths = 0
    for part in [rows] if many else [rows[i : i + group] for i in range(0, len(rows), group)]:
        while not batch(part):
            deaths += 1
            assert deaths <= 2 * len(rows)
    ended = {"good": "ok", "flaky": "ok", "poison": "crashed", "slow": "timed_out"}
    assert ends == {row: ended[kind] for row, kind in zip(rows, kinds, strict=True)}
    assert all(began[row] <= 2 for row, kind in zip(rows, kinds, strict=True) if kind in ("poison", "slow"))


def test_the_numbers_of_a_run(tracker, world):
    tracker.begin("transfer", ["a", "b"], "n1", 60)
    world.now += 10
    tracker.end("transfer", ["a", "b"])
    tracker.finished([None, "crashed"])
    now = tracker.snapshot()
    assert (now["ok"], now["failed"], dict(now["codes"])) == (1, 1, {"crashed": 1})
    assert now["working_s"] == 10.0


def test_a_run_stalls_only_when_no_row_is_within_its_budget(tracker, world):
    crash(tracker, "a", budget=60)
    world.now += 50
    assert tracker.snapshot()["stalled_s"] == 0
    assert tracker.snapshot()["running"] == [("transfer", "a", 50.0)]
    world.now += 50
    assert tracker.snapshot()["stalled_s"] == 100


@pytest.mark.parametrize(
    "happens",
    [
        lambda tracker: tracker.admit("finish", ["b"]),
        lambda tracker: tracker.begin("finish", ["b"], "n1", 0),
        lambda tracker: tracker.end("transfer", ["a"]),
        lambda tracker: tracker.finished([None]),
    ],
    ids=["admit", "begin", "end", "finished"],
)
def test_whatever_happens_ends_a_stall(tracker, world, happens):
    crash(tracker, "a", budget=60)
    world.now += 100
    happens(tracker)
    world.now += 5
    assert tracker.snapshot()["stalled_s"] == 5


def test_the_rows_that_run_longest_are_shown_and_work_is_timed_from_the_first(tracker, world):
    world.now += 30  # models are loaded
    for row in "abcdefg":
        crash(tracker, row)
        world.now += 1
    now = tracker.snapshot()
    assert now["running"] == [("transfer", row, 7.0 - n) for n, row in enumerate("abcde")]
    assert now["working_s"] == 7


def snapshot(**changes):
    return {"ok": 0, "failed": 0, "codes": {}, "running": [], "working_s": 0.0} | changes


@pytest.mark.parametrize(
    ("now", "line"),
    [
        (snapshot(), "0/40 rows · loading models"),
        (snapshot(working_s=5.0), "0/40 rows · first rows under way"),
        (snapshot(ok=10, working_s=100.0), "10/40 rows · 360 rows/h · 5 min left"),
        (
            snapshot(ok=8, failed=2, codes={"crashed": 1, "truncated": 1}, working_s=100.0),
            "10/40 rows · 2 failed (crashed 1, truncated 1) · 360 rows/h · 5 min left",
        ),
        (
            snapshot(ok=40, working_s=100.0, running=[("finish", "0123456789", 200.0)]),
            "40/40 rows · 1,440 rows/h · longest: 01234567 in finish for 3 min",
        ),
    ],
)
def test_the_line_of_progress(now, line):
    assert progress.line(now, 40) == line


def test_estimates_are_told_in_units_that_people_read():
    assert progress.gpu_time(1e12, 400) == "under 1 s of one GPU at 400 TFLOP/s"
    assert progress.gpu_time(4e14 * 2 * 3600, 400) == "2.0 h of one GPU at 400 TFLOP/s"
    assert [progress.size(count) for count in (400, 41_600, 7.1e6, 3.3e12)] == ["0 kB", "42 kB", "7.1 MB", "3,300.0 GB"]


# ---- the watchdog, on real processes

HANG = """
import os, re, signal, sys, time
from pipelines.tracker import Watchdog
dog = Watchdog()
dog.arm({seconds})
{work}
print("survived", flush=True)
"""
BUSY = "re.match('(a+)+$', 'a' * 60 + 'b')"  # holds the interpreter for ever


def run(work, seconds):
    began = time.monotonic()
    program = HANG.format(work=work, seconds=seconds)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    text, _ = process.communicate(timeout=30)
    return process.returncode, text, time.monotonic() - began


@pytest.mark.parametrize(
    "work",
    ["time.sleep(60)", BUSY, "os.kill(os.getpid(), signal.SIGSTOP)", "dog.disarm(); dog.arm(0.2); time.sleep(60)"],
)
def test_a_process_that_hangs_is_killed_at_its_deadline(work):
    code, text, seconds = run(work, 0.5)
    assert code == -signal.SIGKILL
    assert text == ""
    assert seconds < 10


@pytest.mark.parametrize("wait", [0, 0.1])  # what is said in one breath, or one after the other
@pytest.mark.parametrize("again", ["dog.disarm()", "dog.arm(60)"])
def test_work_that_ends_in_time_lives_on(wait, again):
    assert run(f"time.sleep({wait}); {again}; time.sleep(0.6)", 0.5)[:2] == (0, "survived\n")


def test_a_watchdog_that_was_killed_is_replaced():
    work = "dog._child.kill(); dog._child.wait(); dog.arm(0.3); time.sleep(60)"
    assert run(work, 60)[0] == -signal.SIGKILL


def test_a_watchdog_spares_a_process_that_is_not_its_parent():
    """The number of a process that is gone is given to another."""
    stranger = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    dog = subprocess.Popen([sys.executable, "-c", Watchdog._CHILD, str(stranger.pid)], stdin=subprocess.PIPE)
    dog.stdin.write(b"0.01\n")
    dog.stdin.flush()
    assert dog.wait(10) == 0
    stranger.communicate(b"\n", timeout=10)
    assert stranger.returncode == 0


@pytest.mark.parametrize("end", ["os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_the_watchdog_goes_with_its_process(end):
    done = subprocess.run(
        [sys.executable, "-c", HANG.format(seconds=60, work=f"print(dog._child.pid, flush=True); {end}")],
        capture_output=True,
        text=True,
    )
    deadline = time.monotonic() + 5
    while (alive := lock._started(int(done.stdout))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive


class Remote:
    """A tracker that is called as an actor is."""

    def __init__(self, tracker):
        for name in ("admit", "begin", "end"):
            setattr(self, name, type("Method", (), {"remote": staticmethod(getattr(tracker, name))}))


def test_a_guarded_row_that_took_two_processes_down_is_refused(world, tracker, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "get", lambda value: value)
    for _ in range(2):
        assert admit(tracker, "poison")["poison"] != "crashed"
        crash(tracker, "poison")
    third = Guard(Remote(tracker), "transfer", "n1", 60)
    with pytest.raises(RowError, match="took its worker process down twice") as refused, third.row("poison"):
        raise AssertionError("it was begun")
    assert refused.value.code == "crashed"
    with third.row("good"):
        assert [row for _, row, _ in tracker.snapshot()["running"]] == ["good"]
    assert tracker.snapshot()["running"] == []


def test_a_guarded_row_that_hung_is_not_tried_again(world, tracker, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "get", lambda value: value)
    tracker.begin("measure", ["slow"], "n1", 60)
    world.now += 61
    guard = Guard(Remote(tracker), "measure", "n1", 60)
    with pytest.raises(RowError, match=r"more than limits\.row_seconds=60") as refused, guard.row("slow"):
        raise AssertionError("it was begun")
    assert refused.value.code == "timed_out"


def test_a_process_whose_gpu_is_lost_ends_while_its_row_counts_as_begun(world, tracker, monkeypatch):
    import ray

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr("pipelines.tracker.os._exit", leave)
    remote = Remote(tracker)
    remote.end = type("Method", (), {"remote": staticmethod(lambda *_: None)})  # a process that ended tells nobody
    with pytest.raises(SystemExit), Guard(remote, "measure", "n1", 60).row("a"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    assert [row for _, row, _ in tracker.snapshot()["running"]] == ["a"]
