"""Training-free motion objectives, one file each.

An objective reads features of the transformer at its taps. `encode` turns the reference's features into its motion
(once, detached, savable); `loss` compares the features of a video in the making with that motion.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from vmt_core.backbone.geometry import Geometry, Tap
from vmt_core.shapes import Features, Motion


class Objective(Protocol):
    """A training-free method is these three members."""

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Where features are read."""
        ...

    def encode(self, reference: Features, geometry: Geometry) -> Motion:
        """The reference's motion: detached tensors that know nothing of the model."""
        ...

    def loss(self, generated: Features, motion: Motion, geometry: Geometry) -> Tensor:
        """fp32 scalar, least (zero) where the generated features are the reference's; gradients flow to `generated`."""
        ...
