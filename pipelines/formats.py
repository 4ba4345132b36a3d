"""How a comparison of methods is written down: as CSV, Markdown, LaTeX, and in the shape of the paper's table."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

from pipelines.tables import ALL, BETTER, Cell, Line

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
