"""The training loop of both stages: steps, moving average, validation, checkpoints that continue exactly.

What a step sees follows from (seed, step, rank) alone, so that a resumed run is the run that was never stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

Logs = dict[str, float]
StepLogs = dict[str, Tensor]  # of one step, not waited for
_Weights = tuple[Tensor, ...] | list[Tensor]
MAX_FILE = "12MB"  # of one checkpoint file


@dataclass(frozen=True)
class Phase:
    """A stretch of training on clips of one or several sizes."""

    steps: int
    clips: tuple[tuple[int, int, int, int], ...]  # (batch, frames, height, width), one drawn per step
    learning_rate: float
    warmup: int = 200
    decay_to: float = 0.1  # of the learning rate, at the phase's end
    renew: int = 20  # steps after which new clips join the cached ones (transformer)
    before: int = 0  # steps of an earlier run, whose clips are there from the first step


class Stage(Protocol):
    """What is trained. `module(*batch)` gives the loss and what to log; it is wrapped for several workers."""

    name: str
    module: nn.Module
    phases: tuple[Phase, ...]
    ema_decay: float
    validation_clips: int

    def optimizers(self) -> list[torch.optim.Optimizer]: ...
    def batch(self, step: int, rank: int) -> tuple[Tensor, ...]: ...
    def validate(self, module: nn.Module) -> Logs: ...


class Run:
    """A stage with its optimizers, its moving average and the number of steps done."""

    def __init__(
        self, stage: Stage, *, device: str = "cpu", wrap: Callable[[nn.Module], nn.Module] = lambda m: m
    ) -> None:
        self.stage, self.device, self.step = stage, torch.device(device), 0
        stage.module.to(self.device)
        self.average = AveragedModel(stage.module, multi_avg_fn=moving_average(stage.ema_decay))
        self.optimizers = stage.optimizers()
        self.base_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.wrapped = wrap(stage.module)
        self._next: tuple[tuple[int, int], tuple[Tensor, ...]] | None = None  # (step, rank) and its batch

    @property
    def steps(self) -> int:
        """Of all phases."""
        return sum(phase.steps for phase in self.stage.phases)

    @property
    def done(self) -> bool:
        return self.step >= self.steps

    def train_step(self, rank: int = 0) -> Logs:
        """One step; logs the loss, the learning rate and the seconds."""
        began = time.perf_counter()
        factor = learning_rate(self.stage.phases, self.step)
        for optimizer, rates in zip(self.optimizers, self.base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        batch = self._batch(self.step, rank)
        self.stage.module.train()
        loss, logs = self.wrapped(*batch)
        loss.backward()
        if self.step + 1 < self.steps:  # drawn while a GPU is at the gradients
            self._next = (self.step + 1, rank), self._batch(self.step + 1, rank)
        norm = nn.utils.clip_grad_norm_(self.stage.module.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"{self.stage.name}: the gradient at step {self.step} is not finite")
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.average.update_parameters(self.stage.module)
        self.step += 1
        return {
            "step": self.step,
            "loss": loss.item(),
            **{name: value.item() for name, value in logs.items()},
            "gradient_norm": norm.item(),
            "learning_rate": factor,
            "seconds": time.perf_counter() - began,
        }

    def _batch(self, step: int, rank: int) -> tuple[Tensor, ...]:
        ahead, self._next = self._next, None
        if ahead is not None and ahead[0] == (step, rank):
            return ahead[1]
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in self.stage.batch(step, rank))

    def validate(self) -> Logs:
        """Of the moving average."""
        module = self.average.module.eval()
        with torch.no_grad():
            return self.stage.validate(module)

    def save(self, folder: Path) -> None:
        """Everything that `load` needs to go on, as safetensors files of at most MAX_FILE and a JSON."""
        tensors = {f"model.{name}": value for name, value in self.stage.module.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.module.state_dict().items()}
        for index, optimizer in enumerate(self.optimizers):
            for number, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{index}.{number}.{name}": value for name, value in state.items()}
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().cpu().clone() for name, value in tensors.items()}  # tied weights are kept twice
        save_torch_state_dict(tensors, folder, max_shard_size=MAX_FILE, metadata={"stage": self.stage.name})
        (folder / "state.json").write_text(json.dumps({"stage": self.stage.name, "step": self.step}))

    def load(self, folder: Path) -> None:
        """Continues from what `save` wrote.

        Raises:
            ValueError: the checkpoint is of another stage or another architecture.
        """
        state = json.loads((folder / "state.json").read_text())
        if state["stage"] != self.stage.name:
            raise ValueError(f"{folder}: a checkpoint of stage {state['stage']}, not of {self.stage.name}")
        tensors = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
        try:
            self.stage.module.load_state_dict(_under("model.", tensors))
            self.average.module.load_state_dict(_under("average.", tensors))
        except RuntimeError as error:
            raise ValueError(f"{folder}: not of this architecture: {error}") from error
        self.average.n_averaged.fill_(state["step"])
        for index, optimizer in enumerate(self.optimizers):
            content = optimizer.state_dict()
            restored: dict[int, dict[str, Tensor]] = {}
            for name, value in _under(f"optimizer.{index}.", tensors).items():
                number, _, key = name.partition(".")
                restored.setdefault(int(number), {})[key] = value
            optimizer.load_state_dict({"state": restored, "param_groups": content["param_groups"]})
        self.step = state["step"]


def moving_average(decay: float) -> Callable[[_Weights, _Weights, Tensor | int], None]:
    """An exponential moving average that forgets its beginning: the decay grows to its value over the first steps."""

    def update(average: _Weights, current: _Weights, count: Tensor | int) -> None:
        now = min(decay, (1 + int(count)) / (10 + int(count)))
        for mean, value in zip(average, current, strict=True):
            mean.lerp_(value, 1 - now)

    return update


def learning_rate(phases: tuple[Phase, ...], step: int) -> float:
    """Of a step: a linear warm-up at the start of each phase, then half a cosine down to `decay_to`."""
    phase, within = phase_at(phases, step)
    warm = min(1.0, (within + 1) / max(1, phase.warmup))
    progress = within / phase.steps
    return (
        phase.learning_rate
        * warm
        * (phase.decay_to + (1 - phase.decay_to) * (0.5 + 0.5 * math.cos(math.pi * progress)))
    )


def scaled(phases: tuple[Phase, ...], factor: float) -> tuple[Phase, ...]:
    """The same phases with fewer or more steps; with fewer, less came before, too."""
    less = min(1.0, factor)
    return tuple(
        replace(
            phase,
            steps=max(1, round(phase.steps * factor)),
            warmup=max(1, round(phase.warmup * less)),
            before=round(phase.before * less),
        )
        for phase in phases
    )


def phase_at(phases: tuple[Phase, ...], step: int) -> tuple[Phase, int]:
    """The phase of a step and the step's number within it."""
    for phase in phases:
        if step < phase.steps:
            return phase, step
        step -= phase.steps
    return phases[-1], phases[-1].steps


def train(
    run: Run,
    *,
    minutes: float,
    report: Callable[[Logs, bool], None],
    validate_every: int = 250,
    checkpoint_minutes: float = 5.0,
    rank: int = 0,
    agree: Callable[[bool], bool] = bool,
) -> None:
    """Trains until the phases or the minutes are over.

    Args:
        report: told the logs of every step, and whether it is time to save (last of all, always).
        rank: of this worker; only 0 validates.
        agree: makes what rank 0 thinks the decision of all workers.
    """
    began = saved = time.monotonic()
    over = run.done
    while not over:
        logs = run.train_step(rank)
        now = time.monotonic()
        over = agree(run.done or now - began > 60 * minutes)
        save = over or agree(now - saved > 60 * checkpoint_minutes)
        if rank == 0 and (run.step % validate_every == 0 or over):
            logs |= {f"validation/{name}": value for name, value in run.validate().items()}
        report(logs, save)
        saved = time.monotonic() if save else saved


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
