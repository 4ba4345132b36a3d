"""What is seen in the videos of runs whose references and prompts are of the procedural world.

    python benchmarks/seen.py --run OUT

For each method: text accuracy, as the judge reads it; how often the reference's background stands where the prompt wants another; and
the correlation of the path of the one thing there is with that of the reference's (`centre`; clips of several things have none), with its
difference to plain sampling on the same reference, prompt and seed, and the 95 % bootstrap interval over references.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, get_args

import pyarrow.dataset as ds
import torch
import transfers
from torch import Tensor

from vmt_core import video
from vmt_core.metrics.motion import trajectory_correlation
from vmt_core.world import Scene, judge
from vmt_core.world.spec import Background, Figure, Object, Pendulum, ShapeName, Still

_HERE = (0.0, 0.0)
_BODY = re.compile(r"\ban? (\w+) (stick figure|pendulum|" + "|".join(get_args(ShapeName)) + r")\b")
_GROUND = re.compile(r"\ban? (\w+) (\w+) background$")


def said(prompt: str) -> Scene:
    """A scene that looks as the prompt says; where things are means nothing.

    Raises:
        ValueError: not a prompt of the procedural world, in its usual words.
    """
    bodies: list[Any] = []
    for colour, noun in _BODY.findall(prompt):
        if noun == "stick figure":
            bodies.append(Figure(colour=colour, size=0.5, action="wave", start=_HERE, end=_HERE, cycles=1))
        elif noun == "pendulum":
            bodies.append(Pendulum(colour=colour, size=0.5, pivot=_HERE, bob=0.1, swing=1, cycles=1))
        else:
            bodies.append(Object(shape=noun, colour=colour, size=0.2, path=Still(at=_HERE)))
    if not bodies or not (ground := _GROUND.search(prompt)):
        raise ValueError(f"not a prompt of the procedural world: {prompt!r}")
    background = Background(pattern=ground[1], colour=ground[2])
    return Scene(category="single", motion="still", bodies=tuple(bodies), background=background)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", required=True)
    parser.add_argument("--judge", type=Path, default=Path("out/judge.safetensors"), help="trained if it is not there")
    arguments = parser.parse_args()
    reader = judge.cached(arguments.judge)
    read: dict[str, list[list[float]]] = defaultdict(list)
    centres: dict[str, dict[tuple[Any, ...], float]] = defaultdict(dict)
    paths: dict[str, Tensor] = {}
    settings: dict[str, tuple[str, str]] = {}
    for run in arguments.run:
        for row in ds.dataset(f"{run}/results", partitioning="hive").to_table().to_pylist():
            if row["status"] != "ok":
                continue
            known = settings.setdefault(row["method"], (run, row["method_settings"]))
            if known != (run, row["method_settings"]):
                sys.exit(
                    f"{run}: {row['method']} stands there with several settings, or in several runs; give one run of one setting"
                )
            size = {name: row[name] for name in ("height", "width", "frames", "fps")}
            clip, before = video.read(row["video_uri"], **size), said(row["caption"])
            (verdict,) = judge.verdicts(reader, [clip], [said(row["prompt"])])
            (leaked,) = judge.verdicts(reader, [clip], [before])
            read[row["method"]].append(
                [verdict.colour, verdict.shape, verdict.background_colour, leaked.background_colour]
            )
            if len(before.bodies) == 1:
                uri = row["reference_video_uri"]
                if uri not in paths:
                    paths[uri] = judge.centre_path(video.read(uri, **size))
                pair = (row["reference_digest"], row["prompt"], row["seed"])
                centres[row["method"]][pair] = trajectory_correlation(paths[uri], judge.centre_path(clip))
    heads = ["method", "videos", "colour", "shape", "background", "reference's background", "centre", "centre - none"]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for method, values in sorted(read.items()):
        means = [f"{mean:.3f}" for mean in torch.tensor(values).mean(0).tolist()]
        centre = float(torch.tensor(list(centres[method].values())).nanmean())
        print("| " + " | ".join([method, str(len(values)), *means, f"{centre:.3f}", gain(centres, method)]) + " |")


def gain(centres: dict[str, dict[tuple[Any, ...], float]], method: str) -> str:
    """Mean difference to plain sampling over the references, each the mean of its prompts and seeds."""
    pairs = [pair for pair in centres[method] if method != "none" and pair in centres["none"]]
    differences = torch.tensor([centres[method][pair] - centres["none"][pair] for pair in pairs], dtype=torch.float64)
    references = [list(dict.fromkeys(digest for digest, *_ in pairs)).index(digest) for digest, *_ in pairs]
    mean, low, high = transfers.interval(differences, references)
    read = {reference for reference, value in zip(references, differences.tolist(), strict=True) if value == value}
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}], {len(read)} references" if read else ""


if __name__ == "__main__":
    main()
