"""Does motion agreement by optical flow order pairs of clips as exact tracks do?

    python benchmarks/metrics.py --scenes 40

Pairs of graded similarity: the second half of a held-out clip, and a clip of other colours and another background that moves on in the
same way for some of its frames and then turns back; from all the way together to all the way apart. Prints the rank correlation
(Spearman) of both measurements: both clips by flow, and, as the evaluation has it, an exact reference against a clip by flow.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from vmt_core.metrics.motion import aligned, flow_tracks, matched, of_world, start_points
from vmt_core.presets import NANO
from vmt_core.world import MOTIONS, Scene, render, sample, tracks

LENGTH = NANO.frames
TURNS = (0, 4, 8, 12, 16)  # of 16 steps, those that are made together
MEASURES = {"motion": aligned, "motion_matched": matched}


def order(turn: int) -> Tensor:
    """Frames of a clip of twice the length that starts in its middle, goes on for `turn` steps and then back."""
    step = torch.arange(LENGTH)
    return LENGTH - 1 + torch.minimum(step, 2 * turn - step)


def measured(scene: Scene, other: Scene) -> dict[str, list[tuple[float, float, float]]]:
    """Measure -> for each turn the agreement of both scenes' clips: by exact tracks, by flow, exact against flow."""
    points = start_points(scene.height, scene.width)
    exact = of_world(tracks(scene, points, LENGTH - 1))
    whole = render(other)
    on = order(LENGTH - 1)
    reference = exact[0][on], exact[1][on]
    flow = flow_tracks(render(scene)[on], points)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in MEASURES}
    for turn in TURNS:
        picked = order(turn)
        turned = exact[0][picked], exact[1][picked]
        seen = flow_tracks(whole[picked], points)
        for name, measure in MEASURES.items():
            pairs = ((reference, turned), (flow, seen), (reference, seen))
            one, two, mixed = (measure(*pair, scene.width) for pair in pairs)
            found[name].append((one, two, mixed))
    return found


def repainted(scene: Scene, looks: Scene) -> Scene:
    """The scene with the colours and the background of another one."""
    bodies = [
        body.model_copy(update={"colour": painted.colour})
        for body, painted in zip(scene.bodies, looks.bodies, strict=True)
    ]
    return scene.model_copy(update={"bodies": tuple(bodies), "background": looks.background})


def pair(index: int, category: str) -> tuple[Scene, Scene]:
    """A held-out scene, and the same motion in the looks of another one with as many bodies."""
    size = {"category": category, "frames": 2 * LENGTH - 1}
    scene = sample(20 * (500 + index) + 19, **size)
    for number in range(1_000):
        looks = sample(20 * (20_000 + 1_000 * index + number) + 19, **size, motion=scene.motion)
        if len(looks.bodies) == len(scene.bodies):
            return scene, repainted(scene, looks)
    raise AssertionError("no scene with as many bodies")


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's, over what is not nan; ties share their rank."""
    known = ~(first.isnan() | second.isnan())
    ranks = [_ranks(values[known]) for values in (first, second)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    below, same = (values[:, None] > values).sum(1), (values[:, None] == values).sum(1)
    return below + (same - 1) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=40)
    arguments = parser.parse_args()
    categories = list(MOTIONS)
    rows: dict[str, list[tuple[str, tuple[float, float, float]]]] = {name: [] for name in MEASURES}
    for index in range(arguments.scenes):
        category = categories[index % len(categories)]
        for name, values in measured(*pair(index, category)).items():
            rows[name] += [(category, value) for value in values]
    print("| measure | category | pairs | both by flow | exact against flow |\n|---|---|---|---|---|")
    for name, found in rows.items():
        for category in ("all", *categories):
            part = torch.tensor([value for other, value in found if category in ("all", other)], dtype=torch.float64)
            flow, mixed = (rank_correlation(part[:, 0], part[:, column]) for column in (1, 2))
            print(f"| {name} | {category} | {len(part)} | {flow:.3f} | {mixed:.3f} |")


if __name__ == "__main__":
    main()
