"""A clip to tune on, heads to adapt, and a second Wan to load what the first has learnt."""

import pytest
import torch

from vmt_core import Backbone
from vmt_core.adapters.follow_your_motion import prepare
from vmt_core.world import render, sample


@pytest.fixture
def fresh(folder):
    """As `wan` is at first."""
    return Backbone.load(str(folder), dtype=torch.float32)


@pytest.fixture(scope="session")
def prepared(tiny):
    """A moving square, 17 frames of 64x64: 5 latents of 4x4 tokens."""
    clip = render(sample(3, category="single", motion="line", frames=17, height=64, width=64))
    return prepare(tiny, clip, "a red square on a plain navy background", stride=4)


@pytest.fixture
def heads():
    """The first block's first head, both of the second's, none of the third's."""
    return torch.tensor([[True, False], [True, True], [False, False]])
