"""Latents of world clips, kept in shards on disk and renewed step by step: encoding costs more than a training step on them."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vmt_core.world.render import render
from vmt_core.world.sample import sample

Size = tuple[int, int, int]  # frames, height, width

CLIPS_A_SHARD = 32
FIRST_SHARDS = 8  # there at the first step
MOST_SHARDS = 192  # kept; older ones go


class LatentPool:
    """Which shards there are at a step follows from the step alone; a shard's clips follow from its number."""

    def __init__(self, vae: Any, cache: Path) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.cache = cache / _identity(vae)
        self.shards: dict[tuple[Size, int], Tensor] = {}

    def draw(self, random: Random, step: int, count: int, size: Size, *, renew: int) -> tuple[Tensor, list[int]]:
        """Normalised latents (count, 16, F, H, W) and the seeds of their scenes.

        Args:
            step: since clips of this size are trained on.
            renew: steps after which a shard is added.
        """
        newest = FIRST_SHARDS + step // renew
        oldest = max(0, newest - MOST_SHARDS)
        self._forget(size, oldest)
        rows, seeds = [], []
        for _ in range(count):
            shard, place = random.randrange(oldest, newest), random.randrange(CLIPS_A_SHARD)
            rows.append(self._shard(size, shard)[place])
            seeds.append(_seed(size, shard * CLIPS_A_SHARD + place))
        return torch.stack(rows).float(), seeds

    def validation(self, size: Size, clips: int) -> tuple[Tensor, list[int]]:
        """The first clips of the validation split, always the same."""
        seeds = [20 * index + 18 for index in range(clips)]
        if (size, -clips) not in self.shards:
            self.shards[size, -clips] = self._encode(size, seeds)
        return self.shards[size, -clips].float(), seeds

    def _shard(self, size: Size, number: int) -> Tensor:
        if (size, number) not in self.shards:
            path = self.cache / "x".join(map(str, size)) / f"{number}.safetensors"
            if not path.exists():
                seeds = [_seed(size, number * CLIPS_A_SHARD + place) for place in range(CLIPS_A_SHARD)]
                path.parent.mkdir(parents=True, exist_ok=True)
                building = path.with_name(f".{path.name}.{os.getpid()}")
                save_file({"latents": self._encode(size, seeds)}, building)
                building.rename(path)
            self.shards[size, number] = load_file(path)["latents"]
        return self.shards[size, number]

    def _forget(self, size: Size, oldest: int) -> None:
        for shard in [key for key in self.shards if key[0] == size and 0 <= key[1] < oldest]:
            del self.shards[shard]
            with contextlib.suppress(FileNotFoundError):
                (self.cache / "x".join(map(str, size)) / f"{shard[1]}.safetensors").unlink()

    @torch.no_grad()
    def _encode(self, size: Size, seeds: list[int]) -> Tensor:
        frames, height, width = size
        device = next(self.vae.parameters()).device
        mean, std = (
            torch.tensor(values, device=device).view(1, -1, 1, 1, 1)
            for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        rows = []
        at_once = 4 if frames > 1 else CLIPS_A_SHARD
        for start in range(0, len(seeds), at_once):
            clips = [
                render(sample(seed, frames=frames, height=height, width=width))
                for seed in seeds[start : start + at_once]
            ]
            pixels = torch.stack(clips).to(device).transpose(1, 2).float() / 127.5 - 1
            with torch.autocast(device.type, torch.bfloat16):  # two to four times faster, an error of 1 %
                latents = self.vae.encode(pixels).latent_dist.mode()
            rows.append(((latents.float() - mean) / std).to("cpu", torch.bfloat16))
        return torch.cat(rows)


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
