"""What every stage does around its work: ask the tracker, try a group, then its rows alone, then with less memory; fail rows.

Errors are caught per row: a bad row becomes a failed row, its neighbours go on. No torch here.
"""

from __future__ import annotations

import gc
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable
from datetime import UTC, datetime
from typing import Any, ClassVar, Generic, Literal, TypeVar

import pyarrow as pa
import ray

from pipelines.live import Live
from pipelines.storage import Storage, StorageUnavailable, Unwritable, describe
from pipelines.tracker import Watchdog, end_if_broken
from schemas import ErrorCode, ResultRow, RowError, StageSettings, TransferSettings
from vmt_core.faults import out_of_memory

V = TypeVar("V")
Row = dict[str, Any]
Outcome = Row | RowError  # columns to set, or why the row failed

#: What travels between the stages: the result row in the making, and the payload.
STATE = pa.schema(
    [*(field.with_nullable(True) for field in ResultRow.arrow_schema()), pa.field("payload", pa.large_binary())]
)


def begin(table: pa.Table) -> pa.Table:
    """Manifest rows as the state that travels between the stages."""
    columns = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(table.num_rows, field.type)
        for field in STATE
    ]
    return pa.table(columns, schema=STATE)


class Stage(ABC):
    """One actor: settings and the model part are loaded once, then batches of rows go through `work`.

    Args:
        settings: of the job.
        tracker: handle of the run's Tracker actor.
        run_id: identity of the run.
    """

    name: ClassVar[Literal["encode", "transfer", "finish"]]

    def __init__(self, settings: TransferSettings, tracker: Any, run_id: str) -> None:
        self.settings, self.tracker, self.run_id = settings, tracker, run_id
        self.storage = Storage(settings.storage)
        self.node = ray.get_runtime_context().get_node_id()
        self.watchdog = Watchdog()
        self.live = Live(self.name)
        self.resources: StageSettings = getattr(settings, self.name)
        self.setup()

    @abstractmethod
    def setup(self) -> None:
        """Loads what the stage needs, once."""

    @abstractmethod
    def work(self, rows: list[Row], *, smaller: bool) -> list[Outcome]:
        """Results of a group of rows, in order.

        Args:
            smaller: spend less memory; the last try after running out of it.
        """

    def free(self) -> None:
        """Gives back what memory it can: before a smaller try, and after each where others share the GPU."""
        gc.collect()

    def groups(self, rows: list[Row]) -> list[list[Row]]:
        """Rows that are worked on together."""
        return [[row] for row in rows]

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        todo = [row for row in rows if row.get("error_code") is None]
        admitted = ray.get(self.tracker.admit.remote(self.name, [row["sample_id"] for row in todo])) if todo else {}
        together, alone = [], []
        for row in todo:
            action, attempts = admitted[row["sample_id"]]
            row["attempts"] = attempts
            if action == "crashed":
                self._fail(row, RowError(ErrorCode.CRASHED, "the row took its worker process down twice"))
            elif action == "timed_out":
                budget = self.settings.limits.row_seconds
                self._fail(row, RowError(ErrorCode.TIMED_OUT, f"the row took more than limits.row_seconds={budget:g}"))
            else:
                (alone if action == "alone" else together).append(row)
        for group in [*self.groups(together), *([row] for row in alone)]:
            self._run(group)
        return self.output(rows)

    def output(self, rows: list[Row]) -> pa.Table:
        """The batch for the next stage."""
        return pa.Table.from_pylist(rows, schema=STATE)

    def _run(self, group: list[Row]) -> None:
        """Works on a group; if that fails as a whole, on each of its rows alone."""
        ids = [row["sample_id"] for row in group]
        budget = self.settings.limits.row_seconds * len(group)
        began = time.perf_counter()
        ray.get(self.tracker.begin.remote(self.name, ids, self.node, budget))
        self.watchdog.arm(budget)
        try:
            outcomes = self._attempt(group)
        finally:
            self.watchdog.disarm()
            seconds = time.perf_counter() - began
            ray.get(self.tracker.end.remote(self.name, ids))
        if outcomes is None:
            for row in group:
                self._run([row])
            return
        if 0 < self.resources.gpus < 1:
            self.free()
        self.live.ended(group, outcomes, seconds)
        for row, outcome in zip(group, outcomes, strict=True):
            row[f"seconds_{self.name}"] = seconds / len(group)
            if isinstance(outcome, RowError):
                self._fail(row, outcome)
            else:
                row.update(outcome)

    def _attempt(self, group: list[Row]) -> list[Outcome] | None:
        """Outcomes of the group, or None if its rows should be tried one by one.

        Raises:
            Unwritable: the output takes no files, which ends the run: it says nothing of the rows, and is the same for all.
        """
        for smaller in (False, True):
            memory, failed = False, None
            try:
                return self.work(group, smaller=smaller)
            except RowError as error:
                if len(group) == 1:
                    return [error]
            except Unwritable:
                raise
            except StorageUnavailable as error:
                if len(group) == 1:
                    return [RowError(ErrorCode.STORAGE_UNAVAILABLE, str(error))]
            except Exception as error:
                end_if_broken(self.name, error)
                memory = out_of_memory(error)
                if len(group) > 1:
                    what = "running out of memory" if memory else describe(error)
                    for row in group:
                        _note(row, f"{self.name}: alone, after a batch of {len(group)} failed ({what})")
                elif not memory:
                    return [RowError(ErrorCode.INTERNAL, describe(error))]
                elif smaller:
                    what = f"{describe(error)}; lower the size, or give the stage more memory"
                    failed = [RowError(ErrorCode.OUT_OF_MEMORY, what)]
                else:
                    _note(group[0], f"{self.name}: with less memory, after running out of it")
            if memory:
                self.free()  # not before: the exception holds what it was raised among
            if failed or len(group) > 1 or not memory:
                return failed
        raise AssertionError("unreachable")

    def _fail(self, row: Row, error: RowError) -> None:
        row |= {
            "error_code": error.code.value,
            "error_message": error.message[:2000],
            "stage": self.name,
            "payload": None,
        }


class LastStage(Stage):
    """The stage after which a row is a result."""

    versions: str = "{}"  # JSON, of the packages that made the video

    def output(self, rows: list[Row]) -> pa.Table:
        """Result rows, each checked against its schema."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        results = []
        for row in rows:
            row |= {
                "status": "ok" if row["error_code"] is None else "failed",
                "versions": self.versions,
                "run_id": self.run_id,
                "finished_at": now,
            }
            row.pop("payload", None)
            results.append(
                ResultRow.model_validate({k: v for k, v in row.items() if k in ResultRow.model_fields}).model_dump()
            )
        ray.get(self.tracker.finished.remote([row["error_code"] and str(row["error_code"]) for row in results]))
        return pa.Table.from_pylist(results, schema=ResultRow.arrow_schema())


class Cache(Generic[V]):
    """The last `most` values by key."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[Hashable, V] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """The value of a key, made if it is not there; what raises is not kept."""
        if key not in self._values:
            while len(self._values) >= self._most:  # first, so that old and new never share the memory
                self._values.popitem(last=False)
            self._values[key] = make()
        self._values.move_to_end(key)
        return self._values[key]


def _note(row: Row, text: str) -> None:
    row["notes"] = f"{row['notes']}; {text}" if row.get("notes") else text
