"""Latents of world clips and what their tokens show, kept in shards on disk and renewed step by step.

Encoding costs more than a training step on them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import max_pool3d, pad

from vmt_core.precision import autocast
from vmt_core.pretraining.ahead import Ahead, Helpers
from vmt_core.world.judge import KINDS, kind_of
from vmt_core.world.render import masks, render
from vmt_core.world.sample import sample
from vmt_core.world.spec import WORLD_VERSION, Scene

Size = tuple[int, int, int]  # frames, height, width

CLIPS_A_SHARD = 32
FIRST_SHARDS = 8  # there at the first step
MOST_SHARDS = 192  # of a size are kept; older ones go
MOST_GPU_SHARDS = 2048


class LatentPool:
    """Which shards there are at a step follows from the step alone; a shard's clips follow from its number.

    Args:
        vae: on the device where latents are wanted.
        cache: folder of the shards.
        helpers: render clips.
    """

    def __init__(self, vae: Any, cache: Path, helpers: Helpers | None = None) -> None:
        self.vae, self.helpers = vae.eval().requires_grad_(False), helpers or Helpers()
        self.device = next(vae.parameters()).device
        self.most = MOST_SHARDS if self.device.type == "cpu" else MOST_GPU_SHARDS
        self.first = FIRST_SHARDS
        self.cache = cache / _identity(vae)
        self.shards: dict[tuple[Size, int], dict[str, Tensor]] = {}
        self._rendered: dict[Size, Ahead[_Rendered]] = {}

    def draw(
        self, random: Random, step: int, count: int, size: Size, *, renew: int
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Normalised latents (count, 16, F, H, W), what their tokens show (see `seen`) and the seeds of their scenes.

        Args:
            step: since clips of this size are trained on.
            renew: steps after which a shard is added.
        """
        newest = self.first + step // renew
        oldest = max(0, newest - self.most)
        self._forget(size, oldest)
        picked = [(random.randrange(oldest, newest), random.randrange(CLIPS_A_SHARD)) for _ in range(count)]
        # helpers work ahead and in order; alone, a short run makes only what it sees
        for number in range(oldest, newest) if self.helpers.processes else {number for number, _ in picked}:
            if (size, number) not in self.shards:
                self.shards[size, number] = self._shard(size, number)
        rows, kinds, seeds = [], [], []
        for number, place in picked:
            shard = self.shards[size, number]
            rows.append(shard["latents"][place])
            kinds.append(shard["kinds"][place])
            seeds.append(_seed(size, number * CLIPS_A_SHARD + place))
        return torch.stack(rows).float(), torch.stack(kinds), seeds

    def validation(self, size: Size, clips: int) -> tuple[Tensor, list[int]]:
        """The first clips of the validation split, always the same."""
        seeds = [20 * index + 18 for index in range(clips)]
        if (size, -clips) not in self.shards:
            self.shards[size, -clips] = self._encode(_render(size, seeds))
        return self.shards[size, -clips]["latents"].float(), seeds

    def _shard(self, size: Size, number: int) -> dict[str, Tensor]:
        path = self.cache / "x".join(map(str, size)) / f"{number}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            rendered = self._rendered.setdefault(size, Ahead(partial(_render_shard, size, CLIPS_A_SHARD), self.helpers))
            building = path.with_name(f".{path.name}.{os.getpid()}")
            save_file(self._encode(rendered(number)), building)
            building.rename(path)
        return load_file(path, device=str(self.device))

    def _forget(self, size: Size, oldest: int) -> None:
        for shard in [key for key in self.shards if key[0] == size and 0 <= key[1] < oldest]:
            del self.shards[shard]
            with contextlib.suppress(FileNotFoundError):
                (self.cache / "x".join(map(str, size)) / f"{shard[1]}.safetensors").unlink()

    @torch.no_grad()
    def _encode(self, clips: _Rendered) -> dict[str, Tensor]:
        pixels, kinds = clips
        mean, std = (
            torch.tensor(values, device=self.device).view(1, -1, 1, 1, 1)
            for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        rows = []
        at_once = 4 if self.device.type == "cpu" and pixels.shape[1] > 1 else CLIPS_A_SHARD
        for some in pixels.split(at_once):
            values = some.to(self.device).transpose(1, 2).float() / 127.5 - 1
            with autocast(self.device):  # two to four times faster, an error of 1 %
                latents = self.vae.encode(values).latent_dist.mode()
            rows.append(((latents.float() - mean) / std).bfloat16())
        return {"latents": torch.cat(rows).cpu(), "kinds": kinds}


_Rendered = tuple[Tensor, Tensor]  # (clips, T, 3, H, W) uint8, and what their tokens show


def _render_shard(size: Size, clips: int, number: int) -> _Rendered:
    return _render(size, [_seed(size, number * clips + place) for place in range(clips)])


def _render(size: Size, seeds: Sequence[int]) -> _Rendered:
    frames, height, width = size
    scenes = [sample(seed, frames=frames, height=height, width=width) for seed in seeds]
    return torch.stack([render(scene) for scene in scenes]), torch.stack([seen(scene) for scene in scenes])


def seen(scene: Scene) -> Int[Tensor, "f h w"]:
    """Which kind of body (place in `judge.KINDS`, 0 is none) each token of the model shows, int8: 16 by 16 pixels of four frames."""
    small = scene.model_copy(update={"height": scene.height // 4, "width": scene.width // 4})
    kinds = torch.tensor([*(kind_of(body) for body in scene.bodies), 0])
    pixels = kinds[masks(small).int()].float()
    pixels = pad(pixels, (0, 0, 0, 0, 3, 0))  # the first frame is a latent frame of its own
    return max_pool3d(pixels.unsqueeze(0), 4)[0].to(torch.int8)


def _identity(vae: Any) -> str:
    """Of what decides a shard: the world, the encoder and the statistics of its latents, not the decoder."""
    decides = [vae.config.latents_mean, vae.config.latents_std, WORLD_VERSION, CLIPS_A_SHARD, KINDS]
    digest = hashlib.sha256(repr(decides).encode())
    for name, value in vae.state_dict().items():
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(value.float().numpy(force=True).tobytes())
    return digest.hexdigest()[:16]


def _seed(size: Size, index: int) -> int:
    """The index-th seed of the train split, of a range of the size's own."""
    offset = 10**8 * (1 + sum(weight * value for weight, value in zip((7, 3, 1), size, strict=True)))
    return 20 * (offset + index // 18) + index % 18
