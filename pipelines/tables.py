"""Comparison of methods: means, paired differences to a baseline with bootstrap intervals, win rates."""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Collection, Iterable
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

    @property
    def compared(self) -> bool:
        """Whether anything of it has a difference to the baseline."""
        return any(cell.difference is not None for cell in self.cells.values())


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

    Args:
        baseline: a method, or one of its variants by its label; of a method with several settings it is the first variant.
    """
    table = _columns(rows)
    names = label(table.variants)
    methods = {name: method for (_, method, *_), name in names.items()}
    base_names = _baseline(names, baseline)
    ordered = sorted(methods, key=lambda name: (name not in base_names, methods[name] != baseline, name))
    place = np.array([ordered.index(names[variant]) for variant in table.variants], int)[table.variant]
    lines = []
    is_base = np.array([name in base_names for name in ordered], bool)
    for category in [ALL, *sorted(table.categories)]:
        inside = category == ALL or table.category == table.categories.index(category)
        base = np.flatnonzero(inside & table.ok & is_base[place])
        for number, name in enumerate(ordered):
            mine = inside & (place == number)
            if not mine.any():
                continue
            ok = np.flatnonzero(mine & table.ok)
            twins = _twins(table, ok, base[:0] if name in base_names else base)
            cells = {}
            for at, metric in enumerate(BETTER):
                column = table.values[:, at]
                differences = np.where(twins >= 0, column[ok] - column[twins], np.nan)
                if not np.isnan(column[ok]).all():
                    cells[metric] = _cell(column[ok], differences, table.reference[ok], metric, draws)
            lines.append(Line(name, methods[name], category, len(ok), int(mine.sum()) - len(ok), cells))
    return lines


def _baseline(names: dict[_Variant, str], baseline: str) -> set[str]:
    """Labels of the baseline: of one choice of settings, in whatever runs and with whatever sampling it was made."""
    found = sorted(
        (name != baseline, name, method, settings)
        for (_, method, settings, _), name in names.items()
        if baseline in (name, method)
    )
    chosen = found[0][2:] if found else None
    return {name for (_, method, settings, _), name in names.items() if (method, settings) == chosen}


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
