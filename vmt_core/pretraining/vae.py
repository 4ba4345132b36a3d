"""First stage: an AutoencoderKLWan with Wan's compression, on crops of the procedural world."""

from __future__ import annotations

from functools import partial
from random import Random
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample
from torch import Tensor, nn

from vmt_core.precision import autocast
from vmt_core.pretraining.ahead import Ahead, Helpers
from vmt_core.pretraining.loop import Logs, Phase, StepLogs, phase_at
from vmt_core.world.render import centres, render
from vmt_core.world.sample import sample

CONFIG: dict[str, Any] = {
    "base_dim": 32,
    "z_dim": 16,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 8,
    "scale_factor_temporal": 4,
}
#: Clips from the start stall, and the causal decoder does not extrapolate in time: single frames first, then every length on offer.
PHASES = (
    Phase(1300, ((24, 1, 64, 64),), 1e-3, decay_to=0.5),
    Phase(1300, (*((6, 9, 64, 64),) * 5, (24, 1, 64, 64)), 1e-3, warmup=50, decay_to=0.8),
    Phase(
        600, ((4, 17, 64, 64), (6, 9, 64, 64), (6, 9, 64, 64), (2, 33, 64, 64), (24, 1, 64, 64)), 7e-4, decay_to=0.05
    ),
)

#: Of an autoencoder that has seen the others, on a GPU, which a few small crops would leave idle.
GPU_MORE_PHASES = (
    Phase(
        2000,
        (*((16, 17, 96, 96),) * 3, (24, 9, 96, 96), (8, 33, 96, 96), (96, 1, 96, 96)),
        1e-3,
        warmup=100,
        decay_to=0.1,
    ),
)

#: Of the decoder alone, for the latents of an encoder that is done.
DECODER_PHASES = (Phase(4000, PHASES[-1].clips, 6e-4, decay_to=0.01),)
#: The same on a GPU.
GPU_DECODER_PHASES = (Phase(1000, GPU_MORE_PHASES[-1].clips, 6e-4, warmup=50, decay_to=0.01),)


class VaeLoss(nn.Module):
    """Reconstruction of pixels in [-1, 1]: L1 + L2, and a little KL that keeps the latents near unit variance.

    Places where anything moves count more: single frames have taught the rest.
    """

    def __init__(
        self, vae: AutoencoderKLWan, *, decoder_only: bool = False, kl_weight: float = 2e-4, moving_weight: float = 4.0
    ) -> None:
        super().__init__()
        self.vae, self.decoder_only = vae, decoder_only
        self.kl_weight, self.moving_weight = kl_weight, moving_weight
        if decoder_only:
            for part in (vae.encoder, vae.quant_conv):
                part.requires_grad_(False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, StepLogs]:
        """(B, 3, T, H, W) in [-1, 1]."""
        with autocast(pixels.device):
            with torch.set_grad_enabled(not self.decoder_only):
                posterior = self.vae.encode(pixels).latent_dist
            decoded = self.vae.decode(posterior.sample()).sample.float()
        error = decoded - pixels
        moving = (pixels.amax(2, keepdim=True) - pixels.amin(2, keepdim=True)).amax(1, keepdim=True) > 0.1
        weight = 1 + self.moving_weight * moving
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        squared = error.square().mean()
        loss = (weight * (error.abs() + error.square())).mean() / weight.mean() + self.kl_weight * kl
        return loss, {"psnr": psnr(squared.detach()), "kl": kl.detach()}


