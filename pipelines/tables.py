"""Tables of methods: means, paired differences to a baseline with bootstrap intervals, win rates; as CSV, Parquet, Markdown and LaTeX."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from array import array
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from schemas import MetricRow

#: Metric -> whether more is better (None: neither; it is there to read the others by).
BETTER: dict[str, bool | None] = {
    "motion": True,
    "motion_matched": True,
    "motion_followed": None,
    "moving": None,
    "smoothness": True,
    "flow_consistency": True,
    "background_leak": False,
    "text_similarity": True,
    "temporal_consistency": True,
    "subject_consistency": True,
    "background_consistency": True,
    "aesthetic_quality": True,
    "motion_fidelity": True,
    "motion_smoothness": True,
    "seconds": False,
}
ALL = "all"

_Array = np.ndarray[Any, Any]
_Variant = tuple[str, str, str, str]  # run, method, its settings and those of the sampling as JSON

#: Table 1 of FastVMT (arXiv 2602.05551). Other clips, other hardware, unstated CLIP: not comparable in absolute terms.
PUBLISHED = (
    ("FastVMT", 0.2422, 0.7471, 0.9865, 184.18, 0.9809, 0.9684, 0.5778, 0.9891),
    ("DiTFlow", 0.2091, 0.4062, 0.9822, 626.83, 0.9557, 0.9678, 0.5310, 0.9801),
    ("SMM", 0.2374, 0.7353, 0.9366, 809.70, 0.8907, 0.9352, 0.5770, 0.9702),
    ("MotionClone", 0.2304, 0.7315, 0.9722, 397.05, 0.9601, 0.9545, 0.4615, 0.9616),
    ("MOFT", 0.2297, 0.6511, 0.9797, 595.81, 0.9593, 0.9413, 0.4581, 0.9716),
    ("DeT", 0.2187, 0.6116, 0.9818, 2745.60, 0.9787, 0.9654, 0.3559, 0.9598),
    ("MotionDirector", 0.2336, 0.4524, 0.9531, 806.64, 0.9173, 0.9379, 0.3443, 0.9633),
    ("MotionInversion", 0.2388, 0.6515, 0.9605, 632.41, 0.9339, 0.9372, 0.4062, 0.9532),
)
#: Its columns: our metric, and what stands in for it by optical flow where it was not measured.
_PAPER = {
    "text_similarity": None,
    "motion_fidelity": "motion_matched",
    "temporal_consistency": None,
    "seconds": None,
    "subject_consistency": None,
    "background_consistency": None,
    "aesthetic_quality": None,
    "motion_smoothness": "smoothness",
}


@dataclass(frozen=True)
class Cell:
    """One metric of one method: mean, interval of the mean, and against the baseline on the same reference, prompt and seed."""

    count: int
    mean: float
    low: float
    high: float
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    wins: float | None = None  # share of pairs in which this method is better; draws count half
    pairs: int = 0
    references: int = 0  # whose videos these are


@dataclass(frozen=True)
class Line:
    """One method, in one category or in all."""

    label: str
    method: str
    category: str
    made: int
    failed: int
    cells: dict[str, Cell]


@dataclass(frozen=True)
class _Columns:
    """What is compared of rows, some 150 bytes of each."""

    variants: list[_Variant]
    categories: list[str]
    variant: _Array  # place in variants
    category: _Array  # place in categories, -1 for none
    pair: _Array  # a number for what two methods' videos have in common that are compared
    run: _Array  # a number for each run
    reference: _Array  # a number for each reference
    ok: _Array
    values: _Array  # (rows, metrics), nan where there is none


def compare(rows: Iterable[MetricRow], baseline: str, draws: int = 2000) -> list[Line]:
    """A line for every method, in all categories together and in each; the baseline first.

    The order of rows does not matter, and none is kept: they may be streamed.
    """
    table = _columns(rows)
    names = label(table.variants)
    methods = {name: method for (_, method, *_), name in names.items()}
    ordered = sorted(methods, key=lambda name: (methods[name] != baseline, name))
    place = np.array([ordered.index(names[variant]) for variant in table.variants], int)[table.variant]
    lines = []
    is_base = np.array([methods[name] == baseline for name in ordered], bool)
    for category in [ALL, *sorted(table.categories)]:
        inside = category == ALL or table.category == table.categories.index(category)
        base = np.flatnonzero(inside & table.ok & is_base[place])
        for number, name in enumerate(ordered):
            mine = inside & (place == number)
            if not mine.any():
                continue
            ok = np.flatnonzero(mine & table.ok)
            twins = _twins(table, ok, base[:0] if methods[name] == baseline else base)
            cells = {}
            for at, metric in enumerate(BETTER):
                column = table.values[:, at]
                differences = np.where(twins >= 0, column[ok] - column[twins], np.nan)
                if not np.isnan(column[ok]).all():
                    cells[metric] = _cell(column[ok], differences, table.reference[ok], metric, draws)
            lines.append(Line(name, methods[name], category, len(ok), int(mine.sum()) - len(ok), cells))
    return lines


def label(variants: Iterable[_Variant]) -> dict[_Variant, str]:
    """A name for every variant: the method, and what sets it apart from the same method's others."""
    variants = sorted(variants)
    short = _short({run for run, *_ in variants})
    names = {}
    for variant in variants:
        run, method = variant[:2]
        twins = [_settings(other) for other in variants if other[1] == method]
        mine = _settings(variant)
        apart = [key for key in sorted(mine) if any(twin.get(key) != mine[key] for twin in twins)]
        parts = [method, *(f"{key}={mine[key]}" for key in apart)]
        if any(other[0] != run and other[1:] == variant[1:] for other in variants):
            parts.append(f"({short[run]})")
        names[variant] = " ".join(parts)
    return names


