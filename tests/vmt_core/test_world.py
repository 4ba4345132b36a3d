"""Procedural clips."""

import subprocess
import sys

import pytest
import torch

from schemas import LimitSettings
from vmt_core import video
from vmt_core.world.clips import MOTIONS, render


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_clip_moves_and_follows_from_its_arguments(motion):
    clip = render(motion, frames=9, height=48, width=80, seed=3)
    assert clip.shape == (9, 3, 48, 80)
    assert clip.dtype == torch.uint8
    assert torch.equal(clip, render(motion, frames=9, height=48, width=80, seed=3))
    assert (clip[4].float() - clip[0].float()).abs().mean() > 1
    assert not torch.equal(clip, render(motion, frames=9, height=48, width=80, seed=4))


def test_an_unknown_motion_is_refused():
    with pytest.raises(ValueError, match="'fly' is not one of line, bounce, circle, pan"):
        render("fly")


def test_the_clips_of_the_demo_are_playable(tmp_path):
    subprocess.run([sys.executable, "-m", "vmt_core.world", tmp_path], check=True)
    files = sorted(tmp_path.glob("*.mp4"))
    assert [file.stem for file in files] == sorted(MOTIONS)
    for file in files:
        assert video.probe(file, LimitSettings()).fps == 12
        video.verify(file, frames=17, height=192, width=192)