class VaeStage:
    """Trains an autoencoder on crops of scenes of the train split."""

    name = "vae"
    ema_decay = 0.998
    validation_clips = 8

    def __init__(self, seed: int = 0, phases: tuple[Phase, ...] = PHASES, helpers: Helpers | None = None) -> None:
        self.seed, self.phases, self.helpers = seed, phases, helpers or Helpers()
        self._crops: Ahead[Tensor] | None = None
        torch.manual_seed(seed)
        vae = AutoencoderKLWan(**CONFIG)
        look_at_one_frame(vae)
        self.module = VaeLoss(vae)

    def start_from(self, vae: AutoencoderKLWan) -> None:
        """Takes the weights of an autoencoder and trains on: by the last of PHASES, or GPU_MORE_PHASES where it is on a GPU."""
        self.module = VaeLoss(vae)
        self.phases = PHASES[-1:] if next(vae.parameters()).device.type == "cpu" else GPU_MORE_PHASES

    def optimizers(self) -> list[torch.optim.Optimizer]:
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        return [torch.optim.AdamW(trained, lr=1.0, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)]

    def batch(self, step: int, rank: int) -> tuple[Tensor, ...]:
        torch.manual_seed(Random(f"noise {self.seed} {step} {rank}").getrandbits(63))  # of the posterior
        self._crops = self._crops or Ahead(partial(crops, self.seed, rank, self.phases), self.helpers)
        return (self._crops(step),)

    def validate(self, module: nn.Module) -> Logs:
        """PSNR of whole held-out clips, fp32, and how much the decoding of a still clip flickers (of 255)."""
        vae: Any = module.vae
        device = next(vae.parameters()).device
        logs: Logs = {}
        for frames in (1, 9, 17):
            clips = torch.stack(
                [
                    pixels(render(sample(20 * index + 18, height=96, width=96, frames=frames)))
                    for index in range(self.validation_clips)
                ]
            ).to(device)
            decoded = vae.decode(vae.encode(clips).latent_dist.mode()).sample.clamp(-1, 1)
            logs[f"psnr_{frames}"] = sum(
                psnr((a - b).square().mean()).item() for a, b in zip(decoded, clips, strict=True)
            ) / len(clips)
        still = clips[:, :, :1].expand_as(clips)
        decoded = vae.decode(vae.encode(still).latent_dist.mode()).sample.clamp(-1, 1)
        logs["flicker"] = (decoded.diff(dim=2).abs().mean() * 127.5).item()
        return logs


class DecoderStage(VaeStage):
    """Trains the decoder on, for latents that stay what they are: a transformer that was trained on them goes on to fit."""

    name = "decoder"

    def __init__(
        self,
        vae: AutoencoderKLWan,
        seed: int = 0,
        phases: tuple[Phase, ...] | None = None,
        helpers: Helpers | None = None,
    ) -> None:
        on_cpu = next(vae.parameters()).device.type == "cpu"
        super().__init__(seed, phases or (DECODER_PHASES if on_cpu else GPU_DECODER_PHASES), helpers)
        self.module = VaeLoss(vae, decoder_only=True)


def look_at_one_frame(vae: AutoencoderKLWan) -> None:
    """Starts the causal convolutions with their last frame alone, and the changes of rate as taking and repeating frames.

    What single frames teach then holds for clips from their first step on. Without it clips start from scratch.
    """
    with torch.no_grad():
        for layer in vae.modules():
            if isinstance(layer, WanCausalConv3d):
                layer.weight[:, :, :-1] = 0
            if isinstance(layer, WanResample) and layer.mode in ("upsample3d", "downsample3d"):
                out, into = layer.time_conv.weight.shape[:2]
                layer.time_conv.weight.zero_()
                layer.time_conv.weight[:, :, -1, 0, 0] = torch.eye(into).repeat(out // into, 1)
                layer.time_conv.bias.zero_()


def crops(seed: int, rank: int, phases: tuple[Phase, ...], step: int) -> Tensor:
    """The clips of a step, (count, 3, frames, height, width) in [-1, 1]."""
    random = Random(f"vae {seed} {step} {rank}")
    count, frames, height, width = random.choice(phase_at(phases, step)[0].clips)
    return torch.stack([crop(random, frames, height, width) for _ in range(count)])


def crop(random: Random, frames: int, height: int, width: int) -> Tensor:
    """A clip of (3, frames, height, width), often near a body; one in eight stands still."""
    side = random.choice((128, 160, 192, 192, 224))
    scene = sample(20 * random.randrange(10**7) + random.randrange(18), frames=frames, height=side, width=side)
    if random.random() < 0.7:
        x, y = (int(value) for value in centres(scene)[random.randrange(frames), 0].tolist())
        left, top = x - width // 2 + random.randint(-40, 40), y - height // 2 + random.randint(-40, 40)
    else:
        left, top = random.randrange(side), random.randrange(side)
    left, top = (min(max(first, 0), side - length) for first, length in ((left, width), (top, height)))
    clip = pixels(render(scene, (top, left, top + height, left + width)))
    if random.random() < 0.125:
        clip = clip[:, :1].expand_as(clip)
    return clip


def pixels(frames: Tensor) -> Tensor:
    """(T, 3, H, W) uint8 to (3, T, H, W) in [-1, 1]."""
    return frames.transpose(0, 1).float() / 127.5 - 1


def psnr(squared: Tensor) -> Tensor:
    """Of a mean squared error of values in [-1, 1], dB."""
    return 10 * torch.log10(4 / squared.clamp(min=1e-10))
