"""What each part of FastVMT brings, on wan-nano and held-out procedural clips: the shape of the paper's Table 2.

    python benchmarks/ablation.py --pairs 48

Prints a Markdown table; the same pairs and seeds for every variant, differences to plain sampling with 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
import transfers
from PIL import Image

from vmt_core import METHODS, Backbone, Sampling
from vmt_core.methods import Method
from vmt_core.presets import NANO
from vmt_core.world import MOTIONS, judge, render


def variants(size: int) -> dict[str, Method]:
    """Name -> method. A window as large as the grid is no window."""
    fastvmt = METHODS["fastvmt"]
    return {
        "none": METHODS["none"](),
        "ditflow": METHODS["ditflow"](preset="nano"),
        "fastvmt": fastvmt(preset="nano"),
        "fastvmt without window": fastvmt(preset="nano", objective={"window": 2 * size + 1}),
        "fastvmt without window loss": fastvmt(preset="nano", objective={"window_weight": 0.0}),
        "fastvmt without skipping": fastvmt(preset="nano", guidance={"interval": 1}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wan-nano")
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--first", type=int, default=0, help="pairs that are left out at the beginning")
    parser.add_argument("--record", type=Path, help="JSONL of what was measured; a second run goes on from there")
    parser.add_argument("--categories", default=",".join(MOTIONS), help="of the references, comma separated, in turn")
    parser.add_argument("--variants", help="which, comma separated; default: all")
    parser.add_argument("--batch", type=int, default=8, help="rows that are denoised together")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--judge", type=Path, default=Path("out/judge.safetensors"), help="trained if it is not there")
    parser.add_argument("--sheet", type=Path, help="PNG: the last pairs, the reference beside the first three variants")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    reader = judge.cached(arguments.judge)
    print(f"judge on real clips: {judge.accuracy(reader, clips=100)}", flush=True)
    backbone = Backbone.load(arguments.model)
    categories = arguments.categories.split(",")
    chosen = transfers.pairs(arguments.pairs, NANO, arguments.first, categories)
    sampling = Sampling(NANO.steps, NANO.shift, NANO.guidance_scale, cfg="batched")
    known, record = variants(NANO.width // 16), transfers.Record(arguments.record, backbone.revision, sampling)
    outcomes = [transfers.Outcome(name) for name in (arguments.variants.split(",") if arguments.variants else known)]
    for start in range(0, len(chosen), arguments.batch):
        part = chosen[start : start + arguments.batch]
        latents = transfers.prepare(backbone, part)
        for one in outcomes:
            method = known[one.name]
            make = partial(transfers.run, backbone, reader, method, sampling, part, latents, name=one.name)
            one.add(record.get(one.name, method, part, partial(make, batch=len(part))))
        clips = [[render(pair.reference) for pair in part], *(one.clips[-len(part) :] for one in outcomes[:3])]
        if arguments.sheet and all(map(len, clips)):  # those of a record are gone
            lines = transfers.sheet(list(zip(*clips, strict=True)))
            Image.fromarray(lines.permute(1, 2, 0).numpy()).save(arguments.sheet)
        print(f"\n{start + len(part)} pairs\n\n{transfers.table(outcomes)}", flush=True)
    for category in categories if len(categories) > 1 else ():
        rows = [index for index, pair in enumerate(chosen) if pair.reference.category == category]
        some = [
            transfers.Outcome(one.name, [one.rows[row] for row in rows], [one.references[row] for row in rows])
            for one in outcomes
        ]
        print(f"\n{category}, {len(rows)} pairs\n\n{transfers.table(some, costs=False)}")


if __name__ == "__main__":
    main()
