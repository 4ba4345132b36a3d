"""Finds wan-nano's preset: which block, temperature, window, span and learning rate transfer motion best without repainting the clip.

    python benchmarks/calibrate.py reading --clips 32
    python benchmarks/calibrate.py transfer --method fastvmt --pairs 16

`reading` asks only how well attention tells the motion of real clips, which is cheap: for each noise level, block, temperature and window
the displacement of the tokens on bodies, beside the exact one.

`transfer` makes videos, one setting at a time, each from the best so far (coordinate descent), on pairs that no other measurement uses.
The score is the mean of motion agreement and the correlation of the centres' paths, less five times whatever text accuracy falls beyond 5
points of plain sampling. Every trial is recorded; a second run goes on from the record.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transfers
from torch import Tensor

from vmt_core import METHODS, Backbone, Sampling
from vmt_core.backbone import taps
from vmt_core.backbone.geometry import Geometry
from vmt_core.backbone.sampler import noise, noised
from vmt_core.motion.amf import WindowedAMF
from vmt_core.presets import NANO
from vmt_core.world import MOTIONS, Scene, judge, render, sample, tracks

_FIRST = 5_000  # pairs of other seeds than those of the ablation

#: What `reading` compares.
LEVELS = (0.0, 0.6, 0.8, 0.9, 0.95)
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
WINDOWS = (5, 9, 13)

#: Setting -> values to try, in this order.
GRIDS: dict[str, dict[str, list[Any]]] = {
    "fastvmt": {
        "objective.block": [5, 7],
        "objective.window": [9, 13],
        "guidance.learning_rate": [(0.003, 0.002), (0.006, 0.004), (0.012, 0.008), (0.024, 0.016)],
        "guidance.span": [0.2, 0.4, 0.6],
        "objective.temperature": [2.0, 4.0],
        "guidance.level": ["clean", "step"],
        "objective.window_weight": [0.0, 0.2],
    },
    "ditflow": {
        "objective.block": [5, 7],
        "guidance.learning_rate": [(0.002, 0.001), (0.006, 0.004), (0.012, 0.008), (0.024, 0.016)],
        "guidance.span": [0.2, 0.4, 0.6],
        "objective.temperature": [2.0, 4.0],
    },
}


def groups(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`{"objective.block": 5}` as `{"objective": {"block": 5}}`."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        group, _, key = name.partition(".")
        found.setdefault(group, {})[key] = value
    return found


def score(trial: dict[str, float], plain: dict[str, float]) -> float:
    """Motion and the centre's path, unless the clip no longer shows what the prompt says."""
    fall = sum(max(0.0, plain[name] - trial[name] - 0.05) for name in ("colour", "shape", "background"))
    return (trial["motion"] + trial["centre"]) / 2 - 5 * fall


