"""The engine of `vmt_core.tuning` on DeepSpeed: ZeRO 0 to 3, optimizer in CPU memory, bf16 with fp32 masters, any number of workers.

Its state is that of `TorchEngine` (every trained weight and its moments, whole, fp32), gathered and scattered here: a checkpoint fits any
number of workers and any ZeRO stage, and is safetensors, not DeepSpeed's pickles.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from schemas import DeepSpeedSettings
from vmt_core.tuning import MOMENTS, Batch, StageSchedule, StepLogs, to


class DeepSpeedEngine:
    """Runs a task's module; what requires a gradient is trained by AdamW.

    Args:
        workers: processes of the default process group, which must be there.
    """

    def __init__(
        self,
        module: nn.Module,
        schedule: StageSchedule,
        settings: DeepSpeedSettings,
        *,
        workers: int,
        device: torch.device,
    ) -> None:
        bf16 = in_bf16(settings, device)
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.type == "cuda" else "cpu")
        import deepspeed
        from deepspeed import utils

        warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*deprecated")
        self.utils, self.device = utils, device
        self.trained = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self.adamw = torch.optim.AdamW(
            self.trained.values(), lr=schedule.learning_rate, betas=schedule.betas, weight_decay=schedule.weight_decay
        )
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=module,
            optimizer=self.adamw,
            model_parameters=list(self.trained.values()),
            dist_init_required=False,
            config=configuration(schedule, settings, workers, bf16),
        )
        for moments in self.adamw.state.values():  # ZeRO 3 makes its moments by a step of its own
            moments["step"].zero_()
        self.has_moments = False
        self.masters = (
            stage(settings, bf16) > 0
        )  # weights and moments are the optimizer's own, parted among the workers
        self.gathered = deepspeed.zero.GatheredParameters

    def accumulate(self, batch: Batch) -> tuple[float, StepLogs]:
        """Forward and backward of one draw; the last of a step makes the update due."""
        loss, logs = self.engine(*to(batch, self.device))
        self.engine.backward(loss)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()
        return loss.item(), logs

    def update(self, learning_rate: float) -> float:
        """The update; returns the gradient's norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        gradients = [weight.grad for weight in self.trained.values() if weight.grad is not None]
        plain = nn.utils.get_total_norm(gradients) if gradients else None  # of what ZeRO does not keep elsewhere
        self.engine.step()
        self.has_moments = True
        norm = self.engine.get_global_grad_norm()
        return float(plain if norm is None else norm)

    def state(self) -> dict[str, Tensor]:
        """As `TorchEngine.state`; every worker must call it, and has all of it."""
        found = {}
        for name, weight in self.trained.items():
            found[f"{name}.weight"] = self._whole(weight, "weight")
            if self.has_moments:
                found |= {f"{name}.{key}": self._whole(weight, key) for key in MOMENTS}
        return {name: value.detach().float().cpu().clone() for name, value in found.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """As `TorchEngine.restore`; every worker must call it with all of the state."""
        for name, weight in self.trained.items():
            self._set(weight, "weight", state[f"{name}.weight"])
        if state["step"] == 0:
            return
        self._make_moments()
        for name, weight in self.trained.items():
            for key in MOMENTS:
                self._set(weight, key, state[f"{name}.{key}"])
        for moments in self.adamw.state.values():
            moments["step"] = state["step"].float().clone()
        self.has_moments = True

    def _make_moments(self) -> None:
        """Lets AdamW make its moments, which it does at its first step: one of length zero. ZeRO 3 hands it its weights at steps only."""
        for part in getattr(self.optimizer, "fp32_partitioned_groups_flat", ()):
            self.adamw.state[part] = {"step": torch.zeros(()), **{key: torch.zeros_like(part) for key in MOMENTS}}
        parts = [part for group in self.adamw.param_groups for part in group["params"]]
        kept = [part.grad for part in parts]  # with offload DeepSpeed's own, into which it writes gradients ever after
        for group in self.adamw.param_groups:
            group["lr"] = 0.0
        for part in parts:
            part.grad = torch.zeros_like(part)
        self.adamw.step()
        for part, gradient in zip(parts, kept, strict=True):
            part.grad = gradient
        if hasattr(self.optimizer, "_lazy_init_hp_params_optimizer_state"):
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _whole(self, weight: Tensor, key: str) -> Tensor:
        """A weight (the fp32 master where there is one) or a moment of it, gathered from all workers."""
        found: Tensor | None
        if not self.masters:
            found = weight if key == "weight" else self.adamw.state[weight][key]
        elif key == "weight":
            found = self.utils.safe_get_full_fp32_param(weight)
        else:
            found = self.utils.safe_get_full_optimizer_state(weight, key)
        if found is None:  # how DeepSpeed says that it does not know it
            raise RuntimeError(f"DeepSpeed ({type(self.optimizer).__name__}) gives no {key} of a trained weight")
        return found

    def _set(self, weight: Any, key: str, value: Tensor) -> None:
        value = value.to(self.device)
        if not self.masters:
            (weight.data if key == "weight" else self.adamw.state[weight][key]).copy_(value)
        elif key == "weight":
            self.utils.safe_set_full_fp32_param(weight, value)
            with self.gathered([weight], modifier_rank=0):  # what the forward pass sees
                weight.data.copy_(value)
        else:
            self.utils.safe_set_full_optimizer_state(weight, value, key)


def in_bf16(settings: DeepSpeedSettings, device: torch.device) -> bool:
    """Whether the model is trained in bf16: as it is set, else on GPUs."""
    return device.type == "cuda" if settings.bf16 is None else settings.bf16


def stage(settings: DeepSpeedSettings, bf16: bool) -> int:
    """Of ZeRO: at least 1 where there are fp32 masters or an optimizer elsewhere; without ZeRO DeepSpeed keeps masters to itself."""
    return settings.zero or int(bf16 or settings.offload)


def configuration(schedule: StageSchedule, settings: DeepSpeedSettings, workers: int, bf16: bool) -> dict[str, Any]:
    """DeepSpeed's own configuration."""
    zero: dict[str, Any] = {"stage": stage(settings, bf16)}
    if settings.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if settings.zero == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": schedule.draws // workers,
        "gradient_clipping": schedule.clip,
        "zero_optimization": zero,
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its own AdamW for the CPU would have to be compiled
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
