"""What tuning costs and what each part of it brings.

    python benchmarks/tuning.py steps                                      dense : sparse seconds a step, on the CPU
    python benchmarks/tuning.py steps --device cuda --model 1.3b-random --height 480 --width 832 --frames 81
    python benchmarks/tuning.py steps --model narrow --height 32 --width 32 --threads 1
    python benchmarks/tuning.py ablation --references 12                   on wan-nano: the shape of the paper's ablation table

The ablation tunes every variant on the same held-out clips and makes the same videos with the same seeds; the columns are those of
`transfers.py`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import transfers
from diffusers import WanTransformer3DModel

from vmt_core import METHODS, Backbone, MotionTransfer, Sampling
from vmt_core.adapters import follow_your_motion as method
from vmt_core.adapters import masked_lora
from vmt_core.adapters.masked_lora import Weights
from vmt_core.adapters.settings import FollowYourMotion
from vmt_core.presets import NANO
from vmt_core.transfer import Artifact
from vmt_core.tuning import TorchEngine, Tuning
from vmt_core.world import Scene, appearance, judge, render, sample

#: Attention is most of a step of it, as in Wan 1.3B at full length.
WIDE = {
    "num_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 48,
    "ffn_dim": 768,
    "text_dim": 128,
    "freq_dim": 64,
}
LIGHT = "sparse, nothing recomputed"
WAN_1_3B = {"num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960}
#: Hardly any arithmetic: what a step costs beside it.
NARROW = {
    "num_layers": 30,
    "num_attention_heads": 12,
    "attention_head_dim": 6,
    "ffn_dim": 32,
    "text_dim": 16,
    "freq_dim": 16,
}
CONFIGS = {"wan-nano": WIDE, "1.3b-random": WAN_1_3B, "narrow": NARROW}


def variants(preset: FollowYourMotion) -> dict[str, FollowYourMotion]:
    """Name -> settings: everything, and everything but one thing."""
    return {
        "follow_your_motion": preset,
        "without decoupling": preset.model_copy(update={"decouple": False}),
        "without sparse sampling": preset.model_copy(update={"sparse": "off"}),
        "without adaptive RoPE": preset.model_copy(update={"positions": "stock"}),
        "without motion loss": preset.model_copy(update={"motion_loss": "off"}),
    }


def steps(arguments: argparse.Namespace) -> None:
    """Seconds of a training step of the temporal stage: all frames against some, in turns."""
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = CONFIGS[arguments.model]
    with torch.device("meta"):
        transformer = WanTransformer3DModel(**config)
    transformer = transformer.to_empty(device=device)
    if dtype != torch.float32:
        transformer = transformer.to(dtype)
    torch.manual_seed(0)
    for weight in transformer.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    transformer.rope = type(transformer.rope)(config["attention_head_dim"], (1, 2, 2), 1024).to(device)
    backbone = Backbone(Path(), device, dtype, parts={"transformer": transformer.requires_grad_(False)})
    frames, height, width = (arguments.frames - 1) // 4 + 1, arguments.height // 8, arguments.width // 8
    whole = torch.randn(16, frames, height, width)
    text = torch.randn(40, config.get("text_dim", 4096))
    prepared = method.Prepared(whole, whole.transpose(0, 1), text, text[:1])
    types = method.head_types(backbone, prepared, FollowYourMotion())
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, str] = {}
    kinds = (("dense", "off", "selective"), ("sparse", "latent", "selective"), (LIGHT, "latent", "none"))
    for name, sparse, policy in kinds:
        backbone.checkpoint_policy = policy
        seconds[name] = []
        settings = FollowYourMotion(sparse=sparse, temporal={"steps": 10**6, "validate_every": 10**6})
        task = method.begin(backbone, "temporal", prepared, types, settings, {})
        task.module.to(dtype)  # as DeepSpeed trains in bf16
        run = Tuning(task, TorchEngine(task.module, task.schedule, device))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for number in range(arguments.repeats + 1):
            began = time.perf_counter()
            run.advance()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - began)
        peaks[name] = f"{torch.cuda.max_memory_allocated() / 2**30:.2f}" if device.type == "cuda" else ""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{arguments.frames}x{arguments.height}x{arguments.width}, {frames * height * width // 4:,} tokens, {device}")
    print("| frames of a step | seconds | peak memory, GiB |\n|---|---|---|")
    for name, value in medians.items():
        print(f"| {name} | {value:.3f} | {peaks[name]} |")
    ratios = [f"dense : {name} = {medians['dense'] / medians[name]:.2f}" for name in ("sparse", LIGHT)]
    print("\n".join(ratios))


def tune(backbone: Backbone, prepared: method.Prepared, settings: FollowYourMotion) -> dict[str, Weights]:
    """Weights of both stages."""
    types = method.head_types(backbone, prepared, settings)
    done: dict[str, Weights] = {}
    for stage in ("spatial", "temporal"):
        task = method.begin(backbone, stage, prepared, types, settings, done)
        run = Tuning(task, TorchEngine(task.module, task.schedule, backbone.device))
        while not run.done:
            run.advance()
        done[stage] = method.weights(run.engine.state(), stage, settings)
    masked_lora.clear(backbone.transformer)
    backbone.transformer.disable_gradient_checkpointing()
    return done


def ablation(arguments: argparse.Namespace) -> None:
    """Every variant on the same references and prompts."""
    reader = judge.cached(arguments.judge)
    backbone = Backbone.load(arguments.model, dtype=torch.float32)
    references = transfers.pairs(arguments.references, NANO, first=2_000)
    pairs = [
        transfers.Pair(one.reference, wanted, seed=one.seed + 100 * turn)
        for one in references
        for turn, wanted in enumerate(_wanted(one, arguments.prompts))
    ]
    sampling = Sampling(NANO.steps, NANO.shift, NANO.guidance_scale, cfg="batched")
    record = transfers.Record(arguments.record, backbone.revision, sampling)
    parts = [[pair for pair in pairs if pair.reference is one.reference] for one in references]
    outcomes, none = [transfers.Outcome("none")], METHODS["none"]()
    for mine in parts:
        latents = transfers.prepare(backbone, mine[:1]) * len(mine)
        make = partial(transfers.run, backbone, reader, none, sampling, mine, latents)
        outcomes[0].add(record.get("none", none, mine, make))
    preset = FollowYourMotion.preset("nano")
    shorter = {
        stage: {"steps": round(getattr(preset, stage).steps * arguments.share)} for stage in ("spatial", "temporal")
    }
    known = variants(FollowYourMotion.preset("nano", **shorter))
    for name in arguments.variants.split(",") if arguments.variants else known:
        outcomes.append(transfers.Outcome(name))
        for mine in parts:
            make = partial(tuned, backbone, reader, name, known[name], sampling, mine)
            outcomes[-1].add(record.get(name, known[name], mine, make))
        print(transfers.table(outcomes), flush=True)
    whole = [one for one in outcomes if one.name in known]
    if len(whole) > 1:
        print(f"\nAgainst {whole[0].name}\n\n{transfers.table(whole)}")


def tuned(
    backbone: Backbone,
    reader: judge.Judge,
    name: str,
    settings: FollowYourMotion,
    sampling: Sampling,
    pairs: Sequence[transfers.Pair],
) -> transfers.Outcome:
    """One reference, tuned and transferred to its prompts."""
    outcome, began, scene = transfers.Outcome(name), time.perf_counter(), pairs[0].reference
    prepared = method.prepare(backbone, render(scene), appearance(scene))
    weights = tune(backbone, prepared, settings)
    transfer = MotionTransfer(backbone, METHODS["follow_your_motion"](preset="nano"), sampling, weights)
    artifacts, empty = [Artifact(prepared.latents, prepared.empty)] * len(pairs), [prepared.empty] * len(pairs)
    texts = [backbone.caption(appearance(pair.wanted)) for pair in pairs]
    found = transfer.denoise(artifacts, texts, empty, [pair.seed for pair in pairs])
    outcome.seconds = time.perf_counter() - began
    for pair, latents in zip(pairs, found.latents, strict=True):
        outcome.rows.append(transfers.measure(reader, pair, backbone.decode(latents)))
        outcome.references.append(scene.seed)
    return outcome


def _wanted(pair: transfers.Pair, prompts: int) -> list[Scene]:
    """Scenes of other looks, of the reference's category."""
    others = [pair.wanted]
    seed = 900_000 + 100 * pair.seed
    while len(others) < prompts:
        scene = sample(20 * seed + 19, category=pair.reference.category)
        seed += 1
        kinds = [[body.kind for body in one.bodies] for one in (scene, pair.reference)]
        if kinds[0] == kinds[1] and scene.background.colour != pair.reference.background.colour:
            others.append(scene)
    return others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["steps", "ablation"])
    parser.add_argument(
        "--model",
        default="wan-nano",
        help="of `ablation`; of `steps`: 1.3b-random, narrow (thirty blocks with hardly any arithmetic), else two wide blocks",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--height", type=int, default=320)
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--references", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--record", type=Path, help="JSONL of what was measured; a second run goes on from there")
    parser.add_argument("--share", type=float, default=1.0, help="of the steps of preset nano")
    parser.add_argument("--variants", help="which, comma separated; default: all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--judge", type=Path, default=Path("out/judge.safetensors"), help="trained if it is not there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    {"steps": steps, "ablation": ablation}[arguments.what](arguments)


if __name__ == "__main__":
    main()
