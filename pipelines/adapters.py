"""Which adapter a row needs: rows of a manifest and of an index of adapters name the same one by the same id."""

from __future__ import annotations

import json
from typing import Any

from schemas import AdapterRow, ManifestRow
from schemas.rows import ADAPTER_DECIDES, adapter_id
from vmt_core.adapters.settings import TUNING_VERSION
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
