"""Does motion agreement by optical flow order pairs of clips as exact tracks do?

    python benchmarks/metrics.py --scenes 30

Pairs of graded similarity: a held-out clip, and the same clip that turns back after some of its frames. Prints the rank correlation
(Spearman) of both measurements: both clips by flow, and, as the evaluation has it, an exact reference against a clip by flow.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from vmt_core.metrics.motion import Positions, Visible, aligned, flow_tracks, matched, of_world, start_points
from vmt_core.world import MOTIONS, Scene, render, sample, tracks

TURNS = (3, 6, 9, 12)  # of 17 frames: after this one the clip runs backwards
MEASURES = {"motion": aligned, "motion_matched": matched}


def there_and_back(turn: int, frames: int) -> Tensor:
    """Numbers of the frames of a clip that turns back."""
    time = torch.arange(frames)
    return torch.where(time <= turn, time, (2 * turn - time).abs())


def measured(scene: Scene) -> dict[str, list[tuple[float, float, float]]]:
    """Measure -> for each turn the agreement with the whole clip: by exact tracks, by flow, exact against flow."""
    points, clip = start_points(scene.height, scene.width), render(scene)
    exact, flow = of_world(tracks(scene, points)), flow_tracks(clip, points)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in MEASURES}
    for turn in TURNS:
        order = there_and_back(turn, scene.frames)
        turned: tuple[Positions, Visible] = (exact[0][order], exact[1][order])
        seen = flow_tracks(clip[order], points)
        for name, measure in MEASURES.items():
            pairs = ((exact, turned), (flow, seen), (exact, seen))
            one, two, mixed = (measure(*pair, scene.width) for pair in pairs)
            found[name].append((one, two, mixed))
    return found


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's, over what is not nan; ties are as good as never."""
    known = ~(first.isnan() | second.isnan())
    ranks = [values[known].argsort().argsort().double() for values in (first, second)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=30)
    arguments = parser.parse_args()
    categories = list(MOTIONS)
    rows: dict[str, list[tuple[str, tuple[float, float, float]]]] = {name: [] for name in MEASURES}
    for index in range(arguments.scenes):
        category = categories[index % len(categories)]
        for name, values in measured(sample(20 * (500 + index) + 19, category=category)).items():
            rows[name] += [(category, value) for value in values]
    print("| measure | category | pairs | both by flow | exact against flow |\n|---|---|---|---|---|")
    for name, found in rows.items():
        for category in ("all", *categories):
            part = torch.tensor([value for other, value in found if category in ("all", other)], dtype=torch.float64)
            flow, mixed = (rank_correlation(part[:, 0], part[:, column]) for column in (1, 2))
            print(f"| {name} | {category} | {len(part)} | {flow:.3f} | {mixed:.3f} |")


if __name__ == "__main__":
    main()
