"""From trained parts to a model folder in diffusers layout, bf16, that a plain `WanPipeline.from_pretrained` loads."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from torch import Tensor, nn

from vmt_core.presets import NANO
from vmt_core.pretraining.dit import DitLoss
from vmt_core.pretraining.text import tokenizer
from vmt_core.pretraining.vae import VaeLoss, pixels
from vmt_core.world.render import render
from vmt_core.world.sample import sample


def save_vae(module: nn.Module, folder: Path, clips: int = 48) -> None:
    """Writes the autoencoder in fp32, with the statistics of its latents, over some clips, in the configuration."""
    assert isinstance(module, VaeLoss)
    vae = module.vae.eval()
    if not module.decoder_only:  # else they are what they were
        mean, std = latent_statistics(vae, clips)
        vae.register_to_config(latents_mean=mean, latents_std=std)
    vae.register_to_config(_name_or_path="")  # else the folder that it was read from
    vae.save_pretrained(folder)


def save_pipeline(module: nn.Module, vae: AutoencoderKLWan, folder: Path) -> None:
    """Writes the whole model in bf16; what is passed stays as it is."""
    assert isinstance(module, DitLoss)
    vae, transformer = deepcopy(vae), deepcopy(module.transformer)
    for part in (vae, transformer):
        part.register_to_config(_name_or_path="")  # else the folder that it was read from
    WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=deepcopy(module.text),
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=NANO.shift),
    ).to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)


@torch.no_grad()
def latent_statistics(vae: AutoencoderKLWan, clips: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel, over clips of the train split."""
    device = next(vae.parameters()).device
    latents: list[Tensor] = []
    for index in range(clips):
        clip = pixels(render(sample(20 * index, height=128, width=128))).unsqueeze(0).to(device)
        latents.append(vae.encode(clip).latent_dist.mode()[0].flatten(1))
    values = torch.cat(latents, 1)
    return values.mean(1).tolist(), values.std(1).tolist()
