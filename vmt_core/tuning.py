"""How an adapter is trained: steps, learning rate, accumulation, validation, stopping early, checkpoints that continue exactly.

Who computes is an `Engine`: plain torch here, DeepSpeed in `pipelines`. What a step sees follows from its number alone, so a resumed run is
the run that was never stopped, and so are more workers that accumulate less; on GPUs but for rounding, since attention varies there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Logs = dict[str, float]
StepLogs = dict[str, Tensor]  # beside the loss, of one draw
Batch = tuple[Any, ...]
Beta = Annotated[float, Field(ge=0, lt=1)]


class StageSchedule(BaseModel):
    """How long and how fast a stage is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    steps: int = Field(ge=1)
    learning_rate: float = Field(default=1e-4, gt=0)
    warmup: int = Field(default=50, ge=0, description="steps of linear warm-up; constant afterwards")
    weight_decay: float = Field(default=0.1, ge=0, description="decoupled")
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    clip: float = Field(default=1.0, gt=0, description="norm of the gradient")
    draws: int = Field(default=1, ge=1, description="micro-batches of a step, over all workers")
    validate_every: int = Field(default=50, ge=1, description="steps")
    patience: int = Field(default=0, ge=0, description="validations without a better loss before it stops; 0: never")

    @property
    def validations(self) -> int:
        """How many there are: every `validate_every` steps, and at the end."""
        return -(-self.steps // self.validate_every)

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup))


class Task(Protocol):
    """One stage of tuning. `module(*batch)` gives the loss and what to log."""

    name: str
    schedule: StageSchedule
    module: nn.Module

    def batch(self, draw: int) -> Batch: ...
    def validate(self) -> float: ...


class Engine(Protocol):
    """Runs forward, backward and update; the only thing that differs between one process and a cluster."""

    def accumulate(self, batch: Batch) -> tuple[float, StepLogs]: ...
    def update(self, learning_rate: float) -> float: ...
    def state(self) -> dict[str, Tensor]: ...
    def restore(self, state: dict[str, Tensor]) -> None: ...


class Point(NamedTuple):
    """Of a loss curve."""

    step: int
    loss: float
    validation: float | None = None


class TorchEngine:
    """AdamW in one process."""

    def __init__(self, module: nn.Module, schedule: StageSchedule, device: torch.device) -> None:
        self.module, self.device, self.clip, self.draws = module, device, schedule.clip, schedule.draws
        self.trained = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=schedule.learning_rate, betas=schedule.betas, weight_decay=schedule.weight_decay
        )

    def accumulate(self, batch: Batch) -> tuple[float, StepLogs]:
        loss, logs = self.module(*to(batch, self.device))
        (loss / self.draws).backward()
        return loss.item(), logs

    def update(self, learning_rate: float) -> float:
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.item()

    def state(self) -> dict[str, Tensor]:
        """Weights and moments of every trained parameter, fp32 on the CPU."""
        found = {}
        for name, weight in self.trained.items():
            moments = self.optimizer.state.get(weight, {})
            found[f"{name}.weight"] = weight.detach()
            found |= {f"{name}.{key}": moments[key] for key in MOMENTS if key in moments}
        return {name: value.float().cpu().clone() for name, value in found.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        step = state["step"]
        for name, weight in self.trained.items():
            weight.data.copy_(state[f"{name}.weight"])
            if step > 0:
                moments = {key: state[f"{name}.{key}"].to(weight.device) for key in MOMENTS}
                self.optimizer.state[weight] = {"step": step.float().clone(), **moments}


MOMENTS = ("exp_avg", "exp_avg_sq")


class Tuning:
    """A task on its way: what has been done, and how it went.

    Args:
        rank, workers: draw d of a step belongs to worker d mod workers.
        mean: makes a number the mean over all workers.
    """

    def __init__(
        self,
        task: Task,
        engine: Engine,
        *,
        rank: int = 0,
        workers: int = 1,
        mean: Callable[[float], float] = lambda value: value,
    ) -> None:
        if task.schedule.draws % workers:
            raise ValueError(f"{task.schedule.draws} draws a step cannot be shared evenly by {workers} workers")
        self.task, self.engine, self.rank, self.workers, self.mean = task, engine, rank, workers, mean
        self.step = 0
        self.curve: list[Point] = []
        self.stopped_early = False
        task.module.train()

    @property
    def done(self) -> bool:
        return self.stopped_early or self.step >= self.task.schedule.steps

    def advance(self) -> Logs:
        """One step.

        Raises:
            FloatingPointError: the gradient is not finite.
        """
        began, schedule = time.perf_counter(), self.task.schedule
        losses: list[float] = []
        parts: list[StepLogs] = []
        for draw in range(self.rank, schedule.draws, self.workers):
            loss, logs = self.engine.accumulate(self.task.batch(self.step * schedule.draws + draw))
            losses.append(loss)
            parts.append(logs)
        norm = self.engine.update(schedule.rate(self.step))
        if not norm < float("inf"):
            raise FloatingPointError(f"{self.task.name}: the gradient at step {self.step} is not finite")
        self.step += 1
        loss = self.mean(sum(losses) / len(losses))
        point = Point(self.step, loss)
        if self.step % schedule.validate_every == 0 or self.step == schedule.steps:
            self.task.module.eval()
            point = Point(self.step, loss, self.mean(self.task.validate()))
            self.task.module.train()
        self.curve.append(point)
        self.stopped_early = self._plateau()
        return {
            "step": self.step,
            "loss": loss,
            **{name: self.mean(sum(float(logs[name]) for logs in parts) / len(parts)) for name in parts[0]},
            **({} if point.validation is None else {"validation": point.validation}),
            "gradient_norm": norm,
            "learning_rate": schedule.rate(self.step - 1),
            "seconds": time.perf_counter() - began,
        }

    def _plateau(self) -> bool:
        patience = self.task.schedule.patience
        values = [point.validation for point in self.curve if point.validation is not None]
        return bool(patience) and len(values) > patience and min(values[-patience:]) >= min(values[:-patience])

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Writes everything that `load` needs: the engine's state, which all workers gather, and the curve."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / "state.safetensors")
        (folder / "tuning.json").write_text(
            json.dumps({"task": self.task.name, "step": self.step, "curve": self.curve, "stopped": self.stopped_early})
        )

    def load(self, folder: Path) -> None:
        """Goes on from what `save` wrote.

        Raises:
            ValueError: it is of another task.
        """
        about = json.loads((folder / "tuning.json").read_text())
        if about["task"] != self.task.name:
            raise ValueError(f"{folder}: a checkpoint of task {about['task']}, not of {self.task.name}")
        self.step, self.stopped_early = about["step"], about["stopped"]
        self.curve = [Point(*point) for point in about["curve"]]
        state = load_file(folder / "state.safetensors")
        self.engine.restore(state | {"step": torch.tensor(self.step)})


def to(batch: Sequence[Any], device: torch.device) -> Batch:
    """Tensors of a batch on a device."""
    return tuple(value.to(device) if isinstance(value, Tensor) else value for value in batch)
