"""Latents of world clips and what their tokens show, kept in shards on disk and renewed step by step.

Encoding costs more than a training step on them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from random import Random
from typing import Any

import torch
from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import max_pool3d, pad

from vmt_core.precision import autocast
from vmt_core.world.judge import kind_of
from vmt_core.world.render import masks, render
from vmt_core.world.sample import sample
from vmt_core.world.spec import Scene

Size = tuple[int, int, int]  # frames, height, width

CLIPS_A_SHARD = 32
FIRST_SHARDS = 8  # there at the first step
MOST_SHARDS = 192  # kept; older ones go


class LatentPool:
    """Which shards there are at a step follows from the step alone; a shard's clips follow from its number."""

    def __init__(self, vae: Any, cache: Path) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.cache = cache / _identity(vae)
        self.shards: dict[tuple[Size, int], dict[str, Tensor]] = {}

    def draw(
        self, random: Random, step: int, count: int, size: Size, *, renew: int
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Normalised latents (count, 16, F, H, W), what their tokens show (see `seen`) and the seeds of their scenes.

        Args:
            step: since clips of this size are trained on.
            renew: steps after which a shard is added.
        """
        newest = FIRST_SHARDS + step // renew
        oldest = max(0, newest - MOST_SHARDS)
        self._forget(size, oldest)
        rows, kinds, seeds = [], [], []
        for _ in range(count):
            number, place = random.randrange(oldest, newest), random.randrange(CLIPS_A_SHARD)
            shard = self._shard(size, number)
            rows.append(shard["latents"][place])
            kinds.append(shard["kinds"][place])
            seeds.append(_seed(size, number * CLIPS_A_SHARD + place))
        return torch.stack(rows).float(), torch.stack(kinds), seeds

    def validation(self, size: Size, clips: int) -> tuple[Tensor, list[int]]:
        """The first clips of the validation split, always the same."""
        seeds = [20 * index + 18 for index in range(clips)]
        if (size, -clips) not in self.shards:
            self.shards[size, -clips] = self._encode(size, seeds)
        return self.shards[size, -clips]["latents"].float(), seeds

    def _shard(self, size: Size, number: int) -> dict[str, Tensor]:
        if (size, number) not in self.shards:
            path = self.cache / "x".join(map(str, size)) / f"{number}.safetensors"
            if not path.exists():
                seeds = [_seed(size, number * CLIPS_A_SHARD + place) for place in range(CLIPS_A_SHARD)]
                path.parent.mkdir(parents=True, exist_ok=True)
                building = path.with_name(f".{path.name}.{os.getpid()}")
                save_file(self._encode(size, seeds), building)
                building.rename(path)
            self.shards[size, number] = load_file(path)
        return self.shards[size, number]

    def _forget(self, size: Size, oldest: int) -> None:
        for shard in [key for key in self.shards if key[0] == size and 0 <= key[1] < oldest]:
            del self.shards[shard]
            with contextlib.suppress(FileNotFoundError):
                (self.cache / "x".join(map(str, size)) / f"{shard[1]}.safetensors").unlink()

    @torch.no_grad()
    def _encode(self, size: Size, seeds: list[int]) -> dict[str, Tensor]:
        frames, height, width = size
        device = next(self.vae.parameters()).device
        mean, std = (
            torch.tensor(values, device=device).view(1, -1, 1, 1, 1)
            for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        rows, kinds = [], []
        at_once = 4 if frames > 1 else CLIPS_A_SHARD
        for start in range(0, len(seeds), at_once):
            scenes = [
                sample(seed, frames=frames, height=height, width=width) for seed in seeds[start : start + at_once]
            ]
            kinds += [seen(scene) for scene in scenes]
            pixels = torch.stack([render(scene) for scene in scenes]).to(device).transpose(1, 2).float() / 127.5 - 1
            with autocast(device):  # two to four times faster, an error of 1 %
                latents = self.vae.encode(pixels).latent_dist.mode()
            rows.append(((latents.float() - mean) / std).to("cpu", torch.bfloat16))
        return {"latents": torch.cat(rows), "kinds": torch.stack(kinds)}


def seen(scene: Scene) -> Int[Tensor, "f h w"]:
    """Which kind of body (place in `judge.KINDS`, 0 is none) each token of the model shows, int8: 16 by 16 pixels of four frames."""
    small = scene.model_copy(update={"height": scene.height // 4, "width": scene.width // 4})
    kinds = torch.tensor([*(kind_of(body) for body in scene.bodies), 0])
    pixels = kinds[masks(small).int()].float()
    pixels = pad(pixels, (0, 0, 0, 0, 3, 0))  # the first frame is a latent frame of its own
    return max_pool3d(pixels.unsqueeze(0), 4)[0].to(torch.int8)


def _identity(vae: Any) -> str:
    """Of what decides the latents: the encoder and their statistics, not the decoder."""
    digest = hashlib.sha256(repr([vae.config.latents_mean, vae.config.latents_std]).encode())
    for name, value in vae.state_dict().items():
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(value.float().numpy(force=True).tobytes())
    return digest.hexdigest()[:16]


def _seed(size: Size, index: int) -> int:
    """The index-th seed of the train split, of a range of the size's own."""
    offset = 10**8 * (1 + sum(weight * value for weight, value in zip((7, 3, 1), size, strict=True)))
    return 20 * (offset + index // 18) + index % 18
