"""What the workers of one training say to one another; without a process group each call gives its argument back."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import distributed

T = TypeVar("T")


def agree(value: bool) -> bool:
    """What rank 0 thinks, on every worker."""
    if not distributed.is_initialized():
        return value
    decision = torch.tensor([value], device=_device(), dtype=torch.uint8)
    distributed.broadcast(decision, src=0)
    return bool(decision.item())


def mean(value: float) -> float:
    """The mean over all workers."""
    if not distributed.is_initialized():
        return value
    total = torch.tensor([value], device=_device(), dtype=torch.float64)
    distributed.all_reduce(total)
    return float(total.item()) / distributed.get_world_size()


def from_first(value: T) -> T:
    """What rank 0 has, on every worker."""
    if not distributed.is_initialized():
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Waits for all workers."""
    if distributed.is_initialized():
        distributed.barrier()


def _device() -> str:
    return "cuda" if distributed.get_backend() == "nccl" else "cpu"
