"""Figures of the report, as SVG that takes the page's colours: intervals of every metric, and quality against seconds."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Sequence
from typing import Any

from pipelines.formats import few
from pipelines.tables import ALL, BETTER, Line

SECONDS = "seconds a video (tuning not counted)"
_INK = "#010203"  # becomes the text colour of the page
_NAMED = 6  # lines whose names find room beside their points


def intervals(lines: Sequence[Line], metric: str) -> str:
    """Mean and 95 % interval of a metric for every method, in all categories; empty if none has it."""
    shown = [line for line in lines if line.category == ALL and metric in line.cells][::-1]
    if not shown:
        return ""
    labels = [_wrapped(line, metric) for line in shown]
    figure, axes = _figure(4.6, 0.5 + (0.16 + 0.14 * max(label.count("\n") + 1 for label in labels)) * len(shown))
    for place, line in enumerate(shown):
        cell = line.cells[metric]
        axes.plot([cell.low, cell.high], [place, place], color=_INK, linewidth=1.2)
        axes.plot(cell.mean, place, "o", color=_INK, markersize=5)
    axes.set_yticks(range(len(shown)), labels, parse_math=False)  # a prompt may stand in it
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.grid(axis="x", alpha=0.2)
    axes.locator_params(axis="x", nbins=5)  # long numbers of near values would run into each other
    axes.set_title(_title(metric), loc="left", fontsize=9)
    return _svg(figure)


def against_seconds(lines: Sequence[Line], metric: str = "motion") -> str:
    """A metric of every method over the seconds that a video takes; empty if fewer than two methods have both."""
    shown = [line for line in lines if line.category == ALL and {metric, "seconds"} <= line.cells.keys()]
    if len(shown) < 2:
        return ""
    figure, axes = _figure(4.6, 3.0)
    for turn, line in enumerate(sorted(shown, key=lambda line: line.cells["seconds"].mean)):
        x, y = line.cells["seconds"].mean, line.cells[metric]
        axes.plot([x, x], [y.low, y.high], color=_INK, linewidth=1.2)
        axes.plot(x, y.mean, "o", color=_INK, markersize=5)
        # neighbours' names are apart: above and below in turns
        end, offset, side = (y.low, -4, "top") if turn % 2 else (y.high, 4, "bottom")
        name = _wrapped(line, metric)
        if len(shown) > _NAMED:
            axes.plot([], [], " ", label=f"{turn + 1}  {line.label}"[:60])
            name = str(turn + 1)
        axes.annotate(
            name,
            (x, end),
            (0, offset),
            textcoords="offset points",
            fontsize=8,
            color=_INK,
            ha="center",
            va=side,
            parse_math=False,
        )
    if len(shown) > _NAMED:
        legend = figure.legend(loc="outside lower left", fontsize=8, frameon=False, handlelength=0, handletextpad=0)
        for text in legend.get_texts():
            text.set_parse_math(False)
    axes.set_xlabel(SECONDS)
    axes.set_title(f"{_title(metric)} against time", loc="left", fontsize=9)
    axes.margins(x=0.25, y=0.2)
    axes.set_xlim(left=max(0, axes.get_xlim()[0]))
    axes.grid(alpha=0.2)
    return _svg(figure)


def _title(metric: str) -> str:
    better = {True: " (more is better)", False: " (less is better)", None: ""}[BETTER[metric]]
    return (SECONDS if metric == "seconds" else metric.replace("_", " ")) + better


def _wrapped(line: Line, metric: str) -> str:
    """A line's label in three lines of 30 characters at most, which leaves room for what is drawn; the table has the whole of it."""
    rest = few(line, metric)
    label = textwrap.fill(line.label, 30, max_lines=3, placeholder=" …")
    return f"{label}\n({rest} videos)" if rest else label


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_INK)
    axes.tick_params(colors=_INK, labelsize=8, length=0)
    axes.xaxis.label.set_color(_INK)
    axes.xaxis.label.set_fontsize(8)
    axes.title.set_color(_INK)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib

    for text in figure.findobj(matplotlib.text.Text):
        text.set_color(_INK)
    sink = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vmt"}):
        figure.savefig(sink, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = sink.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # A page's content security policy forbids style attributes; presentation attributes say the same.
    return re.sub(
        r'style="([^"]*)"', lambda match: _attributes(match[1]), re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    )


def _attributes(style: str) -> str:
    parts = [part.split(":", 1) for part in style.split(";") if ":" in part]
    return " ".join(f'{name.strip()}="{value.strip()}"' for name, value in parts if name.strip() != "font")
