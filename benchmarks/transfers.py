"""What the measurements on wan-nano share: held-out pairs of reference and prompt, transfers of all of them, and what became of each.

A reference is a procedural clip, so its motion is known exactly; a prompt describes another clip of the same category, of other
colours and background. `motion` is motion agreement (`vmt_core.metrics.motion.aligned`) of the reference's exact tracks with tracks
of the generated clip, `centre` the correlation of the paths of the objects' centres, the rest what the judge reads in the generated clip:
shares of objects and backgrounds as the prompt has them, and in `leak` of backgrounds in the reference's colour.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines import tables
from vmt_core import Backbone, MotionTransfer, Sampling
from vmt_core.methods import Method
from vmt_core.metrics.motion import aligned, flow_tracks, of_world, start_points, trajectory_correlation
from vmt_core.presets import Native
from vmt_core.transfer import Artifact
from vmt_core.world import MOTIONS, Scene, appearance, render, sample, tracks
from vmt_core.world.judge import Judge, centre_path, verdicts

MEASURES = ("motion", "centre", "colour", "shape", "background", "leak")


@dataclass(frozen=True)
class Pair:
    """A reference and the scene whose appearance is asked for."""

    reference: Scene
    wanted: Scene
    seed: int


@dataclass
class Outcome:
    """Of one method on some pairs."""

    name: str
    rows: list[dict[str, float]] = field(default_factory=list)
    references: list[int] = field(default_factory=list)  # seed of each row's reference
    clips: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0
    evaluations: int = 0

    def column(self, measure: str) -> Tensor:
        return torch.tensor([row[measure] for row in self.rows], dtype=torch.float64)

    def add(self, other: Outcome) -> None:
        """Appends what the same method made of further pairs."""
        self.rows += other.rows
        self.references += other.references
        self.clips += other.clips
        self.seconds += other.seconds
        self.evaluations += other.evaluations


class Record:
    """Outcomes of parts of the work as lines of JSON, without their clips: what is there is not made again.

    Args:
        common: what decides every outcome: the weights' revision, the sampling, ….
    """

    def __init__(self, path: Path | None, *common: Any) -> None:
        self.path, self.common = path, common
        lines = path.read_text().splitlines() if path and path.exists() else []
        self._known = {line["key"]: Outcome(**line["outcome"]) for line in map(json.loads, lines)}

    def get(self, name: str, settings: Any, part: Sequence[Pair], make: Callable[[], Outcome]) -> Outcome:
        """The outcome of a method with these settings on these pairs."""
        key = repr(
            (*self.common, name, settings, [(pair.seed, pair.reference.seed, pair.wanted.seed) for pair in part])
        )
        if key not in self._known:
            made = self._known[key] = make()
            if self.path is not None:
                with self.path.open("a") as file:
                    file.write(json.dumps({"key": key, "outcome": asdict(replace(made, clips=[]))}) + "\n")
        return self._known[key]


def pairs(number: int, size: Native, first: int = 0, categories: Sequence[str] = tuple(MOTIONS)) -> list[Pair]:
    """Held-out pairs, the categories in turn; seeds of the test split from the `first`-th on."""
    found = []
    for index in range(number):
        category = categories[index % len(categories)]
        options = {
            "category": category,
            "frames": size.frames,
            "height": size.height,
            "width": size.width,
            "fps": size.fps,
        }
        reference = sample(20 * (first + index) + 19, **options)
        for other in count():
            wanted = sample(20 * (10_000 + 1_000 * (first + index) + other) + 19, **options)
            kinds = [[body.kind for body in scene.bodies] for scene in (reference, wanted)]
            colours = [{body.colour for body in scene.bodies} for scene in (reference, wanted)]
            if (
                kinds[0] == kinds[1]
                and not colours[0] & colours[1]
                and reference.background.colour != wanted.background.colour
            ):
                break
        found.append(Pair(reference, wanted, seed=first + index))
    return found


def prepare(backbone: Backbone, chosen: Sequence[Pair]) -> list[Tensor]:
    """Latents of the references."""
    return [backbone.encode(render(pair.reference)) for pair in chosen]


def run(
    backbone: Backbone,
    judge: Judge,
    method: Method,
    sampling: Sampling,
    chosen: Sequence[Pair],
    latents: Sequence[Tensor],
    *,
    name: str | None = None,
    batch: int = 8,
) -> Outcome:
    """Transfers every pair and measures what came out; the seconds are those of describing and denoising."""
    transfer, outcome = MotionTransfer(backbone, method, sampling), Outcome(name or method.name)
    empty = backbone.caption("")
    texts = [backbone.caption(appearance(pair.wanted)) for pair in chosen]
    for start in range(0, len(chosen), batch):
        rows = range(start, min(start + batch, len(chosen)))
        began = time.perf_counter()
        artifacts: list[Artifact] = [transfer.describe(latents[row], empty) for row in rows]
        made = transfer.denoise(
            artifacts, [texts[row] for row in rows], [empty] * len(rows), [chosen[row].seed for row in rows]
        )
        outcome.seconds += time.perf_counter() - began
        outcome.evaluations += sum(log.evaluations for log in made.logs)
        for row, clip in zip(rows, made.latents, strict=True):
            frames = backbone.decode(clip)
            outcome.clips.append(frames)
            outcome.rows.append(measure(judge, chosen[row], frames))
            outcome.references.append(chosen[row].reference.seed)
    return outcome


def measure(judge: Judge, pair: Pair, frames: Tensor) -> dict[str, float]:
    """One generated clip against its reference and its prompt."""
    reference = pair.reference
    points = start_points(reference.height, reference.width)
    agreement = aligned(of_world(tracks(reference, points)), flow_tracks(frames, points), reference.width)
    paths = (centre_path(render(reference)), centre_path(frames))
    centre = trajectory_correlation(*paths) if len(reference.bodies) == 1 else math.nan
    verdict, leaked = verdicts(judge, [frames] * 2, [pair.wanted, pair.reference])
    return {
        "motion": agreement,
        "centre": centre,
        "colour": verdict.colour,
        "shape": verdict.shape,
        "background": verdict.background,
        "leak": leaked.background_colour,
    }


def interval(values: Tensor, references: Sequence[int], draws: int = 10_000) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval over references (`tables.interval`), of what is not nan; all nan where nothing is known."""
    known = ~values.isnan()
    if not known.any():
        return math.nan, math.nan, math.nan
    low, high = tables.interval(values[known].numpy(), torch.tensor(references)[known].numpy(), draws)
    return float(values[known].mean()), low, high