def exact(scene: Scene, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Where each token of a latent frame goes by the next: (F - 1, N, 2) in tokens (row, col); and which are on a body, and seen."""
    size = scene.height / geometry.rows
    points = (geometry.positions().flip(-1) + 0.5) * size
    middles = [max(0, 4 * frame - 1) for frame in range(geometry.frames)]  # of the frames that a latent holds
    moves, counts = [], []
    for here, there in pairwise(middles):
        path = tracks(scene, points, frame=here)
        moves.append((path.points[there] - path.points[here]).flip(-1) / size)
        counts.append(path.visible[there] & (path.body >= 0))
    return torch.stack(moves), torch.stack(counts)


@torch.no_grad()
def reading(backbone: Backbone, clips: int) -> None:
    """Prints tables of correlation and relative error (1 where nothing would move) of read and exact displacements."""
    scenes = [
        sample(20 * (_FIRST + index) + 19, category="single", frames=NANO.frames, height=NANO.height, width=NANO.width)
        for index in range(clips)
    ]
    latents, empty = [backbone.encode(render(scene)) for scene in scenes], backbone.caption("")
    objectives = [
        WindowedAMF(block=block, temperature=temperature, window=window, span=1, window_weight=0)
        for block in range(backbone.transformer.config.num_layers)
        for temperature in TEMPERATURES
        for window in WINDOWS
    ]
    used = tuple({tap for objective in objectives for tap in objective.taps})
    for sigma in LEVELS:
        found: list[list[Tensor]] = [[] for _ in objectives]
        truth = []
        for seed, (scene, clean) in enumerate(zip(scenes, latents, strict=True)):
            noisy = noised(clean, noise(seed, clean.shape)[0], sigma)
            timestep = torch.full((1,), 1000 * sigma)
            features = taps.row(backbone.features(noisy[None], timestep, backbone.pad([empty]), used), 0)
            geometry = backbone.geometry(noisy)
            moves, counts = exact(scene, geometry)
            truth.append(moves[counts])
            for objective, flows in zip(objectives, found, strict=True):
                flows.append(objective.encode(features, geometry)["flow"][counts])
        moves = torch.cat(truth)
        print(f"\nnoise level {sigma}, {len(moves)} tokens of {clips} clips: correlation / relative error\n")
        print("| block | " + " | ".join(f"tau {t:g}, window {w}" for t in TEMPERATURES for w in WINDOWS) + " |")
        print("|---|" + "---|" * (len(TEMPERATURES) * len(WINDOWS)))
        cells: dict[int, list[str]] = {}
        for objective, flows in zip(objectives, found, strict=True):
            flow = torch.cat(flows)
            alike = torch.corrcoef(torch.stack([flow.flatten(), moves.flatten()]))[0, 1]
            error = (flow - moves).norm(dim=-1).mean() / moves.norm(dim=-1).mean()
            cells.setdefault(objective.block, []).append(f"{alike:.2f} / {error:.2f}")
        for block, line in cells.items():
            print(f"| {block} | " + " | ".join(line) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["reading", "transfer"])
    parser.add_argument("--clips", type=int, default=32, help="of `reading`")
    parser.add_argument("--method", choices=GRIDS, default="fastvmt")
    parser.add_argument("--settings", help="which of its settings, comma separated; default: all")
    parser.add_argument("--model", default="wan-nano")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--categories", default=",".join(MOTIONS), help="of the references, comma separated, in turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--judge", type=Path, default=Path("out/judge.safetensors"), help="trained if it is not there")
    parser.add_argument("--record", type=Path, default=Path("out/calibration.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    backbone = Backbone.load(arguments.model)
    if arguments.what == "reading":
        reading(backbone, arguments.clips)
        return
    reader = judge.cached(arguments.judge)
    categories = arguments.categories.split(",")
    chosen = transfers.pairs(arguments.pairs, NANO, _FIRST, categories)
    these = arguments.pairs if categories == list(MOTIONS) else f"{arguments.pairs} of {arguments.categories}"
    latents = transfers.prepare(backbone, chosen)
    sampling = Sampling(NANO.steps, NANO.shift, NANO.guidance_scale, cfg="batched")
    record: dict[str, dict[str, float]] = json.loads(arguments.record.read_text()) if arguments.record.exists() else {}

    def trial(method: str, settings: dict[str, Any]) -> dict[str, float]:
        made = METHODS[method](preset="nano", **groups(settings)) if method != "none" else METHODS["none"]()
        key = json.dumps([backbone.revision[:12], these, method, made.settings()], sort_keys=True)
        if key not in record:
            outcome = transfers.run(backbone, reader, made, sampling, chosen, latents)
            record[key] = {name: round(float(outcome.column(name).nanmean()), 4) for name in transfers.MEASURES}
            record[key]["seconds"] = round(outcome.seconds / len(chosen), 3)
            arguments.record.write_text(json.dumps(record, indent=1) + "\n")
        return record[key]

    plain = trial("none", {})
    print(f"none: {plain}", flush=True)
    best: dict[str, Any] = {}
    grid = GRIDS[arguments.method]
    for name in arguments.settings.split(",") if arguments.settings else grid:
        results = []
        for value in grid[name]:
            found = trial(arguments.method, best | {name: value})
            results.append((score(found, plain), value))
            print(f"{name}={value}: score {results[-1][0]:.3f} {found}", flush=True)
        best[name] = max(results, key=lambda result: result[0])[1]
        print(f"best so far: {best}", flush=True)


if __name__ == "__main__":
    main()
