"""The one sampling loop: Euler flow matching, batched, fp32 latents, an optional edit of the latents before each step.

Flow matching (Wan 2.1): x_s = (1 - s) z + s eps, velocity v = eps - z, Euler step x += (s_next - s) v. The Euler step keeps
100 % of an edit of x; multistep schedulers with a corrector (UniPC) rebuild x from their history and discard it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vmt_core.shapes import LatentBatch, Latents, TextBatch

Edit = Callable[[int, LatentBatch], LatentBatch]  # (step, latents before the step) -> latents


class Velocity(Protocol):
    """Predicts v for a batch; `timestep` is 1000 * sigma, (B,)."""

    def __call__(self, latents: LatentBatch, timestep: Float[Tensor, " batch"], text: TextBatch) -> LatentBatch: ...


@dataclass(frozen=True)
class Schedule:
    """Noise levels of a run: `sigmas` (steps + 1,) falling to 0, `timesteps` (steps,) = 1000 * sigma; both fp32 on the CPU."""

    sigmas: Float[Tensor, " steps_plus_one"]
    timesteps: Float[Tensor, " steps"]

    @classmethod
    def shifted(cls, steps: int, shift: float, strength: float = 1.0) -> Schedule:
        """Wan's schedule: u from `strength` (0, 1] to 0 in equal steps, sigma = shift u / (1 + (shift - 1) u)."""
        if not 0 < strength <= 1:
            raise ValueError(f"strength={strength} is not in (0, 1]")
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=np.linspace(strength, 0, steps + 1)[:-1])
        return cls(scheduler.sigmas.float().cpu(), scheduler.timesteps.float().cpu())

    @property
    def steps(self) -> int:
        return len(self.timesteps)


def shifted(u: Tensor, shift: Tensor | float) -> Tensor:
    """Noise levels nearer to 1, as Wan has them: shift u / (1 + (shift - 1) u)."""
    return shift * u / (1 + (shift - 1) * u)


def noise(seed: int, shape: torch.Size | tuple[int, ...], *, draws: int = 1) -> list[Latents]:
    """`draws` standard normal latents from a CPU generator of this seed alone: the same on every device, in any batch.

    Raises:
        ValueError: a seed of more than the 32 bits that the generator takes; it would give what a smaller one gives.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed} is not from 0 to {2**32 - 1}")
    generator = torch.Generator("cpu").manual_seed(seed)
    return [torch.randn(tuple(shape), generator=generator, dtype=torch.float32) for _ in range(draws)]


def noised(clean: LatentBatch, eps: LatentBatch, sigma: float) -> LatentBatch:
    """x_s = (1 - s) z + s eps."""
    return (1 - sigma) * clean + sigma * eps


@torch.no_grad()
def sample(
    velocity: Velocity,
    latents: LatentBatch,
    schedule: Schedule,
    text: TextBatch,
    negative: TextBatch,
    *,
    guidance_scale: float,
    cfg: Literal["two_pass", "batched"] = "two_pass",
    edit: Edit | None = None,
) -> LatentBatch:
    """Denoises a batch from `latents` (at sigmas[0]) to sigma 0.

    Args:
        velocity: the denoiser.
        latents: (B, C, F, H, W) fp32.
        text, negative: (B, L, dim); `negative` is not used when guidance_scale <= 1.
        guidance_scale: classifier-free guidance, v = v_neg + scale (v_pos - v_neg); at most 1: off.
        cfg: two forwards of B rows (in fp32 equal, bit for bit, to diffusers' WanPipeline), or one of 2 B.
        edit: what guidance does to the latents before a step.
    """
    for step, timestep in enumerate(schedule.timesteps):
        if edit is not None:
            latents = edit(step, latents)
        t = timestep.to(latents.device).expand(len(latents))
        if guidance_scale <= 1:
            v = velocity(latents, t, text)
        else:
            if cfg == "batched":
                both = velocity(torch.cat([latents, latents]), torch.cat([t, t]), torch.cat([text, negative]))
                positive, unconditional = both.chunk(2)
            else:
                positive, unconditional = velocity(latents, t, text), velocity(latents, t, negative)
            v = unconditional + guidance_scale * (positive - unconditional)
        latents = latents + (schedule.sigmas[step + 1] - schedule.sigmas[step]).to(latents.device) * v
    return latents


def denoiser_calls(schedule: Schedule, guidance_scale: float) -> int:
    """Full forwards that one row needs (a batched pair counts as two)."""
    return schedule.steps * (2 if guidance_scale > 1 else 1)
