"""Numbers of a run while it goes on, for Prometheus through Ray's metrics agent; `cluster/grafana.json` shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray.util.metrics import Counter, Histogram

from schemas import RowError

_SECONDS = [0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000]
_LOSSES = [0.01, 0.03, 0.1, 0.3, 1, 3, 10]


class Live:
    """The counters of one stage of one actor."""

    def __init__(self, stage: str) -> None:
        self.tags = {"stage": stage}
        self.rows = Counter("vmt_rows", "rows that a stage ended, by status", tag_keys=("stage", "status", "method"))
        self.seconds = Histogram("vmt_seconds", "seconds of a row in a stage", _SECONDS, tag_keys=("stage", "method"))
        self.evaluations = Counter("vmt_evaluations", "guidance gradients computed", tag_keys=("stage", "method"))
        self.loss = Histogram(
            "vmt_guidance_loss", "guidance loss of a row at its end", _LOSSES, tag_keys=("stage", "method")
        )
        self.bytes = Counter("vmt_video_bytes", "bytes of videos written", tag_keys=("stage", "method"))

    def ended(
        self, rows: Sequence[Mapping[str, Any]], outcomes: Sequence[Mapping[str, Any] | RowError], seconds: float
    ) -> None:
        """Counts rows that were worked on together for so many seconds."""
        for row, outcome in zip(rows, outcomes, strict=True):
            tags = self.tags | {"method": str(row["method"])}
            self.rows.inc(1, tags | {"status": str(outcome.code) if isinstance(outcome, RowError) else "ok"})
            self.seconds.observe(seconds / len(rows), tags)
            if isinstance(outcome, RowError):
                continue
            if outcome.get("evaluations"):
                self.evaluations.inc(outcome["evaluations"], tags)
            if outcome.get("guidance_loss_last") is not None:
                self.loss.observe(outcome["guidance_loss_last"], tags)
            if outcome.get("video_bytes"):
                self.bytes.inc(outcome["video_bytes"], tags)
