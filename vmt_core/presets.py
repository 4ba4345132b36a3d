"""What a model is made for: size and sampling that `plan` takes where the user says nothing; a clip's own rate comes before the model's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vmt_core.backbone import nano
from vmt_core.precision import fast_dtype


@dataclass(frozen=True)
class Native:
    """A model's own defaults. Pixels, frames (4k+1), frames per second."""

    height: int
    width: int
    frames: int
    fps: float
    steps: int
    shift: float
    guidance_scale: float
    preset: str  # of the methods
    dtype: str  # of the transformer
    checkpoint: Literal["none", "selective", "full"]  # what backward passes recompute


WAN = Native(
    480,
    832,
    81,
    16.0,
    steps=50,
    shift=5.0,
    guidance_scale=5.0,
    preset="default",
    dtype="bfloat16",
    checkpoint="selective",
)
#: Runs on the CPU that it is planned on.
NANO = Native(
    192,
    192,
    17,
    12.0,
    steps=20,
    shift=3.0,
    guidance_scale=4.0,
    preset="nano",
    dtype=str(fast_dtype()).removeprefix("torch."),
    checkpoint="none",
)


def native(model: str) -> Native:
    """The defaults of a model."""
    return NANO if model == nano.NAME else WAN
