"""Second stage: a WanTransformer3DModel and its text encoder, by flow matching on latents of the procedural world."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, max_pool2d
from transformers import UMT5Config, UMT5EncoderModel

from vmt_core.backbone.sampler import shifted
from vmt_core.precision import autocast
from vmt_core.pretraining.ahead import Helpers
from vmt_core.pretraining.loop import Logs, Phase, StepLogs, phase_at
from vmt_core.pretraining.muon import Muon
from vmt_core.pretraining.pool import LatentPool, Size
from vmt_core.pretraining.text import TEXT_CONFIG, tokenizer
from vmt_core.world.captions import appearance
from vmt_core.world.judge import KINDS
from vmt_core.world.sample import sample

CONFIG: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 48,
    "text_dim": TEXT_CONFIG["d_model"],
    "freq_dim": 64,
    "ffn_dim": 768,
    "num_layers": 8,
}
#: Words are learnt from single frames, five times as many scenes for the same work; motion from small clips; then other shapes and longer
#: clips; last and longest the native size, with as many single frames, from which outlines are learnt.
PHASES = (
    Phase(1200, ((64, 1, 128, 128), (64, 1, 128, 128), (28, 1, 192, 192)), 1.0, warmup=100, decay_to=0.8, renew=24),
    Phase(1000, (*((16, 17, 128, 128),) * 5, (28, 1, 192, 192)), 0.9, warmup=50, decay_to=0.5, renew=20),
    Phase(314, (*((8, 17, 192, 192),) * 5, (8, 17, 160, 224), (8, 17, 224, 160), (4, 33, 192, 192)), 0.5, renew=40),
    Phase(2500, ((8, 17, 192, 192), (28, 1, 192, 192)), 0.8, warmup=100, decay_to=0.03, renew=60),
)
#: Of a model that has seen the others.
MORE_PHASES = (
    Phase(1600, ((28, 1, 192, 192), *((8, 17, 192, 192),) * 3), 0.6, warmup=60, decay_to=0.02, renew=80, before=2720),
)
#: The same on a GPU: seven minutes of an H100, with sixteen times as many clips in a step.
GPU_MORE_PHASES = (
    Phase(
        3000,
        (
            *((128, 17, 192, 192),) * 5,
            *((64, 33, 192, 192),) * 2,
            (128, 17, 160, 224),
            (128, 17, 224, 160),
            *((256, 1, 192, 192),) * 2,
        ),
        1.0,
        warmup=100,
        decay_to=0.01,
        renew=24,
        before=640,
    ),
)
#: Of the noise levels, one drawn for each clip. Whether a clip hangs together is decided above 0.9, where shift 12 has three fifths of its
#: levels and shift 3 an eighth; at 1 edges are learnt.
SHIFTS = (1.0, 3.0, 12.0, 12.0, 12.0)
VALIDATION_SHIFT = 3.0
CHEAPER = 8  # times as often do new single frames join, which cost so much less than clips
EMPTY_CAPTIONS = 0.1
LONG_CAPTIONS = 1 / 16  # of the steps of clips are padded as in Wan, so that padding is learnt to mean nothing
SHORT_LENGTH, WAN_LENGTH = 24, 512
BODIES = 4.0  # weight of errors at tokens next to a body, at noise levels at which its place can be known
PLACED = 0.9
NAMING = 0.1  # weight of the cross-entropy of the kinds named
NAMED_BLOCK = 4
ADAMW_RATE, MUON_RATE = 1.2e-3, 2e-3


class DitLoss(nn.Module):
    """Flow matching: mean squared error of the velocity, noise - latents.

    Two things make it see shapes, which are a small part of that error: errors near bodies count more, and a head that is not shipped
    names the kind of body at each token from features of the middle (as in REPA, arXiv 2410.06940, with the world's truth as teacher).
    """

    def __init__(self) -> None:
        super().__init__()
        self.transformer = WanTransformer3DModel(**CONFIG)
        self.text = UMT5EncoderModel(UMT5Config(**TEXT_CONFIG))
        self.namer = nn.Linear(self.transformer.proj_out.in_features, len(KINDS))

    def forward(
        self, latents: Tensor, noise: Tensor, sigma: Tensor, ids: Tensor, mask: Tensor, kinds: Tensor
    ) -> tuple[Tensor, StepLogs]:
        """latents, noise (B, 16, F, H, W); sigma (B,) in (0, 1); ids, mask (B, tokens); kinds (B, F, H/2, W/2), see `pool.seen`."""
        features: list[Tensor] = []
        middle = self.transformer.blocks[NAMED_BLOCK]
        with middle.register_forward_hook(lambda _, __, output: features.append(output)):
            squared = self.errors(latents, noise, sigma, ids, mask)
        near = max_pool2d((kinds > 0).float(), 3, stride=1, padding=1)
        weight = 1 + (BODIES - 1) * near * (sigma < PLACED).view(-1, 1, 1, 1)
        loss = (weight * squared).sum() / weight.sum()
        naming = cross_entropy(self.namer(features[0].float()).mT, kinds.flatten(1).long())
        clean = sigma < PLACED
        of_clean = (squared.detach().flatten(1).mean(1) * clean).sum() / clean.sum().clamp(min=1)
        logs = {"velocity": squared.detach().mean(), "loss_clean": of_clean, "naming": naming.detach()}
        return loss + NAMING * naming, logs

    def errors(self, latents: Tensor, noise: Tensor, sigma: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error of each token, (B, F, H/2, W/2)."""
        s = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - s) * latents + s * noise
        with autocast(latents.device):
            text = self.text(ids, mask).last_hidden_state * mask.unsqueeze(-1)  # zeros where Wan has zeros
            velocity = self.transformer(noisy, 1000 * sigma, text, return_dict=False)[0]
        error: Tensor = velocity.float() - (noise - latents)
        return avg_pool2d(error.square().mean(1), 2)


