"""Benchmarks as references."""

import json
from random import Random

import numpy as np
import pytest
from PIL import Image

from pipelines import suites
from pipelines.storage import Storage
from schemas import LimitSettings, UsageError
from support.clips import clip
from vmt_core import video
from vmt_core.world import appearance, sample


@pytest.mark.parametrize("category", ["camera", "single", "multiple", "articulated"])
def test_other_looks_keep_the_kinds_and_change_colours_and_background(category):
    for seed in range(5):
        scene = sample(20 * seed + 19, category=category)
        asked = suites.other_looks(scene, 5, Random(0))
        assert len(set(asked)) == 5 and appearance(scene) not in asked
        assert asked == suites.other_looks(scene, 5, Random(0))
        for prompt in asked:
            words = prompt.split()
            assert not {body.colour for body in scene.bodies} & set(words)
            assert scene.background.colour not in words
            assert prompt.count(" and ") == len(scene.bodies) - 1


def test_clips_with_a_json_beside_each(tmp_path):
    clip(tmp_path / "a.mp4", frames=9)
    (tmp_path / "a.json").write_text(json.dumps({"caption": "a ball", "category": "single", "prompts": ["one", "two"]}))
    (found,) = suites.folder(Storage(), str(tmp_path), str(tmp_path / "out"))
    assert (found.caption, found.category, found.prompts) == ("a ball", "single", "one\ntwo")


@pytest.mark.parametrize(
    "content", ["[", "{}", '{"prompts": 3}', "[1]", '{"prompts": "a fox"}', '{"caption": 5, "prompts": []}']
)
def test_a_json_that_says_something_else_is_named(tmp_path, content):
    clip(tmp_path / "a.mp4", frames=9)
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UsageError, match=r"a\.json: not \{"):
        suites.folder(Storage(), str(tmp_path), str(tmp_path / "out"))


def test_davis_sequences_become_videos(tmp_path):
    for name in ("bear", "dog-agility"):
        folder = tmp_path / "davis" / "JPEGImages" / "480p" / name
        folder.mkdir(parents=True)
        for number in range(6):
            Image.fromarray(np.full((33, 48, 3), 40 * number, np.uint8)).save(folder / f"{number:05d}.jpg")
    found = suites.folder(Storage(), str(tmp_path / "davis"), str(tmp_path / "clips"))
    assert [reference.caption for reference in found] == ["bear", "dog agility"]
    info = video.probe(found[0].uri, LimitSettings())
    assert (info.frames, info.height, info.width, info.fps) == (6, 32, 48, 24)
    frames = video.read(found[0].uri, height=32, width=48, frames=5, fps=24)
    assert [float(frame.float().mean()) for frame in frames] == pytest.approx([0, 40, 80, 120, 160], abs=4)
    assert suites.folder(Storage(), str(tmp_path / "davis"), str(tmp_path / "clips")) == found


def test_davis_in_several_sizes_is_taken_at_480p(tmp_path):
    for size, side in (("1080p", 64), ("480p", 32)):
        folder = tmp_path / "JPEGImages" / size / "bear"
        folder.mkdir(parents=True)
        for number in range(5):
            Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(folder / f"{number:05d}.jpg")
    (found,) = suites.folder(Storage(), str(tmp_path), str(tmp_path / "clips"))
    assert video.probe(found.uri, LimitSettings()).frames == 5
    assert video.probe(found.uri, LimitSettings()).height == 32
    (tmp_path / "JPEGImages" / "480p").rename(tmp_path / "JPEGImages" / "Full")
    with pytest.raises(UsageError, match="has JPEGImages of 1080p, Full, none of them 480p"):
        suites.folder(Storage(), str(tmp_path), str(tmp_path / "others"))


def test_davis_with_a_frame_that_is_no_image(tmp_path):
    folder = tmp_path / "JPEGImages" / "480p" / "bear"
    folder.mkdir(parents=True)
    (folder / "00000.jpg").write_text("no")
    with pytest.raises(UsageError, match=r"00000\.jpg: not an image"):
        suites.folder(Storage(), str(tmp_path), str(tmp_path / "clips"))


def test_no_folder_is_refused():
    with pytest.raises(UsageError, match="--clips: suite folder needs"):
        suites.folder(Storage(), "", "out")
