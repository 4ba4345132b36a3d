"""Smoothness and consistency by optical flow."""

import pytest
import torch

from vmt_core.metrics.flow import consistency, smoothness
from vmt_core.world import render, sample


def clip(motion, seed=0, frames=9):
    return render(sample(seed, motion=motion, frames=frames, height=128, width=128))


@pytest.fixture(scope="module")
def still():
    return clip("line")[:1].expand(9, -1, -1, -1).contiguous()


def test_a_still_clip_is_perfect(still):
    assert smoothness(still) == pytest.approx(1.0, abs=1e-6)
    assert consistency(still) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("motion", ["line", "pan", "zoom"])
def test_smooth_motion_beats_shuffled_frames_and_noise(motion):
    frames = clip(motion, frames=17)
    shuffled = frames[torch.randperm(17, generator=torch.Generator().manual_seed(0))]
    noise = torch.randint(0, 256, frames.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert smoothness(frames) > smoothness(shuffled) > smoothness(noise)
    assert consistency(frames) > consistency(
        noise
    )  # where the flow can be trusted: of shuffled flat shapes that is little
    assert min(smoothness(frames), consistency(frames)) > 0.97


def test_jitter_is_less_smooth():
    frames = clip("line", frames=9)
    jittered = torch.stack([frame.roll(6 * (-1) ** index, 2) for index, frame in enumerate(frames)])
    assert smoothness(jittered) < smoothness(frames) - 0.005


def test_too_few_frames_are_refused(still):
    with pytest.raises(ValueError, match="2 frames; smoothness needs at least 3"):
        smoothness(still[:2])
