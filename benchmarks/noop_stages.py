"""Stage actors that do nothing: what is left is the pipeline itself."""

from __future__ import annotations

from pipelines.stage import LastStage, Outcome, Row, Stage


class Encode(Stage):
    name = "encode"

    def setup(self) -> None:
        pass

    def groups(self, rows: list[Row]) -> list[list[Row]]:
        return [rows] if rows else []

    def work(self, rows: list[Row], *, smaller: bool) -> list[Outcome]:
        return [{"payload": b""} for _ in rows]


class Transfer(Encode):
    name = "transfer"


class Finish(LastStage):
    name = "finish"
    setup, groups = Encode.setup, Encode.groups

    def work(self, rows: list[Row], *, smaller: bool) -> list[Outcome]:
        return [{"video_uri": "none"} for _ in rows]