def _short(runs: Collection[str]) -> dict[str, str]:
    """A name for every run: the end of its place, as long as it takes to tell all of them apart."""
    parts = {run: run.rstrip("/").split("/") for run in runs}
    for length in range(1, max(map(len, parts.values()), default=0) + 1):
        names = {run: "/".join(own[-length:]) for run, own in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {run: run for run in runs}


def _settings(variant: _Variant) -> dict[str, Any]:
    sampling = json.loads(variant[3])
    if revision := sampling.get("model_revision"):
        sampling["model_revision"] = revision[:12]  # of 64 letters
    return _flat(sampling) | _flat(json.loads(variant[2]))


def interval(values: _Array, references: _Array, draws: int) -> tuple[float, float]:
    """The 95 % bootstrap interval of a mean over videos; of one video, its value.

    References are drawn, each with all of its videos: these are alike, and would count as more than they are if each was drawn by itself.
    Where all are of one reference they are drawn one by one, and the interval says nothing of other references.

    Args:
        references: a number for the reference of each video.
    """
    _, unit = np.unique(references, return_inverse=True)
    if unit.max() == 0:
        unit = np.arange(len(values))
    sums, counts = np.bincount(unit, values), np.bincount(unit)
    if len(sums) < 2:
        return float(values.mean()), float(values.mean())
    generator, at_once = np.random.default_rng(0), max(1, 2**16 // len(sums))
    means = []
    for at in range(0, draws, at_once):
        drawn = generator.integers(0, len(sums), (min(at_once, draws - at), len(sums)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def to_csv(lines: Sequence[Line]) -> str:
    """A line for each method and category, a column for each number."""
    names = [metric for metric in BETTER if any(metric in line.cells for line in lines)]
    fields = (
        "count",
        "mean",
        "low",
        "high",
        "difference",
        "difference_low",
        "difference_high",
        "wins",
        "pairs",
        "references",
    )
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(
        ["method", "category", "made", "failed", *(f"{name}_{field}" for name in names for field in fields)]
    )
    for line in lines:
        cells = [line.cells.get(name) for name in names]
        numbers = [None if cell is None else getattr(cell, field) for cell in cells for field in fields]
        shown = ["" if number is None else f"{number:.6g}" for number in numbers]
        writer.writerow([line.label, line.category, line.made, line.failed, *shown])
    return sink.getvalue()


def to_markdown(lines: Sequence[Line]) -> str:
    """A table for each category: means, differences to the baseline in brackets with their interval."""
    names = [metric for metric in BETTER if any(metric in line.cells for line in lines)]
    text = []
    for category in dict.fromkeys(line.category for line in lines):
        part = [line for line in lines if line.category == category]
        digits = {name: decimals(part, name) for name in names}
        text += [
            f"### {category}",
            "",
            "| method | videos | " + " | ".join(names) + " |",
            "|" + "---|" * (len(names) + 2),
        ]
        for line in part:
            cells = " | ".join(_shown(line, name, digits[name]) for name in names)
            text.append(
                f"| {_md(line.label)} | {line.made}{f' (+{line.failed} failed)' if line.failed else ''} | {cells} |"
            )
        text.append("")
    return "\n".join(text)


def to_latex(lines: Sequence[Line]) -> str:
    """Means over all categories, the best of each metric in bold."""
    part = [line for line in lines if line.category == ALL]
    names = [metric for metric in BETTER if any(metric in line.cells for line in part)]
    text = [
        r"\begin{tabular}{l" + "r" * len(names) + "}",
        r"\toprule",
        " & ".join(["method", *(_tex(name) for name in names)]) + r" \\",
        r"\midrule",
    ]
    for line in part:
        cells = []
        for name in names:
            cell = line.cells.get(name)
            mark = best(name, part)
            shown = "--"
            if cell is not None:
                few = "" if cell.count == line.made else rf"\textsuperscript{{{cell.count}/{line.made}}}"
                shown = f"{cell.mean:.{decimals(part, name)}f}{few}"
            cells.append(rf"\textbf{{{shown}}}" if cell is not None and cell.mean == mark else shown)
        text.append(" & ".join([_tex(line.label), *cells]) + r" \\")
    return "\n".join([*text, r"\bottomrule", r"\end{tabular}", ""])


def papers_shape(lines: Sequence[Line]) -> str:
    """Markdown: the columns of FastVMT's Table 1, ours above the published ones."""
    head = [
        "method",
        "text sim.",
        "motion fid.",
        "temp. cons.",
        "time, s",
        "subject",
        "background",
        "aesthetic",
        "smoothness",
    ]
    text = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    ours = [line for line in lines if line.category == ALL]
    names = {
        name: name if instead is None or any(name in line.cells for line in ours) else instead
        for name, instead in _PAPER.items()
    }
    for line in ours:
        cells = [line.cells.get(name) for name in names.values()]
        text.append(
            "| " + " | ".join([_md(line.label), *("" if cell is None else f"{cell.mean:.4g}" for cell in cells)]) + " |"
        )
    text += [
        "| " + " | ".join([f"*{name}, published*", *(f"{value:g}" for value in values)]) + " |"
        for name, *values in PUBLISHED
    ]
    others = " and ".join(f"{name} is {used} by optical flow" for name, used in names.items() if name != used)
    note = (
        "Published numbers: Table 1 of arXiv 2602.05551. Other clips, other hardware, CLIP variant unstated"
        f"{f'; of ours, {others}' if others else ''}: not comparable in absolute terms."
    )
    return "\n".join([*text, "", note, ""])


def _columns(rows: Iterable[MetricRow]) -> _Columns:
    variants: dict[_Variant, int] = {}
    categories: dict[str, int] = {}
    places, keys, ok, values = array("i"), array("Q"), array("b"), array("d")
    runs: dict[str, int] = {}
    for row in rows:
        variant = variants.setdefault((row.run, row.method, row.method_settings, row.sampling), len(variants))
        category = categories.setdefault(row.category, len(categories)) if row.category else -1
        places.extend((variant, category, runs.setdefault(row.run, len(runs))))
        keys.extend((_number(row.run, row.sample_id), _number(row.pair), _number(row.reference_digest)))
        ok.append(row.status == "ok")
        values.extend(math.nan if (value := getattr(row, metric)) is None else value for metric in BETTER)
    key, pair, reference = np.array(keys, np.uint64).reshape(-1, 3).T
    order = np.argsort(key)
    variant, category, run = np.array(places, int).reshape(-1, 3)[order].T
    return _Columns(
        list(variants),
        list(categories),
        variant,
        category,
        pair[order],
        run,
        reference[order],
        np.array(ok, bool)[order],
        np.array(values).reshape(-1, len(BETTER))[order],
    )


def _number(*parts: Any) -> int:
    """64 bits that stand for some values."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _twins(table: _Columns, rows: _Array, base: _Array) -> _Array:
    """For each of `rows`, the row of `base` of the same pair, rather one of its own run; -1 if there is none."""
    twins: _Array = np.full(len(rows), -1)
    for run in np.unique(table.run[base]):  # any run's, then its own
        part = base[table.run[base] == run]
        part = part[np.argsort(table.pair[part], kind="stable")]
        found = part[np.searchsorted(table.pair[part], table.pair[rows]).clip(max=len(part) - 1)]
        same = table.pair[found] == table.pair[rows]
        twins = np.where(same & ((twins < 0) | (table.run[rows] == run)), found, twins)
    return twins


def _cell(values: _Array, differences: _Array, references: _Array, metric: str, draws: int) -> Cell:
    """Of all videos of a method: their values and differences, nan where there is none."""
    known, paired = ~np.isnan(values), ~np.isnan(differences)
    values, differences = values[known], differences[paired]
    low, high = interval(values, references[known], draws)
    clips = len(np.unique(references[known]))
    if not len(differences):
        return Cell(len(values), float(values.mean()), low, high, references=clips)
    first, last = interval(differences, references[paired], draws)
    better = BETTER[metric]
    signed = differences if better is None or better else -differences
    wins = None if better is None else float((signed > 0).mean() + (signed == 0).mean() / 2)
    gain, pairs = float(differences.mean()), len(differences)
    return Cell(len(values), float(values.mean()), low, high, gain, first, last, wins, pairs, clips)


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {
            key: leaf
            for name, inner in value.items()
            for key, leaf in _flat(inner, f"{path}.{name}" if path else name).items()
        }
    return {path: json.dumps(value)}


def few(line: Line, name: str) -> str:
    """How many of a line's videos have a value, where not all of them do: `1 of 10`."""
    cell = line.cells.get(name)
    return "" if cell is None or cell.count == line.made else f"{cell.count} of {line.made}"


def best(metric: str, lines: Sequence[Line]) -> float | None:
    """The best mean, of those that half of the videos have a part in."""
    cells = [(line.cells[metric], line.made) for line in lines if metric in line.cells]
    means = [cell.mean for cell, made in cells if 2 * cell.count >= made]
    better = BETTER[metric]
    return None if better is None or not means else (max if better else min)(means)


def decimals(lines: Sequence[Line], name: str) -> int:
    """Decimals that a metric is shown with: two digits of its narrowest interval, three where there is none."""
    cells = [line.cells[name] for line in lines if name in line.cells]
    widths = [cell.high - cell.low for cell in cells]
    widths += [cell.difference_high - cell.difference_low for cell in cells if cell.difference_high is not None]
    least = min((width for width in widths if width > 0), default=0.05)
    return max(0, min(6, 1 - math.floor(math.log10(least))))


def gain(cell: Cell, digits: int) -> str:
    """The difference to the baseline with its interval, and of how many pairs it is where that are not all videos; empty without one."""
    if cell.difference is None:
        return ""
    shown = [f"{value:+.{digits}f}" for value in (cell.difference, cell.difference_low, cell.difference_high)]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]" + (f", {cell.pairs} pairs" if cell.pairs != cell.count else "")


def _shown(line: Line, name: str, digits: int) -> str:
    cell = line.cells.get(name)
    if cell is None:
        return ""
    told = [gain(cell, digits)] if cell.difference is not None else []
    if rest := few(line, name):
        told.append(f"{rest} videos")
    return f"{cell.mean:.{digits}f}" + (f" ({'; '.join(told)})" if told else "")


def _md(text: str) -> str:
    return text.replace("|", r"\|")


def _tex(text: str) -> str:
    return text.replace("_", r"\_").replace("%", r"\%").replace("&", r"\&").replace("#", r"\#")
