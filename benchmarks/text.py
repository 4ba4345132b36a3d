"""What the judge reads in the videos of runs whose prompts are of the procedural world: text accuracy of each method.

    python benchmarks/text.py --run OUT

Also how often the reference's background stands where the prompt wants another: what leaked.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, get_args

import pyarrow.dataset as ds
import torch

from vmt_core import video
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
    found: dict[str, list[list[float]]] = defaultdict(list)
    for run in arguments.run:
        for row in ds.dataset(f"{run}/results", partitioning="hive").to_table().to_pylist():
            if row["status"] != "ok":
                continue
            clip = video.read(row["video_uri"], **{name: row[name] for name in ("height", "width", "frames", "fps")})
            (verdict,) = judge.verdicts(reader, [clip], [said(row["prompt"])])
            (leaked,) = judge.verdicts(reader, [clip], [said(row["caption"])])
            found[row["method"]].append(
                [verdict.colour, verdict.shape, verdict.background_colour, leaked.background_colour]
            )
    print("| method | videos | colour | shape | background | reference's background |\n|---|---|---|---|---|---|")
    for method, values in sorted(found.items()):
        means = torch.tensor(values).mean(0).tolist()
        print(f"| {method} | {len(values)} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")


if __name__ == "__main__":
    main()
