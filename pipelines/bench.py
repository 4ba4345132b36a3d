"""A benchmark in one resumable command: references, manifest, adapters, videos, metrics, tables, page.

OUT/references.parquet     the suite's clips with their prompts (procedural: OUT/world as well); suite.json says of which suite
OUT/manifest/ OUT/run/ …   as plan and transfer write them, adapters in OUT/adapters
OUT/evaluation/            as evaluate writes it
OUT/comparison.csv         a line for every method; OUT/report.html the page
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any

import pyarrow as pa

from pipelines import evaluate, parquet, plan, suites, synthesize, transfer
from pipelines.storage import Storage, absolute, join
from schemas import (
    BenchSettings,
    EvaluateSettings,
    PlanSettings,
    Reference,
    SynthesizeSettings,
    TransferSettings,
    UsageError,
)
from vmt_core.methods import METHODS
from vmt_core.presets import native
from vmt_core.world import MOTIONS

#: Settings that decide what is compared.
_SUITE = ("suite", "clips", "quick", "model", "height", "width", "frames", "fps")


def run(settings: BenchSettings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Makes and measures what is missing; returns the summary of the evaluation.

    Raises:
        UsageError: an unknown suite or method, a folder that is no benchmark, or another benchmark in the output.
        RunFailed: a step stopped before its end; the same command goes on from there.
    """
    if settings.suite == "procedural" and settings.clips:
        raise UsageError(f"--clips {settings.clips}: is for --suite folder; the procedural suite draws its own")
    storage = Storage(settings.storage)
    settings = settings.model_copy(update={"output": absolute(settings.output)})
    table, about_suite = join(settings.output, "references.parquet"), join(settings.output, "suite.json")
    wanted = json.dumps({name: getattr(settings, name) for name in _SUITE}, indent=2)
    if storage.exists(about_suite) and (held := storage.read(about_suite).decode()) != wanted:
        before = json.loads(held)
        apart = [name for name in _SUITE if before.get(name) != getattr(settings, name)]
        raise UsageError(
            f"--output {settings.output}: holds a benchmark with another {', '.join(apart)}; take another folder"
        )
    if not storage.exists(table):
        clips = (
            procedural(settings, say)
            if settings.suite == "procedural"
            else suites.folder(storage, settings.clips or "", join(settings.output, "clips"))
        )
        storage.write(about_suite, wanted.encode())
        _write(storage, table, clips)
    place = join(settings.output, "manifest")
    planned = PlanSettings.like(settings, references=table, output=place, skip_bad=True)
    plan.run(shorter(planned) if settings.quick else planned, say)
    tuned = any(METHODS[name]().adapter is not None for name in settings.methods)
    made = transfer.run(TransferSettings.like(settings, manifest=place, tune=tuned), say)
    measured = evaluate.everywhere(
        EvaluateSettings.like(
            settings,
            run=[settings.output],
            output=join(settings.output, "evaluation"),
            device="auto",
        )
    )
    summary, lines = evaluate.compared(measured, say)
    about = made | {"title": f"Benchmark: {settings.suite}"}
    page = evaluate.page(measured, storage, about, settings.output, lines)
    storage.write(join(settings.output, "report.html"), page.encode())
    storage.write(join(settings.output, "comparison.csv"), storage.read(join(measured.output, "comparison.csv")))
    say(f"report  {join(settings.output, 'report.html')}")
    return summary


def shorter(settings: PlanSettings) -> PlanSettings:
    """The plan with a quarter of the training steps, where they are not said."""
    changed = deepcopy(settings.method_settings)
    for method in plan.methods_of(settings, native(settings.model)):
        if method.adapter is not None:
            tuning = changed.setdefault(method.name, {}).setdefault("adapter", {}).setdefault("tuning", {})
            for stage in ("spatial", "temporal"):
                steps: int = getattr(method.adapter.tuning, stage).steps
                tuning.setdefault(stage, {}).setdefault("steps", -(-steps // 4))
    return settings.model_copy(update={"method_settings": changed})


def procedural(settings: BenchSettings, say: Callable[[str], None]) -> list[Reference]:
    """The procedural MotionBench from the world's test split: 4 categories x 10 clips x 5 prompts; `quick`: 2 x 1 x 2."""
    categories = ("single", "articulated") if settings.quick else tuple(MOTIONS)
    clips, prompts = (1, 2) if settings.quick else (10, 5)
    defaults = native(settings.model)
    world = SynthesizeSettings.like(
        settings,
        count=len(categories) * clips,
        split="test",
        categories=categories,
        output=join(settings.output, "world"),
        height=settings.height or defaults.height,
        width=settings.width or defaults.width,
        frames=settings.frames or defaults.frames,
        fps=settings.fps or defaults.fps,
    )
    synthesize.run(world, say)
    found = []
    for seed in synthesize.seeds(world):
        scene = synthesize.scene_of(seed, world)
        uri = synthesize.uri_of(scene, world)
        asked = suites.other_looks(scene, prompts, Random(f"prompts {seed}"))
        found.append(
            Reference(
                uri=uri,
                caption=synthesize.captions.appearance(scene),
                category=scene.category,
                prompts="\n".join(asked),
            )
        )
    return found


def _write(storage: Storage, uri: str, clips: list[Reference]) -> None:
    rows = [clip.model_dump() | {"uri": absolute(clip.uri)} for clip in clips]
    parquet.write(storage, uri, pa.Table.from_pylist(rows, schema=Reference.arrow_schema()))
