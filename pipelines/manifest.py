"""Manifests: read in batches, check every row before anything runs, write.

What is wrong with a manifest as a whole is refused before the run (`check`); what is wrong with one row's clip or prompt
becomes that row's failure in the run.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from pipelines import adapters, parquet
from pipelines.storage import Storage, absolute, join
from schemas import AdapterRow, ManifestRow, UsageError, first_fault, sample_id
from vmt_core.methods import VIDEO_VERSION, Method, build

_SHOWN_FAULTS = 10
_PART = re.compile(r"part-\d{5,}\.parquet")


@dataclass
class Selection:
    """What a manifest asks for: its ids in order, and the size of its work."""

    ids: list[str] = field(default_factory=list)
    methods: set[str] = field(default_factory=set)
    adapters: dict[str, AdapterRow] = field(default_factory=dict)  # that tuned methods need, by id
    needs: dict[str, str] = field(default_factory=dict)  # row -> its adapter


def files(storage: Storage, uri: str) -> list[str]:
    """The Parquet files of a manifest.

    Raises:
        UsageError: there are none.
    """
    found = [uri] if uri.endswith(".parquet") and not storage.is_folder(uri) else storage.find(uri)
    found = [name for name in found if name.endswith(".parquet")]
    if not found or not storage.exists(found[0]):
        raise UsageError(f"--manifest {uri}: no Parquet file there; make one with jobs/plan.py")
    return found


def check(
    storage: Storage, uri: str, *, revision: str, method: str | None = None, samples: Collection[str] = ()
) -> Selection:
    """Reads a manifest wholly and checks all that can be known before the run.

    Args:
        revision: of the weights that will run.
        method: select its rows only; all are checked.
        samples: select the rows with these ids only; none selects all.

    Raises:
        UsageError: one line per fault: columns, types, values, duplicate ids, ids that are not the digest of their row,
            methods that cannot be built, another model revision.
    """
    faults: dict[str, list[str]] = {}  # what is wrong -> where
    selection = Selection()
    seen: set[str] = set()
    methods: dict[tuple[str, str], Method | str] = {}
    for name in files(storage, uri):
        if wrong := _columns(storage, name):
            faults |= {fault: [] for fault in wrong}
            continue
        row = -1
        for values in _rows(storage, name):
            row += 1
            if fault := _fault(values, seen, methods, revision, selection.adapters):
                faults.setdefault(fault, []).append(f"{name}, row {row}")
            selection.methods.add(values["method"])
            if method in (None, values["method"]) and (not samples or values["sample_id"] in samples):
                selection.ids.append(values["sample_id"])
                if values["adapter_id"]:
                    selection.needs[values["sample_id"]] = values["adapter_id"]
    chosen = set(selection.needs.values())
    selection.adapters = {key: row for key, row in selection.adapters.items() if key in chosen}
    if faults:
        lines = [_line(fault, places) for fault, places in list(faults.items())[:_SHOWN_FAULTS]]
        more = [f"… and {len(faults) - _SHOWN_FAULTS} more"] if len(faults) > _SHOWN_FAULTS else []
        raise UsageError("\n".join([*lines, *more]))
    if missing := sorted(set(samples) - seen):
        raise UsageError(f"--manifest {uri}: has no rows with the ids {', '.join(missing[:_SHOWN_FAULTS])}")
    if not selection.ids:
        rows = f"rows of {method}, only of {', '.join(sorted(selection.methods))}" if selection.methods else "rows"
        rows = f"rows with the ids {', '.join(samples)}" if samples and selection.methods else rows
        raise UsageError(f"--manifest {uri}: has no {rows}")
    return selection


def _line(fault: str, places: Sequence[str]) -> str:
    """A fault with the row that has it, and how many others do."""
    if not places:
        return fault
    others = f" (and {len(places) - 1:,} more rows)" if len(places) > 1 else ""
    return f"{places[0]}{others}: {fault}"


def parts(storage: Storage, folder: str) -> list[str]:
    """The files of a manifest that lies in a folder already.

    Raises:
        UsageError: other Parquet files are there, which would be read as part of the manifest.
    """
    old = parquet.files(storage, folder)
    if others := [uri for uri in sorted(old) if not _PART.fullmatch(uri.removeprefix(absolute(folder) + "/"))]:
        raise UsageError(f"--output {folder}: holds {others[0]}, which is no manifest; take a folder of its own")
    return old


def ids(storage: Storage, names: Sequence[str]) -> set[str]:
    """Of the rows of some files; those that are no manifests have none."""
    found: set[str] = set()
    for name in names:
        with contextlib.suppress(pa.ArrowInvalid, KeyError):
            found |= set(parquet.read(storage, name, ["sample_id"])["sample_id"].to_pylist())
    return found


def write(storage: Storage, folder: str, rows: Sequence[ManifestRow], *, rows_per_file: int = 50_000) -> list[str]:
    """Writes rows as a manifest, in order; it replaces the one that lies in the folder, and nothing else there.

    Raises:
        UsageError: other Parquet files are there, which would be read as part of the manifest.
    """
    old = set(parts(storage, folder))
    written = []
    for part, begin in enumerate(range(0, len(rows), rows_per_file)):
        values = [row.model_dump() for row in rows[begin : begin + rows_per_file]]
        written.append(join(absolute(folder), f"part-{part:05d}.parquet"))
        table = pa.Table.from_pylist(values, schema=ManifestRow.arrow_schema())
        parquet.write(storage, written[-1], table, rows_per_group=5_000)
    for uri in old - set(written):
        storage.delete(uri)
    return written


def subset(storage: Storage, uri: str, target: str, wanted: Callable[[str], bool]) -> None:
    """Writes the rows whose ids are wanted as one Parquet file."""
    tables = []
    for name in files(storage, uri):
        table = parquet.read(storage, name)
        tables.append(table.filter(pa.array([wanted(row) for row in table["sample_id"].to_pylist()])))
    parquet.write(storage, target, pa.concat_tables(tables))


def _columns(storage: Storage, name: str) -> list[str]:
    """What is wrong with the columns of a file."""
    filesystem, path = storage.arrow(name)
    try:
        found = pq.read_schema(path, filesystem=filesystem)
    except pa.ArrowInvalid as error:
        return [f"{name}: not a Parquet file ({error})"]
    faults = []
    for wanted in ManifestRow.arrow_schema():
        if wanted.name not in found.names:
            faults.append(f"{name}: column {wanted.name!r} ({wanted.type}) is missing")
        elif not _alike(found.field(wanted.name).type, wanted.type):
            kind = found.field(wanted.name).type
            faults.append(f"{name}: column {wanted.name!r} is {kind}, it must be {wanted.type}")
    known = set(ManifestRow.model_fields)
    return faults + [f"{name}: column {column!r} is not known" for column in found.names if column not in known]


def _alike(found: pa.DataType, wanted: pa.DataType) -> bool:
    if pa.types.is_string(wanted):
        return pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_null(found)
    return bool(found == wanted) or pa.types.is_null(found)


def _rows(storage: Storage, name: str) -> Iterator[dict[str, Any]]:
    filesystem, path = storage.arrow(name)
    for batch in pq.ParquetFile(path, filesystem=filesystem).iter_batches(batch_size=1000):
        yield from batch.to_pylist()


def _fault(
    values: dict[str, Any],
    seen: set[str],
    methods: dict[tuple[str, str], Method | str],
    revision: str,
    needed: dict[str, AdapterRow],
) -> str | None:
    """What is wrong with a row that makes the whole manifest unfit, or None."""
    try:
        row = ManifestRow.model_validate(values)
    except ValidationError as error:
        return first_fault(error)
    if row.sample_id in seen:
        return f"sample_id {row.sample_id} stands twice"
    seen.add(row.sample_id)
    if row.sample_id != sample_id(values):
        return f"sample_id {row.sample_id} is not the digest of the row (it was edited by hand?); plan again"
    if row.model_revision != revision:
        return (
            f"was planned for {row.model} (revision {row.model_revision}), but --model has revision {revision}: "
            f"give --model {row.model}, or plan again"
        )
    if row.video_version != VIDEO_VERSION:
        return f"was planned for video_version {row.video_version}, this is {VIDEO_VERSION}; plan again"
    key = (row.method, row.method_settings)
    if key not in methods:
        methods[key] = _built(*key)
    method = methods[key]
    if isinstance(method, str):
        return method
    if (method.adapter is None) != (row.adapter_id is None):
        needs = "none" if method.adapter is None else "one"
        return f"adapter_id {row.adapter_id}, but {row.method} needs {needs}; plan again"
    if row.adapter_id is not None and row.adapter_id not in needed:
        adapter = adapters.wanted(row)
        if adapter.adapter_id != row.adapter_id:
            return f"adapter_id {row.adapter_id} is not the one that {row.method} needs for this reference; plan again"
        needed[row.adapter_id] = adapter
    return None


def _built(name: str, settings: str) -> Method | str:
    """A method, or what is wrong with its settings."""
    try:
        groups = json.loads(settings)
        if not isinstance(groups, dict):
            return f"method_settings: not a JSON object: {settings:.100}"
        return build(name, groups)
    except ValueError as error:
        return f"method_settings: {error}"
