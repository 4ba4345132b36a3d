"""The report page of a run: one HTML file beside its videos, to be looked at from disk, with nothing fetched.

Everything that a row says (prompts, paths, messages) is untrusted. Jinja escapes what it writes into the page; the rows
go in once as JSON with `<` escaped, and the page's script shows them as text nodes only. Links are decided here, not in
the page.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import posixpath
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipelines import formats, plots, progress, tables
from pipelines.tables import Line
from schemas.errors import ErrorCode
from schemas.rows import ResultRow

#: Text columns travel as indexes into a pool of distinct strings, the others as numbers. Text as well are the seed,
#: which may exceed what JavaScript holds exactly, the links to the result, to the reference as the model saw it,
#: and to the original clip, the tracks of points that can be drawn over both, the run, where a page shows several, and why a
#: video that was made could not be measured.
ROWS = 10_000  # that a page shows at most: failures first
_FEW = 8  # references, of which an interval is rough
_SCHEMA = {field.name: str(field.type) for field in ResultRow.arrow_schema()}
_TEXT = (
    *(name for name, kind in _SCHEMA.items() if kind == "string"),
    *("seed", "video", "reference", "source", "tracks", "reference_tracks", "run", "fault"),
)
_NUMBERS = tuple(name for name, kind in _SCHEMA.items() if kind != "string" and name != "seed")
_STAGES = ("encode", "transfer", "finish")

_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(
    rows: Iterable[Mapping[str, Any]],
    summary: Mapping[str, Any],
    output: str,
    *,
    lines: Sequence[Line] = (),
    place: str = "run",
    runs: Sequence[str] = (),
) -> str:
    """The report as one HTML page, to be written to OUT/run/report.html.

    Args:
        rows: result rows (`schemas.rows.ResultRow`) as dicts, in the order to show; missing columns count as empty.
        summary: what the run says of itself, every key optional: title, manifest, run_id, started_at, finished_at, selected, ok,
            failed, left, seconds, videos_per_hour, failed_by_code, seconds_by_stage (means per video), model,
            model_revision, notice, versions, adapters (of tuned methods: reference_uri, caption, heads as PNG bytes, seconds, and
            by stage a curve of (step, loss, validation loss)).
        output: the OUT prefix (a path or a URL); what lies below it is linked relatively, so that OUT can be moved.
        lines: of the comparison of methods; rows may then hold `metrics`, a dict of numbers, and tracks as
            `vmt_core.metrics.motion.packed` makes them, their run, and a `fault` of the measurement.
        place: folder of the page below OUT.
        runs: other OUTs, whose videos are shown: they are linked relatively, too, if they lie beside this one.
    """
    rows = list(rows)
    command = _command(summary)
    packed = json.dumps(
        _pack(rows, output, place, runs) | {"command": command, "total": _total(rows, summary)},
        separators=(",", ":"),
        allow_nan=False,
    ).replace("<", "\\u003c")
    template = _ENVIRONMENT.get_template("report.html.j2")
    page = template.render(
        rows=Markup(packed),  # JSON without `<`: it cannot end its script element
        nonce=hashlib.sha256(packed.encode()).hexdigest()[:32],  # the same rows give the same page
        **_header(rows, summary),
        comparison=_comparison(lines),
    )
    return page.encode("utf-8", "replace").decode()  # lone surrogates cannot be written to a file


def link(uri: str | None, output: str, place: str = "run", runs: Sequence[str] = ()) -> str | None:
    """What a page in OUT/run/ (or another `place`) may point at to reach `uri`, or None if it should not.

    Below OUT, or below one of `runs` that has a folder in common with it: a relative link. Elsewhere: http(s) and plain paths only, so
    that no row can smuggle in a `javascript:`.
    A path that is relative to the working directory is made relative to the page.
    """
    if not uri:
        return None
    uri, output = uri.removeprefix("file://"), output.removeprefix("file://")
    if _scheme(output):
        inside = uri.removeprefix(output.rstrip("/") + "/")
        if inside != uri and not {"", ".", ".."} & set(inside.split("/")):
            return ("../" if place else "") + quote(inside, safe="/=", errors="replace")
        here, there = output.rstrip("/").split("/"), uri.split("/")
        if here[:3] == there[:3] and not {"", ".", ".."} & set(there[3:]):  # elsewhere in the same bucket
            page = "/".join([*here[3:], place]).strip("/") or "."
            return quote(posixpath.relpath("/".join(there[3:]), page), safe="/=", errors="replace")
    elif not _scheme(uri):
        root, target = os.path.abspath(output), os.path.abspath(uri)
        near = any(_below(target, run) and os.path.commonpath((root, os.path.abspath(run))) != os.sep for run in runs)
        if _below(target, root) or near or not os.path.isabs(uri):
            return quote(os.path.relpath(target, os.path.join(root, place)), safe="/=", errors="replace")
    if uri != uri.strip() or re.search(r"[\x00-\x1f\x7f]", uri):  # browsers drop these: `java\nscript:`
        return None
    if _scheme(uri) in ("http", "https"):
        return uri
    if _scheme(uri) or re.match(r"[/\\]{2}", uri):  # another scheme, or another host
        return None
    return re.sub("[%?#]", lambda match: quote(match[0]), uri)


def _below(path: str, folder: str) -> bool:
    folder = os.path.abspath(folder.removeprefix("file://"))
    return os.path.commonpath((folder, path)) == folder


def _scheme(uri: str) -> str:
    """The lower-case scheme of a uri, without whitespace that a browser would ignore; empty for a path."""
    match = re.match(r"([a-z][a-z0-9+.-]*):", re.sub(r"[\x00-\x20]", "", uri).lower())
    return match[1] if match else ""


def _command(summary: Mapping[str, Any]) -> str:
    """What makes a row again, but for its id at the end; empty if the run's manifest is not known."""
    if not summary.get("manifest"):
        return ""
    words = ["python", "jobs/transfer.py", "--manifest", str(summary["manifest"]), "--model", str(summary.get("model"))]
    return shlex.join([*words, *summary.get("again", ()), "--output", "out/again", "--samples"])


