"""How a gradient steers the sampling: which steps, how many inner updates, which learning rate. No method code here.

At each of the first ceil(span * steps) denoising steps the latents of every row are optimised by Adam on the objective's loss,
`inner` updates of which every `interval`-th computes a gradient and the others reuse the last one (FastVMT's step-skipping,
arXiv 2602.05551 section 4.2). Latents, gradients and Adam's state are fp32; each row has its own Adam.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny
from torch import Tensor

from vmt_core.motion.amf import FullAMF, WindowedAMF
from vmt_core.shapes import LatentBatch

Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Losses = Callable[[LatentBatch], Float[Tensor, " batch"]]


class Guidance(BaseModel):
    """How an objective's gradient is used."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    objective: SerializeAsAny[WindowedAMF | FullAMF]
    span: float = Field(
        default=0.2, ge=0, le=1, description="share of the denoising steps that are guided, from the first"
    )
    level: Literal["clean", "step"] = Field(
        default="clean", description="the reference's noise: none, or the step's own sigma"
    )
    rule: Literal["adam"] = Field(default="adam", description="how a gradient becomes an update of the latents")
    inner: int = Field(default=10, ge=1, le=1000, description="updates of the latents per guided step")
    interval: int = Field(default=3, ge=1, description="every how many updates the gradient is computed anew")
    learning_rate: tuple[Rate, Rate] = Field(default=(0.003, 0.002), description="from, to")
    decay: Literal["inner", "outer"] = Field(
        default="inner", description="over the inner updates, or over the guided steps"
    )

    def guided_steps(self, steps: int) -> int:
        """How many of `steps` denoising steps are guided."""
        return math.ceil(self.span * steps - 1e-9)  # 0.14 * 50 is a little more than 7

    def learning_rates(self, step: int, steps: int) -> list[float]:
        """Learning rates of the inner updates of a guided step: lr_j = a + (b - a) j / inner, or a + (b - a) i / guided."""
        first, last = self.learning_rate
        if self.decay == "inner":
            return [first + (last - first) * j / self.inner for j in range(self.inner)]
        return [first + (last - first) * step / self.guided_steps(steps)] * self.inner

    def evaluations(self, steps: int) -> int:
        """Gradients computed in a run: guided steps x ceil(inner / interval)."""
        return self.guided_steps(steps) * math.ceil(self.inner / self.interval)


@dataclass
class GuidanceLog:
    """What guidance did to one row."""

    evaluations: int = 0
    skipped: int = 0
    losses: list[float] = field(default_factory=list)


def optimise(
    latents: LatentBatch,
    losses: Losses,
    learning_rates: Sequence[float],
    interval: int,
    logs: Sequence[GuidanceLog],
) -> LatentBatch:
    """The inner updates of one guided step.

    Args:
        latents: (B, C, F, H, W) fp32.
        losses: the rows' losses (B,) at given latents, each depending on its own row only.
        learning_rates: one per update.
        interval: every how many updates the gradient is computed anew; between, the last one is used as it is.
        logs: one per row, added to.

    Returns:
        the edited latents, detached. A row whose gradient is not finite is left as it is until its next gradient.
    """
    rows = [row.detach().clone().requires_grad_() for row in latents]
    adam = torch.optim.Adam(rows, lr=learning_rates[0], weight_decay=0)
    for update, learning_rate in enumerate(learning_rates):
        if update % interval == 0:
            with torch.enable_grad():
                loss = losses(torch.stack(rows))
                gradients = torch.autograd.grad(loss.sum(), rows)
            for row, gradient, value, log in zip(rows, gradients, loss.tolist(), logs, strict=True):
                finite = math.isfinite(value) and bool(gradient.isfinite().all())
                row.grad = gradient if finite else None
                log.evaluations += 1
                log.skipped += not finite
                log.losses.append(value)
        for group in adam.param_groups:
            group["lr"] = learning_rate
        adam.step()
    return torch.stack([row.detach() for row in rows])
