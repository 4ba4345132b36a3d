"""What people see while a run goes on and when it ends: numbers of rows, in plain lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def line(snapshot: Mapping[str, Any], total: int) -> str:
    """`12/40 rows · 2 failed (not_a_video 2) · 310 rows/h · 5 min left`.

    Args:
        snapshot: of the tracker.
        total: rows of this run.
    """
    seconds = snapshot["working_s"]
    finished = snapshot["ok"] + snapshot["failed"]
    parts = [f"{finished}/{total} rows"]
    if snapshot["failed"]:
        parts.append(f"{snapshot['failed']} failed ({codes(snapshot['codes'])})")
    if finished and seconds > 0:
        parts.append(f"{3600 * finished / seconds:,.0f} rows/h")
        if finished < total:
            parts.append(f"{duration(seconds / finished * (total - finished))} left")
    elif seconds:
        parts.append("first rows under way")
    else:
        parts.append("loading models")
    if snapshot["running"]:
        stage, row, running = snapshot["running"][0]
        if running > 60:
            parts.append(f"longest: {row[:8]} in {stage} for {duration(running)}")
    return " · ".join(parts)


def ending(summary: Mapping[str, Any], shown: Sequence[tuple[str, str]]) -> str:
    """The lines at the end of a run.

    Args:
        summary: as in summary.json.
        shown: what lies where, (label, path).
    """
    lines = [
        f"{summary['selected']} selected = {summary['ok']} ok + {summary['failed']} failed + {summary['left']} left"
    ]
    if summary["failed"]:
        lines.append(f"failed: {codes(summary['failed_by_code'])}")
    if summary["made"]:
        lines.append(
            f"made {summary['made']} in {duration(summary['seconds'])}, {summary['videos_per_hour']:,.0f} videos/hour; "
            "seconds per video: "
            + ", ".join(f"{stage} {value:.3g}" for stage, value in summary["seconds_by_stage"].items())
        )
    else:
        lines.append("nothing was left to make")
    width = max(len(label) for label, _ in shown)
    return "\n".join(lines + [f"{label:<{width}}  {path}" for label, path in shown])


def codes(counts: Mapping[str, int], most: int = 3) -> str:
    """`not_a_video 3, crashed 1`, the commonest first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{code} {count}" for code, count in ordered[:most]) + (", …" if len(ordered) > most else "")


def gpu_time(flops: float, tflops: float) -> str:
    """`3.3 h of one GPU at 400 TFLOP/s`."""
    seconds = flops / (tflops * 1e12)
    return f"{duration(seconds) if seconds >= 1 else 'under 1 s'} of one GPU at {tflops:g} TFLOP/s"


def size(count: float) -> str:
    """Of bytes: `42 kB`, `7.1 MB`, `3.3 GB`."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count / 1e3:.0f} kB"


def duration(seconds: float) -> str:
    """`42 s`, `7 min`, `3.3 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
