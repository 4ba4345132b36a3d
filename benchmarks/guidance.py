"""What guidance costs: seconds and peak memory of the denoising loop, variants side by side in one process.

    python benchmarks/guidance.py                                   wan-nano on the CPU
    python benchmarks/guidance.py --device cuda --model 1.3b-random --height 480 --width 832 --frames 81

The variants take turns, `--repeats` times; times are medians, ratios are to plain sampling. Peak memory is what a run needs above
what was held before it (weights included there).
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from vmt_core import METHODS, Artifact, Backbone, MotionTransfer, Sampling, flops
from vmt_core.methods import Method
from vmt_core.presets import native

WAN_1_3B = {"num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960}


def variants(preset: str) -> dict[str, Method]:
    """Name -> method."""
    return {
        "none": METHODS["none"](),
        "fastvmt": METHODS["fastvmt"](preset=preset),
        "ditflow": METHODS["ditflow"](preset=preset),
        "10x10 no skipping": METHODS["fastvmt"](preset=preset, guidance={"interval": 1}),
    }


def load(model: str, device: torch.device) -> Backbone:
    """The transformer of a model, or a Wan 2.1 1.3B with random weights."""
    if model != "1.3b-random":
        return Backbone.load(model, parts=("transformer",), device=device)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        transformer = WanTransformer3DModel(**WAN_1_3B).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    return Backbone(Path(), device, torch.bfloat16, parts={"transformer": transformer})


class Peak:
    """Peak memory above what was held at the start, GiB: of the GPU, or of this process (Linux)."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
            self.held = self._status("VmRSS")

    def gib(self) -> float:
        now = torch.cuda.max_memory_allocated() if self.cuda else self._status("VmHWM")
        return (now - self.held) / 2**30

    def _status(self, name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wan-nano", help="wan-nano, a folder, a hub id, or 1.3b-random")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    for name in ("height", "width", "frames", "steps"):
        parser.add_argument(f"--{name}", type=int, help="default: the model's own")
    parser.add_argument("--rows", type=int, default=1, help="videos of a batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--checkpoint", choices=["none", "selective", "full"], help="default: the model's own")
    args = parser.parse_args()

    defaults, device = native(args.model), torch.device(args.device)
    height, width = args.height or defaults.height, args.width or defaults.width
    frames, steps = args.frames or defaults.frames, args.steps or defaults.steps
    backbone = load(args.model, device)
    policy = backbone.checkpoint_policy = args.checkpoint or defaults.checkpoint
    config = backbone.transformer.config
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(16, (frames - 1) // 4 + 1, height // 8, width // 8, generator=generator)
    text, negative = (torch.randn(n, config.text_dim, generator=generator).to(backbone.dtype) for n in (40, 60))
    geometry = backbone.geometry(latents)
    sampling = Sampling(steps, defaults.shift, 5.0)
    methods = variants(defaults.preset)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    memory: dict[str, float] = {}

    for turn in range(args.repeats + 1):  # the first one warms up
        for name, method in methods.items():
            transfer = MotionTransfer(backbone, method, sampling)
            artifact = Artifact(latents, text[:1])
            peak = Peak(device)
            began = time.perf_counter()
            artifact = transfer.describe(artifact.latents, artifact.empty)
            transfer.denoise([artifact] * args.rows, [text] * args.rows, [negative] * args.rows, list(range(args.rows)))
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - began)
                memory[name] = max(memory.get(name, 0.0), peak.gib())

    base = statistics.median(seconds["none"])
    plain = flops.video(config, geometry, methods["none"], steps, 5.0, policy)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{args.model}, {frames}x{height}x{width} ({geometry.tokens} tokens), {steps} steps, {args.rows} rows, {where}, "
          f"checkpoint {policy}, {args.repeats} repeats, torch {torch.__version__}\n")  # fmt: skip
    print("| variant | seconds | ratio | ratio of FLOPs | peak above weights, GiB |\n|---|---|---|---|---|")
    for name, method in methods.items():
        middle = statistics.median(seconds[name])
        ratio = flops.video(config, geometry, method, steps, 5.0, policy) / plain
        print(f"| {name} | {middle:.2f} | {middle / base:.2f} | {ratio:.2f} | {memory[name]:.2f} |")


if __name__ == "__main__":
    main()
