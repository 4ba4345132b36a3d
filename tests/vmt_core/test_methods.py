"""The registry."""

import json

import pytest

from vmt_core import METHODS
from vmt_core.backbone.geometry import Tap
from vmt_core.methods import PRESETS, build


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_made_again_from_its_own_settings(name, preset):
    method = METHODS[name](preset=preset)
    assert method.name == name
    assert METHODS[name](**method.settings()) == method
    assert build(name, json.loads(json.dumps(method.settings()))) == method  # as a manifest row holds them


@pytest.mark.parametrize(
    ("preset", "paths"),
    [
        ("default", {"guidance.level": "clean", "start.kind": "noise", "objective.block": 14, "guidance.inner": 10}),
        ("paper", {"guidance.level": "step", "start.kind": "noise", "objective.drift": "absolute"}),
        ("nano", {"objective.block": 5, "objective.window": 9, "guidance.level": "clean"}),
    ],
)
def test_a_preset_of_fastvmt_is_what_it_says(preset, paths):
    settings = METHODS["fastvmt"](preset=preset).settings()
    for path, value in paths.items():
        group, field = path.split(".")
        assert settings[group][field] == value


def test_published_follow_your_motion_keeps_the_looks_of_the_reference():
    scales = {
        preset: METHODS["follow_your_motion"](preset=preset).adapter.spatial_scale
        for preset in ("default", "paper", "code")
    }
    assert scales == {"default": 0, "paper": 1, "code": 1}
    assert METHODS["follow_your_motion"](preset="code", adapter={"spatial_scale": 0.5}).adapter.spatial_scale == 0.5


def test_guided_methods_have_the_constants_of_their_papers():
    fastvmt, ditflow = METHODS["fastvmt"]().guidance, METHODS["ditflow"]().guidance
    assert fastvmt.learning_rates(0, 50) == pytest.approx([0.003 - 0.0001 * update for update in range(10)])
    assert (fastvmt.interval, fastvmt.guided_steps(50)) == (3, 10)
    window = fastvmt.objective
    assert (window.window, window.tile, window.span, window.temperature) == (21, (3, 4), 3, 2.0)
    assert [ditflow.learning_rates(step, 50)[0] for step in range(10)] == pytest.approx(
        [0.002 - 0.0001 * step for step in range(10)]
    )
    assert (ditflow.inner, ditflow.interval, ditflow.guided_steps(50)) == (5, 1, 10)
    assert METHODS["ditflow"](preset="paper").guidance.objective.reference == "hard"


def test_single_settings_override_a_preset():
    method = METHODS["fastvmt"](preset="paper", guidance={"inner": 5}, objective={"window": 11})
    assert method.guidance.inner == 5
    assert method.guidance.level == "step"
    assert method.guidance.objective.window == 11


def test_objectives_say_where_they_read():
    assert METHODS["fastvmt"]().guidance.objective.taps == (Tap(14, "qk"),)
    assert METHODS["none"]().guidance is None


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("fastmvt", {}, "'fastmvt' is not one of ditflow, fastvmt, follow_your_motion, none"),
        ("fastvmt", {"guidance": {"inner": 0}}, "method fastvmt: inner: .*greater than or equal to 1"),
        ("fastvmt", {"guidance": {"span": "half", "inner": 0}}, "span: .*; inner: "),
        ("fastvmt", {"guidance": {"iner": 5}}, "method fastvmt: iner: "),
        ("fastvmt", {"goals": {}}, "method fastvmt: .*goals"),
        ("ditflow", {"objective": {"window": 9}}, "method ditflow: window: "),
        ("none", {"start": {"strength": 0}}, "method none: strength: "),
        ("none", {"start": {"strength": 0.5}}, "method none: Value error, strength=0.5 needs kind: sdedit"),
        ("none", {"start": {"kind": "sdedit"}}, "sdedit needs a strength below 1"),
        ("none", {"start": {"kind": "sdedit", "strength": 1.0}}, "strength: Input should be less than 1"),
        ("fastvmt", {"guidance": {"objective": {"block": 3}}}, "objective is a group of its own, beside guidance"),
        ("none", {"start": {"kind": "reference"}}, "method none: kind: .*'noise' or 'sdedit'"),
        ("fastvmt", {"objective": {"window": 4}}, "window=4 has no centre"),
        ("fastvmt", {"objective": {"tile": (0, 4)}}, "tile.*: Input should be greater than 0"),
        ("fastvmt", {"guidance": {"learning_rate": (-1.0, 0.0)}}, "learning_rate.*greater than or equal to 0"),
        ("ditflow", {"guidance": {"learning_rate": (float("nan"), 0.0)}}, "learning_rate.*finite"),
        ("none", {"guidance": {}}, "guidance"),
        ("follow_your_motion", {"adapter": {"tuning": {"rank": 0}}}, "method follow_your_motion: rank: "),
        ("follow_your_motion", {"adapter": {"spatial_scale": 3}}, "spatial_scale: .*less than or equal to 2"),
        ("follow_your_motion", {"preset": "best"}, "'best' is not one of default, paper, code, nano"),
        ("ditflow", {"preset": "best"}, "method ditflow: preset 'best' is not one of default, paper, nano"),
        ("fastvmt", {"guidance": "fast"}, "method fastvmt: guidance is 'fast'; it must hold settings by name"),
        ("fastvmt", {"guidanc": {}}, "'guidanc' is not one of its groups, objective, guidance, start"),
        ("follow_your_motion", {"adapter": {"tuning": "nano"}}, "method follow_your_motion: adapter.tuning is 'nano'"),
        ("fastvmt", {"objective": {"temperature": float("inf")}}, "temperature: Input should be a finite number"),
    ],
)
def test_what_cannot_be_built_is_one_line_that_names_it(name, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        build(name, settings)
    assert "\n" not in str(caught.value)


def test_a_tuned_method_can_be_guided_as_well():
    assert METHODS["follow_your_motion"]().guidance is None
    both = METHODS["follow_your_motion"](preset="nano", guidance={}, objective={})
    assert both.guidance == METHODS["fastvmt"](preset="nano").guidance
    assert build("follow_your_motion", json.loads(json.dumps(both.settings()))) == both
