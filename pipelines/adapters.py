"""Which adapter a row needs: rows of a manifest and of an index of adapters name the same one by the same id."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from typing import Any

from pipelines import parquet
from pipelines.storage import Storage, absolute, check_scheme, join
from schemas import AdapterRow, ManifestRow, RowError, UsageError
from schemas.rows import ADAPTER_DECIDES, adapter_id
from vmt_core.adapters import files
from vmt_core.adapters.settings import TUNING_VERSION, FollowYourMotion
from vmt_core.methods import Method, build


def identity(method: Method, **values: Any) -> str | None:
    """The id of the adapter that a method needs for a clip; None for methods without one."""
    if method.adapter is None:
        return None
    known = {"method": method.name, "tuning": method.adapter.tuning.model_dump_json(), "tuning_version": TUNING_VERSION}
    return adapter_id({name: {**values, **known}[name] for name in ADAPTER_DECIDES})


def wanted(row: ManifestRow) -> AdapterRow:
    """The adapter that a manifest row needs, as a row to tune."""
    adapter = build(row.method, json.loads(row.method_settings)).adapter
    assert adapter is not None
    names = (
        "reference_uri", "reference_digest", "start_frame", "end_frame", "fps", "height", "width", "frames", "method",
        "model", "model_revision", "category",
    )  # fmt: skip
    return AdapterRow.planned(
        **{name: getattr(row, name) for name in names},
        caption=row.caption or "",
        tuning=adapter.tuning.model_dump_json(),
        tuning_version=TUNING_VERSION,
    )


def check_head_file(storage: Storage, tuning: FollowYourMotion, schemes: Collection[str]) -> None:
    """Raises a UsageError where a table of head types cannot be what every worker reads."""
    file = tuning.head_file
    if not file:
        return
    if absolute(file) != file:
        raise UsageError(f"tuning: head_file {file}: give its whole path, workers have another directory")
    try:
        check_scheme(file, schemes)
    except RowError as error:
        raise UsageError(f"tuning: head_file {error.message}") from error
    if not storage.exists(file):
        raise UsageError(f"tuning: head_file {file} is not there")


def index_file(folder: str, adapter_id: str) -> str:
    """Where the index row of an adapter lies, below a folder of adapters."""
    return join(folder, "index", f"{adapter_id}.parquet")


def index(storage: Storage, folder: str) -> dict[str, AdapterRow]:
    """What became of every reference so far, by adapter id, of a folder of adapters."""
    names = parquet.files(storage, join(folder, "index"))
    found = parquet.each(storage, names, schema=AdapterRow.arrow_schema())
    return {
        values["adapter_id"]: AdapterRow.model_validate(values) for _, table in found for values in table.to_pylist()
    }


def lacking(storage: Storage, folder: str, needed: Iterable[AdapterRow]) -> list[AdapterRow]:
    """Those that are not in a folder of adapters."""
    there = {uri.rsplit("/", 2)[-2] for uri in storage.find(folder) if uri.endswith(f"/{files.DONE}")}
    return [row for row in needed if row.adapter_id not in there]


def why(storage: Storage, folder: str, row: AdapterRow) -> str:
    """Why a folder has no adapter of a row, as far as its index says: in brackets, or nothing."""
    rows = index(storage, folder)
    if known := rows.get(row.adapter_id):
        return f" (its tuning failed: {known.error_code})"
    for other in rows.values():
        if other.reference_digest == row.reference_digest:
            names = [name for name in ADAPTER_DECIDES if getattr(other, name) != getattr(row, name)]
            return f" (one of that clip has another {', '.join(names)}: tune and plan must be told the same)"
    return ""


def failure(storage: Storage, folder: str, adapter_id: str) -> str | None:
    """Why the tuning of an adapter failed, or None if nobody tried."""
    uri = index_file(folder, adapter_id)
    if not storage.exists(uri):
        return None
    (row,) = parquet.read(storage, uri, ["error_code", "error_message"]).to_pylist()
    return f"{row['error_code']}: {row['error_message']}" if row["error_code"] else None