def table(outcomes: Sequence[Outcome], costs: bool = True) -> str:
    """Markdown: means, and the differences of motion and centre to the first outcome with their intervals."""
    base = outcomes[0]
    heads = ["method", *MEASURES, f"motion - {base.name}", f"centre - {base.name}"]
    heads += ["evaluations a clip", "seconds a clip"] if costs else []
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for one in outcomes:
        cells = [one.name, *(_shown("{:.3f}", float(one.column(name).nanmean())) for name in MEASURES)]
        cells += ["" if one is base else _gain(one, base, name) for name in ("motion", "centre")]
        if costs:
            cells += [f"{one.evaluations / len(one.rows):.0f}", f"{one.seconds / len(one.rows):.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _gain(one: Outcome, base: Outcome, measure: str) -> str:
    difference = one.column(measure) - base.column(measure)
    return _shown("{:+.3f} [{:+.3f}, {:+.3f}]", *interval(difference, one.references))


def _shown(form: str, *values: float) -> str:
    return "" if math.isnan(values[0]) else form.format(*values)


def sheet(rows: Sequence[Sequence[Tensor]], shown: int = 5, shrink: int = 2) -> Tensor:
    """A contact sheet (3, H, W): one line for each row, its clips side by side, `shown` frames of each."""
    lines = []
    for row in rows:
        strips = []
        for clip in row:
            picked = clip[torch.linspace(0, len(clip) - 1, shown).round().long()]
            picked = torch.nn.functional.avg_pool2d(picked.float(), shrink).round().to(torch.uint8)
            strips.append(torch.cat(list(picked), 2))
            strips.append(torch.full((3, picked.shape[2], 6), 255, dtype=torch.uint8))
        lines.append(torch.cat(strips[:-1], 2))
        lines.append(torch.full((3, 4, lines[0].shape[2]), 255, dtype=torch.uint8))
    return torch.cat(lines[:-1], 1)