def _total(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> int:
    """How many results there are, of which these rows may be a part."""
    return max(len(rows), sum(_count(summary.get(name)) or 0 for name in ("ok", "failed")))


def _pack(rows: Sequence[Mapping[str, Any]], output: str, place: str, runs: Sequence[str]) -> dict[str, Any]:
    """Rows as arrays, each distinct string stored once: 10,000 rows share a few prompts, settings and versions."""
    pool: dict[str, int] = {}
    packed = []
    measured = (row.get("metrics", {}).items() for row in rows)
    metrics = list(dict.fromkeys(name for values in measured for name, value in values if _number(value) is not None))
    numbers = [*_NUMBERS, *metrics]
    for row in rows:
        values = {
            **row,
            "video": link(row.get("video_uri"), output, place, runs),
            "reference": link(row.get("reference_video_uri"), output, place, runs),
            "source": link(row.get("reference_uri"), output, place, runs),
            **row.get("metrics", {}),
        }
        texts = (values.get(name) for name in _TEXT)
        packed.append(
            [-1 if text is None else pool.setdefault(str(text), len(pool)) for text in texts]
            + [_number(values.get(name)) for name in numbers]
        )
    transient = [str(code) for code in ErrorCode if code.transient]
    return {
        "text": _TEXT,
        "numbers": numbers,
        "metrics": metrics,
        "pool": list(pool),
        "rows": packed,
        "transient": transient,
    }


def _comparison(lines: Sequence[Line]) -> dict[str, Any] | None:
    """Figures and tables of the methods, in all categories together and in each where there are several; None without lines."""
    if not lines:
        return None
    shown = [line for line in lines if line.category == tables.ALL]
    metrics = [name for name in tables.BETTER if any(name in line.cells for line in shown)]
    figures = [plots.against_seconds(lines), *(plots.intervals(lines, name) for name in metrics)]
    references = _references(shown)
    parts = [
        [line for line in lines if line.category == category]
        for category in dict.fromkeys(line.category for line in lines if line.category != tables.ALL)
    ]
    return {
        "figures": [Markup(figure) for figure in figures if figure],  # drawn here, from numbers and escaped labels
        "metrics": [_head(name) for name in metrics],
        "intervals": (
            "over the videos of one reference, which says nothing of other clips"
            if references == 1
            else f"over {references} references{', which are few' if references < _FEW else ''}, each drawn with all of its videos"
        ),
        "lines": _table(shown, metrics),
        "categories": [
            {"name": part[0].category, "references": _references(part), "lines": _table(part, metrics)}
            for part in parts
        ]
        if len(parts) > 1
        else [],
    }


def _references(lines: Sequence[Line]) -> int:
    """Of how many references the videos of these lines are."""
    return max((cell.references for line in lines for cell in line.cells.values()), default=0)


def _table(lines: Sequence[Line], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Of one category, ready to print."""
    return [
        {
            "label": line.label,
            "made": line.made,
            "failed": line.failed,
            "cells": [_numbers(line, name, lines) for name in metrics],
        }
        for line in lines
    ]


def _head(name: str) -> str:
    """A metric with what is better: `motion ↑`."""
    words = plots.SECONDS if name == "seconds" else name.replace("_", " ")
    return words + {True: " ↑", False: " ↓", None: ""}[tables.BETTER[name]]


def _numbers(line: Line, name: str, lines: Sequence[Line]) -> dict[str, Any]:
    cell = line.cells.get(name)
    if cell is None:
        return {"mean": "", "gain": "", "few": "", "best": False}
    digits = formats.decimals(lines, name)
    best = len(lines) > 1 and cell.mean == formats.best(name, lines)
    return {
        "mean": f"{cell.mean:.{digits}f}",
        "gain": formats.gain(cell, digits),
        "few": formats.few(line, name),
        "best": best,
    }


def _header(rows: Iterable[Mapping[str, Any]], summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the template writes around the gallery, ready to print; counts that are missing come from the rows."""
    seen = Counter("ok" if row.get("status") == "ok" else "failed" for row in rows)
    counts = {name: _count(summary.get(name)) for name in ("ok", "failed", "left")}
    counts = {name: seen[name] if count is None and name != "left" else count for name, count in counts.items()}
    selected = _count(summary.get("selected"))
    if counts["left"] is None and selected is not None:
        counts["left"] = max(0, selected - (counts["ok"] or 0) - (counts["failed"] or 0))
    codes = summary.get("failed_by_code")
    if not isinstance(codes, Mapping):
        codes = Counter(str(row.get("error_code")) for row in rows if row.get("status") != "ok")
    means = summary.get("seconds_by_stage")
    means = means if isinstance(means, Mapping) else {}
    stages = [(name, _number(means.get(name)) or 0.0) for name in _STAGES]
    started, finished = _moment(summary.get("started_at")), _moment(summary.get("finished_at"))
    rate, seconds, versions = (
        _number(summary.get("videos_per_hour")),
        _number(summary.get("seconds")),
        summary.get("versions"),
    )
    tuning = sum(about["seconds"] for about in summary.get("adapters") or ())
    versions = versions if isinstance(versions, Mapping) else {}
    return {
        "title": str(summary.get("title") or "Motion transfer"),
        "notice": summary.get("notice"),
        "facts": [
            (name, str(value))
            for name, value in (
                ("model", summary.get("model")),
                ("revision", summary.get("model_revision")),
                ("run", summary.get("run_id")),
                ("started", started),
                ("finished", finished),
            )
            if value
        ],
        "counts": {name: f"{count:,}" for name, count in counts.items() if count is not None},
        "progress": _shares([(name, count or 0) for name, count in counts.items()]),
        "codes": _commonest(codes),
        "selected": None if selected is None else f"{selected:,}",
        # a run that found nothing left to make has neither
        "rate": _short(rate) if rate else None,
        "duration": progress.duration(seconds) if seconds else None,
        "stages": [
            {"name": name, "seconds": _short(seconds), "x": x, "width": width}
            for (name, seconds), (_, x, width) in zip(stages, _shares(stages), strict=True)
            if any(means.values())
        ],
        "stage_total": _short(sum(seconds for _, seconds in stages)),
        "versions": {str(name): str(value) for name, value in versions.items()},
        "adapters": [_adapter(about) for about in summary.get("adapters") or ()],
        "tuning": progress.duration(tuning) if tuning else None,
    }


def _adapter(about: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of an adapter: its clip, the map of its heads, a curve for each of its stages."""
    return {
        "name": Path(str(about["reference_uri"])).name,
        "caption": str(about["caption"]),
        "heads": base64.b64encode(about["heads"]).decode(),
        "stages": [{"name": name, **_curve(about[name]["curve"])} for name in ("spatial", "temporal") if name in about],
        "seconds": _short(about["seconds"]),
    }


def _curve(points: Iterable[tuple[int, float, float | None]]) -> dict[str, Any]:
    """A loss curve as two polylines in a box of 240 x 80: the loss as a running mean, the validation loss as it is."""
    points = list(points)
    losses = [loss for _, loss, _ in points]
    width = max(1, len(points) // 20)
    smooth = [
        sum(losses[max(0, i - width) : i + 1]) / len(losses[max(0, i - width) : i + 1]) for i in range(len(losses))
    ]
    checked = [(step, value) for step, _, value in points if value is not None]
    last = max(1, points[-1][0]) if points else 1

    shown = smooth + [value for _, value in checked]  # on one scale
    low, high = min(shown, default=0.0), max(shown, default=1.0)

    def line(values: list[tuple[int, float]]) -> str:
        return " ".join(
            f"{240 * step / last:.1f},{76 - 72 * (v - low) / ((high - low) or 1):.1f}" for step, v in values
        )

    return {
        "steps": last,
        "loss": line([(step, value) for (step, _, _), value in zip(points, smooth, strict=True)]),
        "validation": line(checked),
        "range": f"{_short(low)} to {_short(high)}",
        "from": _short(checked[0][1]) if checked else "",
        "to": _short(checked[-1][1]) if checked else "",
    }


def _commonest(codes: Mapping[Any, Any]) -> str:
    """The error code that most rows failed with: `crashed`, or `mostly crashed` if there are others."""
    if not codes:
        return ""
    code = max(codes, key=lambda code: _number(codes[code]) or 0)
    return f"mostly {code}" if len(codes) > 1 else str(code)


def _shares(parts: list[tuple[str, float]]) -> list[tuple[str, float, float]]:
    """Name, offset and width of each part of a stacked bar, in percent of the whole."""
    total = sum(value for _, value in parts) or 1.0
    bars, offset = [], 0.0
    for name, value in parts:
        bars.append((name, round(offset, 3), round(100 * value / total, 3)))
        offset += 100 * value / total
    return bars


def _number(value: Any) -> int | float | None:
    """The value if it is a finite number: JSON knows no other."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _count(value: Any) -> int | None:
    number = _number(value)
    return None if number is None else int(number)


def _short(value: float) -> str:
    """Three digits or so: 0.042, 1.25, 48.1, 1,204."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _moment(value: Any) -> str | None:
    """An ISO 8601 time without its fractions; anything else as it is."""
    if not value:
        return None
    try:
        return datetime.fromisoformat(str(value)).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return str(value)
