"""What is done: the result rows, and nothing else. Ray Data's checkpoint is mended to say the same before every run.

Ray commits a block in two phases: a pending file of ids, then the result rows under names with the same prefix, then the pending
file is renamed. A driver that dies between leaves pending files; on object storage, where a rename is a copy and a delete,
it may leave both names. `mend` finishes or undoes such commits, so that a row is in the checkpoint if and only if it is in the results.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from pipelines.storage import Storage, join
from schemas import ResultRow

ID = "sample_id"
PARTITIONS = ["status", "method"]
_PENDING = ".pending.parquet"
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
        committed = self._committed()
        if committed != done.keys():
            if committed:
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

    def scan(self, columns: list[str], rows: Collection[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Columns of the result rows (of some ids, or all) in batches."""
        chosen = None if rows is None else ds.field(ID).isin(pa.array(rows, pa.string()))
        dataset = self._dataset()
        if dataset is not None:
            yield from dataset.to_batches(columns=columns, filter=chosen)

    def _dataset(self) -> ds.Dataset | None:
        files = [uri for uri in self._storage.find(self.results) if uri.endswith(".parquet")]
        if not files:
            return None
        filesystem, root = self._storage.arrow(self.results)
        paths = [self._storage.arrow(uri)[1] for uri in files]
        strings = pa.schema([(name, pa.string()) for name in PARTITIONS])
        return ds.dataset(
            paths,
            schema=ResultRow.arrow_schema(),
            filesystem=filesystem,
            format="parquet",
            partitioning=ds.partitioning(strings, flavor="hive"),
            partition_base_dir=root,
        )

    def _index(self) -> Iterator[tuple[str, str | None, str]]:
        """sample_id, error code and file of every result row."""
        try:
            for batch in self.scan([ID, "error_code", "__filename"]):
                yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{self.results}: {error}; delete that file to make its rows again") from error

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
        filesystem, root = self._storage.arrow(self.results)
        for file, unwanted in files.items():
            table = pq.ParquetFile(file, filesystem=filesystem).read()
            rest = table.filter(pc.invert(pc.is_in(table[ID], pa.array(sorted(unwanted)))))
            old = join(self.results, str(PurePosixPath(file).relative_to(root)))
            if rest.num_rows:
                self._write(old.rsplit("/", 1)[0], rest)
            self._storage.delete(old)

    def _committed(self) -> set[str]:
        files = [uri for uri in self._storage.find(self.checkpoint) if uri.endswith(".parquet")]
        if not files:
            return set()
        filesystem, _ = self._storage.arrow(files[0])
        paths = [self._storage.arrow(uri)[1] for uri in files]
        known = ds.dataset(paths, filesystem=filesystem, format="parquet", partitioning=None)  # reads many at once
        return set(known.to_table([ID])[ID].to_pylist())

    def _rewrite_checkpoint(self, rows: Collection[str]) -> None:
        old = self._storage.find(self.checkpoint)
        if rows:
            self._write(self.checkpoint, pa.table({ID: pa.array(sorted(rows), pa.string())}))
        for uri in old:
            self._storage.delete(uri)

    def _write(self, folder: str, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        self._storage.write(join(folder, f"mended-{uuid.uuid4().hex}.parquet"), sink.getvalue().to_pybytes())
