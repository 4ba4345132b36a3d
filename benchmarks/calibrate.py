"""Finds wan-nano's preset: which block, temperature, window, span and learning rate transfer motion best without repainting the clip.

    python benchmarks/calibrate.py --method fastvmt --pairs 16 --record benchmarks/calibration.json

One setting at a time, each from the best so far (coordinate descent), on pairs that no other measurement uses. The score is motion
agreement, less five times whatever text accuracy falls beyond 5 points of plain sampling. Every trial is recorded; a second run
goes on from the record.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transfers

from vmt_core import METHODS, Backbone, Sampling
from vmt_core.presets import NANO
from vmt_core.world import judge

_FIRST = 5_000  # pairs of other seeds than those of the ablation

#: Setting -> values to try, in this order.
GRIDS: dict[str, dict[str, list[Any]]] = {
    "fastvmt": {
        "guidance.learning_rate": [(0.003, 0.002), (0.006, 0.004), (0.01, 0.007), (0.03, 0.02)],
        "objective.block": [3, 4, 5, 6, 7],
        "objective.temperature": [1.0, 2.0, 4.0, 8.0],
        "guidance.span": [0.2, 0.3, 0.4, 0.5],
        "objective.window": [5, 7, 9],
        "objective.window_weight": [0.05, 0.2],
        "guidance.inner": [5, 10, 15],
    },
    "ditflow": {
        "guidance.learning_rate": [(0.002, 0.001), (0.01, 0.005), (0.03, 0.015)],
        "objective.block": [3, 4, 5, 6, 7],
        "objective.temperature": [1.0, 2.0, 4.0, 8.0],
        "guidance.span": [0.2, 0.3, 0.4, 0.5],
        "guidance.inner": [5, 10],
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
    """Motion, unless the clip no longer shows what the prompt says."""
    fall = sum(max(0.0, plain[name] - trial[name] - 0.05) for name in ("colour", "shape", "background"))
    return trial["motion"] - 5 * fall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=GRIDS, default="fastvmt")
    parser.add_argument("--settings", help="which of its settings, comma separated; default: all")
    parser.add_argument("--model", default="wan-nano")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--judge", type=Path, default=Path("out/judge.safetensors"), help="trained if it is not there")
    parser.add_argument("--record", type=Path, default=Path("benchmarks/calibration.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    reader, backbone = judge.cached(arguments.judge), Backbone.load(arguments.model)
    chosen = transfers.pairs(arguments.pairs, NANO, first=_FIRST)
    latents = transfers.prepare(backbone, chosen)
    sampling = Sampling(NANO.steps, NANO.shift, NANO.guidance_scale, cfg="batched")
    record: dict[str, dict[str, float]] = json.loads(arguments.record.read_text()) if arguments.record.exists() else {}

    def trial(method: str, settings: dict[str, Any]) -> dict[str, float]:
        key = json.dumps([arguments.pairs, method, settings], sort_keys=True)
        if key not in record:
            made = METHODS[method](preset="nano", **groups(settings)) if method != "none" else METHODS["none"]()
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
