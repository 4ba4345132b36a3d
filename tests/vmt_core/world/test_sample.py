"""Random scenes, their splits and their captions."""

import math
import re
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmt_core.world import MOTIONS, appearance, motion_caption, sample, split
from vmt_core.world.captions import vocabulary
from vmt_core.world.motion import parts
from vmt_core.world.sample import held_out
from vmt_core.world.spec import Arc, Background, Bounce, Camera, Figure, Line, Object, Pendulum, Scale, Scene, Spin

SIZES = st.sampled_from([(192, 192), (160, 224), (224, 160), (64, 256), (48, 48)])
ANY_MOTION = [(category, name) for category, names in MOTIONS.items() for name in names]


@given(seed=st.integers(0, 2**50), size=SIZES)
def test_a_seed_gives_the_same_scene_every_time(seed, size):
    first, second = (sample(seed, height=size[0], width=size[1]) for _ in range(2))
    assert first == second
    assert first.seed == seed
    assert first.motion in MOTIONS[first.category]


@pytest.mark.parametrize(("category", "name"), ANY_MOTION)
@given(seed=st.integers(0, 10**9), size=SIZES)
def test_bodies_stay_in_the_frame(category, name, seed, size):
    made = sample(seed, category=category, motion=name, frames=9, height=size[0], width=size[1])
    assert (made.category, made.motion) == (category, name)
    half = [length / min(size) / 2 for length in (size[1], size[0])]
    if category == "camera":  # what the camera does may take a body out, but not in the middle of the clip
        places = [part.matrix[4, :2, 2].tolist() for part in parts(made)]
    else:
        places = [place for part in parts(made) for place in part.matrix[:, :2, 2].tolist()]
    for x, y in places:
        assert abs(x) <= half[0] + 0.1
        assert abs(y) <= half[1] + 0.1


@given(seed=st.integers(0, 10**6))
def test_test_scenes_show_what_train_scenes_never_do(seed):
    made = sample(seed)
    ground = made.background
    combinations = [held_out(body, ground.pattern, ground.colour) for body in made.bodies]
    assert combinations[0] if split(seed) == "test" else not any(combinations)


def test_splits_take_turns():
    assert [split(seed) for seed in range(40)].count("train") == 36
    assert (split(18), split(19), split(38), split(59)) == ("val", "test", "val", "test")


def test_what_does_not_exist_is_refused_by_name():
    with pytest.raises(ValueError, match="motion 'fly' is not one of pan, zoom"):
        sample(0, motion="fly")
    with pytest.raises(ValueError, match="motion 'pan' is not one of category single: line, arc"):
        sample(0, category="single", motion="pan")
    assert sample(0, motion="walk").category == "articulated"


@given(seed=st.integers(0, 10**6), variety=st.integers(0, 1000))
def test_captions_say_what_is_seen_in_known_words_and_nothing_of_motion(seed, variety):
    made = sample(seed)
    for caption in (appearance(made), appearance(made, Random(variety))):
        words = re.findall(r"\w+", caption)
        assert set(words) <= set(vocabulary())
        for body in made.bodies:
            assert body.colour in words
        assert made.background.pattern in words
        assert not re.search(r"mov|spin|bounc|walk|wav|jump|camera|swing|circles|grow|shrink", caption)
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption)


def said(body, camera=None):
    return motion_caption(
        Scene(
            category="single", motion="line", bodies=(body,), camera=camera or Camera(),
            background=Background(pattern="plain", colour="gray"),
        )
    )  # fmt: skip


def thing(path):
    return Object(shape="star", colour="red", size=0.1, path=path)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (thing(Line(start=(-0.3, 0), end=(0.3, 0))), "the red star moves in a straight line from left to right"),
        (thing(Line(start=(0.3, -0.3), end=(-0.3, 0.3))), "from upper right to lower left"),
        (thing(Line(start=(0, -0.3), end=(0, 0.3))), "from top to bottom"),
        (thing(Bounce(start=(0.3, 0.3), end=(-0.3, 0.3), height=0.2, hops=2)), "bounces from right to left"),
        (thing(Arc(centre=(0, 0), radius=0.2, angle_from=0, angle_to=1)), "moves along an arc clockwise"),
        (thing(Arc(kind="orbit", centre=(0, 0), radius=0.2, angle_from=6, angle_to=0)), "circles counterclockwise"),
        (thing(Spin(at=(0, 0), turn=-1)), "spins in place counterclockwise"),
        (thing(Scale(at=(0, 0), factor=0.5)), "shrinks in place"),
        (Figure(colour="red", size=0.7, action="walk", start=(-0.2, 0), end=(0.2, 0), cycles=1), "walks from left"),
        (Figure(colour="red", size=0.7, action="jump", start=(0, 0), end=(0, 0), cycles=1), "jumps up and down"),
        (Pendulum(colour="red", size=0.5, pivot=(0, -0.4), bob=0.1, swing=0.4, cycles=1), "swings from side to side"),
    ],
)
def test_motion_in_words(body, words):
    assert words in said(body)


@pytest.mark.parametrize(
    ("camera", "words"),
    [
        (Camera(kind="pan", shift=(-0.3, 0.0)), "the camera pans to the left"),
        (Camera(kind="zoom", factor=0.5), "the camera zooms out"),
        (Camera(kind="roll", turn=1.0), "the camera rolls, the scene turns clockwise"),
        (Camera(kind="orbit", shift=(0.5, 0.1)), "the background slides to the left"),
        (Camera(kind="shake", shift=(0.1, 0.1)), "the camera shakes"),
    ],
)
def test_the_camera_in_words(camera, words):
    assert said(Figure(colour="red", size=0.7, action="wave", start=(0, 0), end=(0, 0), cycles=1), camera).endswith(
        words
    )


def test_the_hip_of_a_jumper_leaves_the_floor_and_comes_back():
    made = sample(5, category="articulated", motion="jump", frames=33)
    height = -parts(made)[0].matrix[:, 1, 2]
    assert height.max() - height.min() > 0.15
    hops = made.bodies[0].cycles
    assert (
        (height[0] == height.min()) and math.isclose(height[round(32 / hops)], height.min(), abs_tol=1e-6)
    ) or hops == 1.5
