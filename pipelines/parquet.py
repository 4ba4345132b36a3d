"""Parquet files as whole objects; of thousands of small ones, as Ray writes one for each block, many are read side by side.

pyarrow's datasets keep 100 KB of every file that they have read, and ask an object storage three times for each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.storage import Storage

_THREADS = 16
_AHEAD = 64  # files that are read before they are asked for


def files(storage: Storage, folder: str) -> list[str]:
    """All that lie below a folder, sorted."""
    return [uri for uri in storage.find(folder) if uri.endswith(".parquet")]


def read(storage: Storage, uri: str, columns: Sequence[str] | None = None, schema: pa.Schema | None = None) -> pa.Table:
    """One file.

    Args:
        columns: which, in this order; all by default.
        schema: types of the columns; those that the file lacks, being of an earlier version, are null.

    Raises:
        ArrowInvalid: it is no Parquet file; names it.
        KeyError: it lacks a column, and no schema is given.
    """
    content = storage.read(uri)
    try:
        with pq.ParquetFile(pa.BufferReader(content)) as file:
            there = file.schema_arrow.names
            names = list(columns if columns is not None else schema.names if schema is not None else there)
            table = file.read([name for name in names if name in there], use_threads=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise pa.ArrowInvalid(f"{uri}: {error}") from error
    if schema is None:
        return table.select(names)
    kinds = [schema.field(name).type for name in names]
    found = [
        table[name].cast(kind) if name in there else pa.nulls(table.num_rows, kind)
        for name, kind in zip(names, kinds, strict=True)
    ]
    return pa.table(found, names)


def each(
    storage: Storage, uris: Iterable[str], columns: Sequence[str] | None = None, schema: pa.Schema | None = None
) -> Iterator[tuple[str, pa.Table]]:
    """Every file with its rows, in order; raises as `read` does."""
    left = iter(uris)
    with ThreadPoolExecutor(_THREADS) as pool:
        ahead: deque[tuple[str, Future[pa.Table]]] = deque()
        try:
            while True:
                ahead += [
                    (uri, pool.submit(read, storage, uri, columns, schema)) for uri in islice(left, _AHEAD - len(ahead))
                ]
                if not ahead:
                    return
                uri, table = ahead.popleft()
                yield uri, table.result()
        finally:
            for _, table in ahead:
                table.cancel()


def write(storage: Storage, uri: str, table: pa.Table, *, rows_per_group: int | None = None) -> None:
    """One file, atomically."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=rows_per_group, compression="zstd")
    storage.write(uri, sink.getvalue().to_pybytes())
