"""The shapes that cross module borders, in one place. Units: pixels are uint8 RGB, latents are normalised (about unit variance)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from jaxtyping import Float, UInt8
from torch import Tensor

from vmt_core.backbone.geometry import Tap

Frames: TypeAlias = UInt8[Tensor, "frames 3 height width"]
Latents: TypeAlias = Float[Tensor, "channels frames height width"]
LatentBatch: TypeAlias = Float[Tensor, "batch channels frames height width"]
Text: TypeAlias = Float[Tensor, "tokens dim"]  # valid tokens only
TextBatch: TypeAlias = Float[Tensor, "batch length dim"]  # zero-padded to the model's text length
QueryKey: TypeAlias = tuple[Float[Tensor, "frames n heads head_dim"], Float[Tensor, "frames n heads head_dim"]]
Features: TypeAlias = Mapping[Tap, Tensor | QueryKey]
Motion: TypeAlias = dict[str, Tensor]
