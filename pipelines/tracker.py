"""Who works on which row: attempts, quarantine of rows that kill their worker, and the numbers that progress shows.

Ray retries a task for ever when its process dies. So every stage asks the tracker before it begins a row and tells it after:
a row that is still marked as begun when it comes again took its worker down. Then it runs alone; the second time it is
quarantined (`crashed`), or `timed_out` if it was alone and over its budget. A node that went away is not the row's fault.

The state lives as long as the driver; what is done is known from the results alone (`ledger.py`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from schemas import ErrorCode, RowError
from vmt_core.faults import device_is_broken

Action = Literal["run", "alone", "crashed", "timed_out"]
MOST_CRASHES = 2


@dataclass(frozen=True)
class _Begun:
    at: float
    node: str
    alone: bool
    budget: float


@dataclass
class Snapshot:
    """Numbers of the run so far."""

    ok: int = 0
    failed: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    working_s: float = 0.0  # since the first row began
    stalled_s: float = 0.0  # since anything happened; 0 while a row is within its budget
    running: list[tuple[str, str, float]] = field(default_factory=list)  # stage, row, seconds; longest first


class Tracker:
    """One per run, as a Ray actor without resources. Time and the list of living nodes are injected."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, nodes: Callable[[], set[str]] | None = None
    ) -> None:
        self._clock = clock
        self._nodes = nodes or _living_nodes
        self._begun: dict[tuple[str, str], _Begun] = {}
        self._crashes: Counter[tuple[str, str]] = Counter()
        self._timed_out: set[tuple[str, str]] = (
            set()
        )  # kept, since the batch comes again if a neighbour kills its worker
        self._restarts: Counter[str] = Counter()
        self._now = Snapshot()
        self._active = clock()
        self._first: float | None = None

    def admit(self, stage: str, rows: list[str]) -> dict[str, tuple[Action, int]]:
        """What to do with each row that reaches a stage, and which attempt this is."""
        self._active = self._clock()
        verdicts: dict[str, tuple[Action, int]] = {}
        living: set[str] | None = None
        for row in rows:
            key = (stage, row)
            before = self._begun.pop(key, None)
            action: Action = "run"
            if before is not None:
                living = self._nodes() if living is None else living
                self._restarts[row] += 1
                if before.node in living:
                    self._crashes[key] += 1
                    if before.alone and self._clock() - before.at >= before.budget:
                        self._timed_out.add(key)
            if key in self._timed_out:
                action = "timed_out"
            elif self._crashes[key]:
                action = "crashed" if self._crashes[key] >= MOST_CRASHES else "alone"
            verdicts[row] = (action, 1 + self._restarts[row])
        return verdicts

    def begin(self, stage: str, rows: list[str], node: str, budget: float) -> None:
        """Work on these rows, together, begins now."""
        self._active = self._clock()
        self._first = self._active if self._first is None else self._first
        for row in rows:
            self._begun[stage, row] = _Begun(self._clock(), node, len(rows) == 1, budget)

    def end(self, stage: str, rows: list[str]) -> None:
        """Work on these rows ended, well or badly."""
        self._active = self._clock()
        for row in rows:
            self._begun.pop((stage, row), None)
            self._crashes.pop((stage, row), None)

    def finished(self, outcomes: list[str | None]) -> None:
        """Rows left the last stage: an error code each, or None for ok."""
        self._active = self._clock()
        for code in outcomes:
            if code is None:
                self._now.ok += 1
            else:
                self._now.failed += 1
                self._now.codes[code] += 1

    def snapshot(self) -> dict[str, Any]:
        """The numbers, as a plain dict."""
        now = self._clock()
        self._now.working_s = now - self._first if self._first is not None else 0.0
        working = any(now - begun.at <= begun.budget for begun in self._begun.values())
        self._now.stalled_s = 0.0 if working else now - self._active
        running = ((stage, row, now - begun.at) for (stage, row), begun in self._begun.items())
        self._now.running = sorted(running, key=lambda item: -item[2])[:5]
        return dict(vars(self._now))


class Guard:
    """For an actor outside the stages that works row by row: refuses a row that took two processes down, tells the tracker of the others.

    Args:
        seconds: after which a row counts as hanging, and this process is killed.
    """

    def __init__(self, tracker: Any, name: str, node: str, seconds: float) -> None:
        self.tracker, self.name, self.node, self.seconds = tracker, name, node, seconds
        self.watchdog = Watchdog()

    @contextmanager
    def row(self, key: str) -> Iterator[None]:
        """Work on one row.

        Raises:
            RowError: crashed or timed_out, before anything is done.
        """
        import ray

        action, _ = ray.get(self.tracker.admit.remote(self.name, [key]))[key]
        if action == "crashed":
            raise RowError(ErrorCode.CRASHED, "it took its worker process down twice")
        if action == "timed_out":
            raise RowError(ErrorCode.TIMED_OUT, f"it took more than limits.row_seconds={self.seconds:g}")
        ray.get(self.tracker.begin.remote(self.name, [key], self.node, self.seconds))
        self.watchdog.arm(self.seconds)
        try:
            yield
        except Exception as error:
            end_if_broken(self.name, error)
            raise
        finally:
            self.watchdog.disarm()
            ray.get(self.tracker.end.remote(self.name, [key]))


def end_if_broken(who: str, error: BaseException) -> None:
    """Ends the process if its GPU is lost: its rows are still marked as begun, so the tracker has another process try them."""
    if device_is_broken(error):
        print(f"{who}: {type(error).__name__}: {error}; this process ends", file=sys.stderr, flush=True)
        os._exit(1)


def _living_nodes() -> set[str]:
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def start() -> Any:
    """A run's tracker, on this node: it lives and dies with its driver."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Tracker).remote()


class Watchdog:
    """Kills this process when a deadline passes: a child process, so that no hang in native code or lost GIL can stop it."""

    _CHILD = """
import os, select, signal, sys, time
parent, deadline = int(sys.argv[1]), None
while True:
    wait = None if deadline is None else max(0.0, deadline - time.monotonic())
    if select.select([0], [], [], wait)[0]:
        line = os.read(0, 4096)
        if not line:
            sys.exit()
        seconds = float(line.split()[-1])
        deadline = time.monotonic() + seconds if seconds > 0 else None
    else:
        if os.getppid() == parent:  # else it is gone, and its number may be another's
            os.kill(parent, signal.SIGKILL)
        sys.exit()
"""

    def __init__(self) -> None:
        self._child = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-S", "-c", self._CHILD, str(os.getpid())], stdin=subprocess.PIPE)

    def arm(self, seconds: float) -> None:
        """Kill this process in so many seconds."""
        self._say(max(seconds, 1e-3))

    def disarm(self) -> None:
        """Leave it alone."""
        self._say(0)

    def _say(self, seconds: float) -> None:
        if self._child.poll() is not None:  # something killed it
            self._child = self._start()
        assert self._child.stdin is not None
        self._child.stdin.write(f"{seconds}\n".encode())
        self._child.stdin.flush()