class DitStage:
    """Trains on latents that a frozen autoencoder gives, kept in a pool that is renewed as training goes on.

    Args:
        vae: with `latents_mean` and `latents_std` of the world in its config (see `latent_statistics`).
        cache: folder of the pool's latents; may be deleted, they are made again.
        helpers: render the pool's clips.
    """

    name = "dit"
    ema_decay = 0.999
    validation_clips = 32

    def __init__(
        self,
        vae: AutoencoderKLWan,
        cache: Path,
        seed: int = 0,
        phases: tuple[Phase, ...] = PHASES,
        helpers: Helpers | None = None,
    ) -> None:
        self.device = next(vae.parameters()).device
        self.seed, self.phases = seed, phases
        torch.manual_seed(seed)
        self.module = DitLoss()
        self.tokenizer = tokenizer()
        self.pool = LatentPool(vae, cache, helpers)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for the matrices of the blocks, AdamW for all else."""
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in self.module.named_parameters():
            inside = name.startswith("transformer.blocks.") and parameter.ndim == 2
            (matrices if inside else rest).append(parameter)
        return [
            Muon(matrices, lr=MUON_RATE, weight_decay=0.01),
            torch.optim.AdamW(rest, lr=ADAMW_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
        ]

    def start_from(self, model: Path) -> None:
        """Takes the weights of a model in diffusers layout and trains on by `MORE_PHASES`."""
        safe: dict[str, Any] = {"use_safetensors": True, "dtype": torch.float32}
        self.module.transformer = WanTransformer3DModel.from_pretrained(model, subfolder="transformer", **safe)
        self.module.text = UMT5EncoderModel.from_pretrained(model, subfolder="text_encoder", **safe)
        self.phases = GPU_MORE_PHASES if self.device.type == "cuda" else MORE_PHASES

    def compile(self) -> None:
        """A third faster on a CPU, where each size of batch is compiled once; on a GPU that would take a minute of the ten."""
        dynamic = False if self.device.type == "cpu" else None
        torch._dynamo.config.recompile_limit = 64
        for block in self.module.transformer.blocks:
            block.forward = torch.compile(block.forward, dynamic=dynamic)  # hooks stay outside

    def batch(self, step: int, rank: int) -> tuple[Tensor, ...]:
        random = Random(f"dit {self.seed} {step} {rank}")
        generator = torch.Generator(self.device).manual_seed(random.getrandbits(63))
        phase, within = phase_at(self.phases, step)
        count, frames, height, width = random.choice(phase.clips)
        size = (frames, height, width)
        renew = phase.renew if frames > 1 else max(1, phase.renew // CHEAPER)
        latents, kinds, seeds = self.pool.draw(random, phase.before + within, count, size, renew=renew)
        shift = torch.tensor([random.choice(SHIFTS) for _ in range(count)], device=self.device)
        sigma = shifted(self._noise((count,), generator).sigmoid(), shift)
        length = WAN_LENGTH if frames > 1 and random.random() < LONG_CAPTIONS else SHORT_LENGTH
        captions = ["" if random.random() < EMPTY_CAPTIONS else self._caption(seed, size, random) for seed in seeds]
        return latents, self._noise(latents.shape, generator), sigma, *self.tokens(captions, length), kinds

    def _noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator, device=self.device)

    def tokens(self, captions: list[str], length: int) -> tuple[Tensor, Tensor]:
        """Ids and mask, (B, length) each."""
        batch = self.tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return batch.input_ids, batch.attention_mask

    def validate(self, module: nn.Module) -> Logs:
        """Loss on held-out clips at fixed noise, with their captions, and how much worse it is with those of others."""
        assert isinstance(module, DitLoss)
        device = next(module.parameters()).device
        sizes = [clip[1:] for clip in self.phases[-1].clips]
        size = max(sizes, key=lambda size: (size[0] > 1, sizes.count(size)))  # of clips, the most frequent
        latents, seeds = self.pool.validation(size, self.validation_clips)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        sigma = shifted(torch.linspace(0.05, 0.95, len(latents)), VALIDATION_SHIFT)
        captions = [self._caption(seed, size) for seed in seeds]
        batches = [self.tokens(words, SHORT_LENGTH) for words in (captions, captions[1:] + captions[:1])]
        right, wrong = (
            module.errors(latents.to(device), noise.to(device), sigma.to(device), ids.to(device), mask.to(device))
            .mean()
            .item()
            for ids, mask in batches
        )
        return {"loss": right, "loss_wrong_captions": wrong}

    @staticmethod
    def _caption(seed: int, size: Size, variety: Random | None = None) -> str:
        scene = sample(seed, frames=size[0], height=size[1], width=size[2])
        return appearance(scene, variety if variety is not None and variety.random() < 0.5 else None)
