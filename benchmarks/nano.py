"""What wan-nano can do: autoencoder, text, unguided motion. The numbers of its model card.

python benchmarks/nano.py --clips 200 --sheet sheet.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import transfers
from PIL import Image
from torch import Tensor

from vmt_core import METHODS, Backbone, Sampling
from vmt_core.metrics.motion import jerk
from vmt_core.presets import NANO
from vmt_core.transfer import Artifact, MotionTransfer
from vmt_core.world import Scene, appearance, judge, render, sample


def autoencoder(backbone: Backbone, clips: int) -> None:
    """PSNR of held-out clips by length and size, flicker of still clips, statistics of the latents."""
    for frames, height, width in ((17, 192, 192), (33, 192, 192), (17, 160, 224), (9, 128, 128), (1, 192, 192)):
        errors, latents, flicker = [], [], []
        for index in range(clips):
            clip = render(sample(20 * index + 19, frames=frames, height=height, width=width))
            latent = backbone.encode(clip)
            latents.append(latent.flatten(1))
            errors.append((backbone.decode(latent).float() - clip.float()).square().mean() / 255**2)
            if frames == 17 and index < 8:
                still = backbone.decode(backbone.encode(clip[:1].expand_as(clip).contiguous()))
                flicker.append(still.float().diff(dim=0).abs().mean())
        values = torch.cat(latents, 1)
        mean = -10 * torch.stack(errors).log10().mean()
        line = (
            f"{frames}x{height}x{width}: PSNR {mean:.2f} dB, latents mean {values.mean():+.3f} std {values.std():.3f}"
        )
        print(line + (f", flicker {torch.stack(flicker).mean():.3f}/255" if flicker else ""), flush=True)


def generate(backbone: Backbone, scenes: Sequence[Scene], batch: int = 10) -> list[Tensor]:
    """Unguided samples of the scenes' captions."""
    sampling = Sampling(NANO.steps, NANO.shift, NANO.guidance_scale, cfg="batched")
    transfer = MotionTransfer(backbone, METHODS["none"](), sampling)
    empty = backbone.caption("")
    shape = (16, (NANO.frames - 1) // 4 + 1, NANO.height // 8, NANO.width // 8)
    artifact = Artifact(torch.zeros(shape), empty)
    clips: list[Tensor] = []
    for start in range(0, len(scenes), batch):
        captions = [backbone.caption(appearance(scene)) for scene in scenes[start : start + batch]]
        number = len(captions)
        made = transfer.denoise([artifact] * number, captions, [empty] * number, range(start, start + number))
        clips += [backbone.decode(latents) for latents in made.latents]
    return clips


def smoothness(clips: Sequence[Tensor], scenes: Sequence[Scene]) -> list[float]:
    """Jerk of the objects' centre where there is one body and it moves."""
    found = []
    for clip, scene in zip(clips, scenes, strict=True):
        path = judge.centre_path(clip)
        if len(scene.bodies) == 1 and not path.isnan().any() and path.diff(dim=0).norm(dim=-1).mean() > 0.5:
            found.append(jerk(path))
    return found


def identity(reader: judge.Judge, clips: Sequence[Tensor]) -> float:
    """Share of clips whose first and last frame show the same bodies."""
    same = 0
    for clip in clips:
        first, last = (reader.look(clip[[at]])[0].argmax(-1) for at in (0, -1))
        same += bool((first == last).all())
    return same / len(clips)


def samples(backbone: Backbone, arguments: argparse.Namespace) -> None:
    """What the judge reads in samples of held-out captions, beside what it reads in the real clips, and how they move."""
    reader = judge.cached(arguments.judge)
    scenes = [sample(20 * index + 19) for index in range(arguments.clips)]
    real = [render(scene) for scene in scenes]
    print(f"judge on {len(real)} real clips: {judge.mean(judge.verdicts(reader, real, scenes))}", flush=True)
    clips = generate(backbone, scenes)
    print(f"judge on {len(clips)} samples: {judge.mean(judge.verdicts(reader, clips, scenes))}")
    jerks = [torch.tensor(smoothness(some, scenes)) for some in (real, clips)]
    print(
        f"jerk: real {jerks[0].median():.3f} ({len(jerks[0])} clips), samples {jerks[1].median():.3f} ({len(jerks[1])} clips)"
    )
    print(
        f"first and last frame show the same: real {identity(reader, real):.3f}, samples {identity(reader, clips):.3f}"
    )
    if arguments.sheet:
        rows = [[real[index], clips[index]] for index in range(min(16, len(clips)))]
        Image.fromarray(transfers.sheet(rows).permute(1, 2, 0).numpy()).save(arguments.sheet)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wan-nano")
    parser.add_argument("what", choices=["autoencoder", "samples", "all"], nargs="?", default="all")
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--judge", type=Path, default=Path("out/judge.safetensors"), help="trained if it is not there")
    parser.add_argument("--sheet", type=Path, help="PNG of the first samples")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    backbone = Backbone.load(arguments.model)
    if arguments.what != "samples":
        autoencoder(backbone, min(24, arguments.clips))
    if arguments.what != "autoencoder":
        samples(backbone, arguments)


if __name__ == "__main__":
    main()
