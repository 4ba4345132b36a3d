"""The classifier that reads clips back, and what is measured without it."""

import pytest
import torch
from safetensors.torch import save_file

from vmt_core.world import Scene, centres, masks, render, sample
from vmt_core.world.judge import (
    GROUNDS,
    KINDS,
    PATTERNS,
    Judge,
    accuracy,
    answer,
    cached,
    centre_path,
    foreground,
    mean,
    train,
    verdicts,
)
from vmt_core.world.spec import COLOURS, Background, Figure, Object, Still


def scene(*bodies, pattern="dotted", ground="teal"):
    return Scene(
        category="single", motion="line", bodies=bodies, background=Background(pattern=pattern, colour=ground),
        frames=5, height=96, width=96,
    )  # fmt: skip


RED_STAR = Object(shape="star", colour="red", size=0.3, path=Still(at=(0.1, 0.0)))
WHITE_MAN = Figure(colour="white", size=0.6, action="walk", start=(-0.3, 0), end=(-0.2, 0), cycles=1)


def test_the_answer_names_the_kind_of_each_colour_and_the_background():
    right = answer(scene(RED_STAR, WHITE_MAN)).tolist()
    colours = list(COLOURS)
    assert right[colours.index("red")] == KINDS.index("star")
    assert right[colours.index("white")] == KINDS.index("figure")
    assert sum(kind > 0 for kind in right[: len(colours)]) == 2
    assert right[-2:] == [PATTERNS.index("dotted"), GROUNDS.index("teal")]


class Says:
    """A judge that always sees the same."""

    def __init__(self, bodies, pattern, ground):
        self.answer = torch.zeros(len(COLOURS), len(KINDS)), torch.zeros(len(PATTERNS)), torch.zeros(len(GROUNDS))
        self.answer[0][:, 0] = 0.5
        for colour, kind in bodies.items():
            self.answer[0][list(COLOURS).index(colour), KINDS.index(kind)] = 1
        self.answer[1][PATTERNS.index(pattern)] = 1
        self.answer[2][GROUNDS.index(ground)] = 1

    def look(self, clip):
        return self.answer


@pytest.mark.parametrize(
    ("judge", "expected"),
    [
        (Says({"red": "star", "white": "figure"}, "dotted", "teal"), (1, 1, 1, 1)),
        (Says({"red": "ring", "white": "figure"}, "dotted", "navy"), (1, 0.5, 0, 1)),
        (Says({"blue": "star"}, "plain", "teal"), (0, 0, 1, 0)),
    ],
)
def test_verdicts_by_hand(judge, expected):
    made = scene(RED_STAR, WHITE_MAN)
    (found,) = verdicts(judge, [render(made)], [made])
    assert (found.colour, found.shape, found.background_colour, found.background_pattern) == expected
    assert mean([found, found]) == found
    assert found.background == min(expected[2:])


@pytest.mark.parametrize("seed", range(0, 60, 7))
def test_the_foreground_is_where_the_masks_say(seed):
    made = sample(seed, frames=5)
    found, exact = foreground(render(made)), masks(made) >= 0
    assert (found != exact).float().mean() < 0.02


def test_the_centre_is_followed_and_lost_where_nothing_is_seen():
    made = sample(21, category="single", motion="line")
    frames = render(made)
    path = centre_path(frames)
    assert (path - centres(made)[:, 0]).norm(dim=-1).max() < 4
    frames[3] = frames[3, :, :1, :1]
    assert centre_path(frames)[3].isnan().all()


def test_a_judge_learns_and_is_kept(tmp_path, monkeypatch):
    """A short training is far better than chance already."""
    from vmt_core.world import judge

    monkeypatch.setattr(judge, "train", lambda: train(scenes=600, steps=200, batch=32))
    first = cached(tmp_path / "judge.safetensors")
    verdict = accuracy(first, clips=40)
    assert verdict.background_colour > 0.8  # chance: 1 of 6
    assert verdict.background_pattern > 0.4  # 1 of 5
    assert verdict.colour > 0.15  # 0 where no body is seen
    monkeypatch.setattr(judge, "train", None)
    again = cached(tmp_path / "judge.safetensors")
    assert accuracy(again, clips=40) == verdict
    assert isinstance(again, Judge)


def test_a_file_of_another_judge_is_refused(tmp_path):
    path = tmp_path / "judge.safetensors"
    for content, version in (({"head.weight": torch.zeros(1)}, "1"), (Judge().state_dict(), "0")):
        save_file(content, path, metadata={"world_version": version})
        with pytest.raises(ValueError, match="no weights of this judge; remove the file"):
            cached(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="no weights of this judge; remove the file"):
        cached(path)
