"""What the pipeline itself costs.

python benchmarks/pipeline.py overhead          wall time of a run beyond its start / the same work in one process
python benchmarks/pipeline.py rows 10000 100000 rows/s and the driver's peak memory with a method that does nothing
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])


def manifest_rows(count: int) -> list:  # type: ignore[type-arg]
    """Rows whose clip nobody looks at."""
    from pipelines import models
    from pipelines.storage import Storage
    from schemas import ManifestRow
    from vmt_core.methods import VIDEO_VERSION

    revision = models.revision("wan-nano", Storage())
    common = {
        "reference_uri": "/none.mp4", "reference_digest": "0" * 64, "start_frame": 0, "fps": 12.0, "height": 64, "width": 64,
        "frames": 5, "method": "none", "steps": 1, "shift": 3.0, "guidance_scale": 1.0, "model": "wan-nano",
        "model_revision": revision, "video_version": VIDEO_VERSION,
    }  # fmt: skip
    return [ManifestRow.planned(**common, prompt=f"prompt {seed % 100}", seed=seed) for seed in range(count)]


def rows(counts: list[int], per_block: int) -> None:
    """Rows per second, and the driver's memory, at each size."""
    from pipelines import manifest
    from pipelines.storage import Storage

    print("| rows | seconds | rows/s | driver's peak, MiB |\n|---|---|---|---|")
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            manifest.write(Storage(), f"{folder}/manifest", manifest_rows(count))
            program = (
                "import json, sys, pathlib\n"
                "from schemas import TransferSettings\n"
                "from pipelines import transfer\n"
                f"s = transfer.run(TransferSettings(manifest='{folder}/manifest', output='{folder}/out', "
                f"stages='noop_stages', rows_per_block={per_block}), say=lambda line: print(line, file=sys.stderr))\n"
                "peak = next(l for l in pathlib.Path('/proc/self/status').read_text().splitlines() if l.startswith('VmHWM'))\n"
                "print(json.dumps([s['seconds_working'], s['ok'], int(peak.split()[1]) / 1024]))\n"
            )
            done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
            seconds, ok, peak = json.loads(done.stdout.splitlines()[-1])
            assert ok == count
            print(f"| {count:,} | {seconds:.0f} | {count / seconds:,.0f} | {peak:,.0f} |", flush=True)


def overhead(videos: int) -> None:
    """A run with one actor of each kind, of one thread each, against the same rows in one process of one thread."""
    import torch

    from pipelines import plan, transfer
    from schemas import PlanSettings, TransferSettings
    from vmt_core import METHODS, Backbone, MotionTransfer, Sampling, video
    from vmt_core.presets import NANO
    from vmt_core.world import MOTIONS, render, sample

    with tempfile.TemporaryDirectory() as folder:
        clips = Path(folder) / "clips"
        clips.mkdir()
        for seed, category in enumerate(MOTIONS):
            video.write(clips / f"{category}.mp4", render(sample(seed, category=category)), 12)
        prompts = [f"a red ball number {index}" for index in range(videos // len(MOTIONS))]
        (clips / "prompts.txt").write_text("\n".join(prompts))
        plan.run(
            PlanSettings(references=str(clips), prompts=f"{clips}/prompts.txt", output=f"{folder}/manifest"),
            lambda line: None,
        )

        torch.set_num_threads(1)
        backbone = Backbone.load("wan-nano")
        method = MotionTransfer(
            backbone, METHODS["fastvmt"](preset="nano"), Sampling(NANO.steps, NANO.shift, NANO.guidance_scale)
        )
        began = time.perf_counter()
        for file in sorted(clips.glob("*.mp4")):
            frames = video.read(file, height=NANO.height, width=NANO.width, frames=NANO.frames, fps=12)
            artifact = method.prepare(frames)
            for index, made in enumerate(method.transfer(artifact, prompts, [0])):
                video.write(Path(folder) / f"{index}.mp4", made, 12)
        core = time.perf_counter() - began

        summary = transfer.run(
            TransferSettings(manifest=f"{folder}/manifest", output=f"{folder}/out"), lambda line: None
        )
        wall = summary["seconds_working"]
        print(
            f"{summary['ok']} videos on wan-nano, {os.cpu_count()} cores, one thread an actor, one actor of each kind\n"
        )
        print("| core compute in one process, s | run beyond its start, s | ratio |\n|---|---|---|")
        print(f"| {core:.1f} | {wall:.1f} | {wall / core:.2f} |")
        print(f"\nstart of Ray and loading of models: {summary['seconds'] - wall:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    modes.add_parser("overhead").add_argument("--videos", type=int, default=16)
    many = modes.add_parser("rows")
    many.add_argument("counts", type=int, nargs="+")
    many.add_argument("--per-block", type=int, default=500)
    args = parser.parse_args()
    if args.mode == "overhead":
        overhead(args.videos)
    else:
        rows(args.counts, args.per_block)


if __name__ == "__main__":
    main()
