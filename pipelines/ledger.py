"""What is done: the result rows, and nothing else. Ray Data's checkpoint is mended to say the same before every run.

Ray commits a block in two phases: a pending file of ids, then the result rows under names with the same prefix, then the pending
file is renamed. A driver that dies between leaves pending files; on object storage, where a rename is a copy and a delete,
it may leave both names. `mend` finishes or undoes such commits, so that a row is in the checkpoint if and only if it is in the results.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import parquet
from pipelines.storage import Storage, join
from schemas import ResultRow

ID = "sample_id"
PARTITIONS = ["status", "method"]
_PENDING = ".pending.parquet"
_OURS = "mended-"  # files that are not of a block
_MANY = 500  # files of a folder that become few: Ray reads every one of the checkpoint, people those of the results
_ROWS = 20_000  # of a gathered file
Report = Callable[[str], None]


class Ledger:
    """The results of an output folder.

    Args:
        storage: how to reach it.
        output: the folder or prefix.
        report: told, in one line, of every repair.
    """

    def __init__(self, storage: Storage, output: str, report: Report = print) -> None:
        self._storage = storage
        self._report = report
        self.results = join(output, "results")
        self.checkpoint = join(output, "run", "checkpoint")

    def mend(self) -> dict[str, str | None]:
        """Makes results and checkpoint agree after whatever happened; returns what is done (see `done`).

        Raises:
            ValueError: a result file cannot be read; its name and what to do.
        """
        self._settle_pending()
        done = self._without_duplicates()
        files = parquet.files(self._storage, self.checkpoint)
        committed = {row for _, table in parquet.each(self._storage, files, [ID]) for row in table[ID].to_pylist()}
        if committed != done.keys() or len(files) > _MANY:
            if committed and committed != done.keys():
                self._report(f"mending the checkpoint: it held {len(committed)} ids, the results {len(done)}")
            self._rewrite_checkpoint(done)
        return done

    def done(self) -> dict[str, str | None]:
        """sample_id -> error code, or None for ok, of every result row."""
        return {row: code for row, code, _ in self._index()}

    def forget(self, rows: Collection[str]) -> None:
        """Removes result rows, so that they are made again. The checkpoint forgets them first: no row is ever lost between."""
        chosen = set(rows)
        self._rewrite_checkpoint([row for row in self.done() if row not in chosen])
        self._remove(chosen)

    def gather(self) -> None:
        """Makes few files of very many, a folder at a time, for those who read the results; `mend` puts right what dies within it.

        Only after a run: then nothing is pending that names of files say what it belongs to.
        """
        folders: dict[str, list[str]] = {}
        for uri in parquet.files(self._storage, self.results):
            folder, name = uri.rsplit("/", 1)
            if not name.startswith(_OURS):
                folders.setdefault(folder, []).append(uri)
        for folder, files in folders.items():
            if len(files) > _MANY:
                self._report(f"gathering {len(files)} files of {folder}")
                self._gather(folder, files)

    def _gather(self, folder: str, files: list[str]) -> None:
        tables: dict[str, pa.Table] = {}
        rows = 0
        for uri, table in parquet.each(self._storage, files):
            tables[uri] = table
            rows += table.num_rows
            if rows >= _ROWS or uri == files[-1]:
                self._write(folder, pa.concat_tables(tables.values(), promote_options="default"))
                self._storage.delete_all(tables.keys())
                tables, rows = {}, 0

    def scan(self, columns: Sequence[str], rows: Collection[str] | None = None) -> Iterator[pa.Table]:
        """Columns of the result rows (of some ids, or all), a file at a time.

        Raises:
            ValueError: a file cannot be read; its name and what to do.
        """
        wanted, rows = list(dict.fromkeys([ID, *columns])), None if rows is None else set(rows)
        for uri, table in self._tables(wanted):
            chosen = (
                table
                if rows is None
                else table.filter(pa.array([row in rows for row in table[ID].to_pylist()], pa.bool_()))
            )
            folders = dict(part.split("=", 1) for part in uri.split("/") if "=" in part)  # the last of a name counts
            for name in PARTITIONS:
                if name in wanted:
                    values = pa.array([folders[name]] * chosen.num_rows, pa.string())
                    chosen = chosen.set_column(wanted.index(name), name, values)
            yield chosen.select(list(columns))

    def _tables(self, columns: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
        """Every result file with its rows; the folders' names are not in them."""
        try:
            yield from parquet.each(
                self._storage, parquet.files(self._storage, self.results), columns, ResultRow.arrow_schema()
            )
        except pa.ArrowInvalid as error:
            raise ValueError(f"{error}; delete that file to make its rows again") from error

    def _index(self) -> Iterator[tuple[str, str | None, str]]:
        """sample_id, error code and file of every result row."""
        for uri, table in self._tables([ID, "error_code"]):
            for row, code in zip(table[ID].to_pylist(), table["error_code"].to_pylist(), strict=True):
                yield row, code, uri

    def _settle_pending(self) -> None:
        names = self._storage.find(self.checkpoint)
        pending = [name for name in names if name.endswith(_PENDING)]
        if not pending:
            return
        self._report(f"undoing {len(pending)} commits that were cut off")
        committed = set(names)
        cut_off = tuple(
            PurePosixPath(name).name.removesuffix(_PENDING)
            for name in pending
            if name.replace(_PENDING, ".parquet") not in committed  # else only the rename was cut off
        )
        for uri in self._storage.find(self.results):
            if cut_off and PurePosixPath(uri).name.startswith(cut_off):
                self._storage.delete(uri)
        for uri in pending:
            self._storage.delete(uri)

    def _without_duplicates(self) -> dict[str, str | None]:
        """What is done, with every row that stands in several files kept in one of them."""
        rows = list(self._index())
        done = {row: code for row, code, _ in rows}
        if len(done) < len(rows):
            twice = {row for row, count in Counter(row for row, _, _ in rows).items() if count > 1}
            self._report(f"removing second result rows of {len(twice)} rows")
            best = {row: file for row, code, file in sorted(rows, key=lambda item: item[1] is None) if row in twice}
            self._remove(twice, keep=best)
            done = self.done()
        return done

    def _remove(self, rows: Collection[str], keep: dict[str, str] | None = None) -> None:
        """Deletes result rows, except those in the file that `keep` names; the rest of a file goes to a new one first."""
        keep = keep or {}
        files: dict[str, set[str]] = {}
        for row, _, file in self._index():
            if row in rows and keep.get(row) != file:
                files.setdefault(file, set()).add(row)
        for file, unwanted in files.items():
            table = parquet.read(self._storage, file)
            rest = table.filter(pc.invert(pc.is_in(table[ID], pa.array(sorted(unwanted)))))
            if rest.num_rows:
                self._write(file.rsplit("/", 1)[0], rest)
        self._storage.delete_all(files)

    def _rewrite_checkpoint(self, rows: Collection[str]) -> None:
        old = self._storage.find(self.checkpoint)
        if rows:
            self._write(self.checkpoint, pa.table({ID: pa.array(sorted(rows), pa.string())}))
        self._storage.delete_all(old)

    def _write(self, folder: str, table: pa.Table) -> None:
        parquet.write(self._storage, join(folder, f"{_OURS}{uuid.uuid4().hex}.parquet"), table)
