"""Metrics on code that is not bundled: the arithmetic by hand and against known levels, the loading on stand-ins for that code."""

import sys
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vmt_core.metrics.noncommercial import GRID, Amt, CoTracker, fidelity
from vmt_core.metrics.suite import NON_COMMERCIAL, Reference, Suite, Video


def walks(count, frames=24, seed=0):
    return torch.randn(frames, count, 2, generator=torch.Generator().manual_seed(seed)).cumsum(0)


RIGHT, DOWN = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
TIME = torch.arange(9.0).view(-1, 1, 1)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([RIGHT, DOWN], [RIGHT, DOWN], 1.0),
        ([RIGHT], [DOWN], 0.0),
        ([RIGHT], [-RIGHT], -1.0),
        ([RIGHT], [RIGHT, -RIGHT], ((1 + 0) + 0) / 1 / 2 + 0.0),  # 1 one way, the mean of 1 and -1 the other
        ([RIGHT, 0 * RIGHT], [RIGHT, 0 * RIGHT], (0.5 + 0.5) / 2),  # a standing track has no direction, and counts
    ],
)
def test_fidelity_by_hand(first, second, expected):
    one, two = (TIME * torch.stack(steps) for steps in (first, second))
    assert fidelity(one, two) == pytest.approx(expected)
    assert fidelity(two, one) == pytest.approx(expected)


@pytest.mark.parametrize(("count", "level"), [(50, 0.33), (200, 0.39), (800, 0.46)])
def test_the_level_of_chance_is_high(count, level):
    assert fidelity(walks(count), walks(count, seed=1)) == pytest.approx(level, abs=0.02)
    assert fidelity(walks(count), walks(count)) == pytest.approx(1, abs=1e-4)


def test_still_scenes_score_by_the_noise_of_the_tracker():
    """0.55 as published metrics go, where nothing moves at all: why it is read beside a floor."""
    grid = torch.rand(400, 2) * 200
    first, second = (grid + 0.05 * torch.randn(24, 400, 2) for _ in range(2))
    assert 0.4 < fidelity(first, second) < 0.7


class Shifts(nn.Module):
    """Says that every point moves by what its one weight says."""

    def __init__(self, checkpoint, window_len):
        super().__init__()
        assert checkpoint is None and window_len == 60
        self.model = nn.Linear(1, 2, bias=False)

    def forward(self, video, grid_size):
        assert video.shape[:1] + video.shape[2:3] == (1, 3) and video.max() > 1
        steps = torch.arange(video.shape[1]).view(1, -1, 1, 1)
        tracks = torch.zeros(1, video.shape[1], grid_size**2, 2) + steps * self.model.weight.view(2)
        return tracks, torch.ones(tracks.shape[:3], dtype=torch.bool)


class Middle(nn.Module):
    """The mean of both frames times its weight."""

    def __init__(self, corr_radius, corr_lvls, num_flows):
        super().__init__()
        assert (corr_radius, corr_lvls, num_flows) == (3, 4, 3)
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, before, after, half, scale_factor, eval):
        assert before.shape[-2] % 16 == before.shape[-1] % 16 == 0 and before.max() <= 1
        assert half.shape == (len(before), 1, 1, 1) and scale_factor == 1.0 and eval
        return {"imgt_pred": self.weight * (half * before + (1 - half) * after)}


@pytest.fixture
def stand_ins(monkeypatch, tmp_path):
    for name, attribute, made in (
        ("cotracker.predictor", "CoTrackerPredictor", Shifts),
        ("networks.AMT-S", "Model", Middle),
    ):
        parent, module = ModuleType(name.split(".")[0]), ModuleType(name)
        setattr(module, attribute, made)
        monkeypatch.setitem(sys.modules, parent.__name__, parent)
        monkeypatch.setitem(sys.modules, name, module)
    save_file({"weight": torch.tensor([[3.0], [4.0]])}, tmp_path / "cotracker.safetensors")
    save_file({"weight": torch.ones(1)}, tmp_path / "amt.safetensors")
    return tmp_path


def test_cotracker_tracks_a_grid(stand_ins):
    tracks = CoTracker(stand_ins / "cotracker.safetensors").tracks(torch.full((5, 3, 20, 30), 9, dtype=torch.uint8))
    assert tracks.shape == (5, GRID**2, 2)
    assert tracks[1, 0].tolist() == [3.0, 4.0]


def test_smoothness_is_the_distance_of_odd_frames_from_what_their_neighbours_say(stand_ins):
    amt = Amt(stand_ins / "amt.safetensors")
    ramp = (10 * torch.arange(20.0)).view(-1, 1, 1, 1).expand(-1, 3, 24, 40).to(torch.uint8)  # 16 does not divide 24
    assert amt.smoothness(ramp) == pytest.approx(1)
    blink = ramp.clone()
    blink[:, :] = torch.tensor([0, 51] * 10).view(-1, 1, 1, 1)
    assert amt.smoothness(blink) == pytest.approx(1 - 0.2)
    with pytest.raises(ValueError, match="needs at least 3 frames, not 2"):
        amt.smoothness(ramp[:2])


def test_even_lengths_leave_the_last_frame_out(stand_ins):
    amt = Amt(stand_ins / "amt.safetensors")
    clip = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    clip[3] = 255
    assert amt.smoothness(clip) == 1


def test_the_suite_measures_with_what_is_given(stand_ins):
    frames = torch.full((5, 3, 32, 32), 40, dtype=torch.uint8)
    suite = Suite(cotracker=CoTracker(stand_ins / "cotracker.safetensors"), amt=Amt(stand_ins / "amt.safetensors"))
    values, _ = suite.measure(Video(frames, Reference(frames), ""))
    assert values["motion_fidelity"] == pytest.approx(1)
    assert values["motion_smoothness"] == pytest.approx(1)
    _, reasons = Suite().measure(Video(frames, Reference(frames), ""))
    assert {reasons[name] for name in NON_COMMERCIAL} == {"no CoTracker was given", "no AMT was given"}


def test_code_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        ImportError, match=r"cotracker.predictor cannot be imported .* github.com/facebookresearch/co-tracker"
    ):
        CoTracker(tmp_path / "any.safetensors")
