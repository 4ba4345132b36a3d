"""What `--quick` makes of a benchmark."""

import pytest

from pipelines import bench, plan
from schemas import BenchSettings, PlanSettings, UsageError
from vmt_core.presets import native

TUNED = {"adapter": {"tuning": {"temporal": {"steps": 7}, "rank": 4}}}


def planned(**settings):
    return PlanSettings(
        references="clips", output="out", model="wan-nano", methods=("none", "follow_your_motion"), **settings
    )


def steps(settings):
    (tuned,) = [one.adapter.tuning for one in plan.methods_of(settings, native(settings.model)) if one.adapter]
    return tuned.spatial.steps, tuned.temporal.steps, tuned.rank


def test_quick_tunes_for_a_quarter_of_the_preset_s_steps():
    spatial, temporal, rank = steps(planned())
    assert steps(bench.shorter(planned())) == (-(-spatial // 4), -(-temporal // 4), rank)


def test_quick_keeps_what_was_asked_for():
    asked = planned(method_settings={"follow_your_motion": TUNED})
    spatial, *_ = steps(planned())
    assert steps(bench.shorter(asked)) == (-(-spatial // 4), 7, 4)
    assert asked.method_settings == {"follow_your_motion": TUNED} and "spatial" not in TUNED["adapter"]["tuning"]


def test_quick_says_what_is_wrong_as_plan_does():
    with pytest.raises(UsageError, match="nothing"):
        bench.shorter(planned(preset="nothing"))


def test_the_quick_procedural_suite_is_a_clip_and_two_prompts_of_two_categories(tmp_path, monkeypatch):
    monkeypatch.setattr(bench.synthesize, "run", lambda *_: None)  # the clips themselves are not looked at
    settings = BenchSettings(quick=True, output=str(tmp_path), height=32, width=32, frames=5, fps=6)
    clips = bench.procedural(settings, say=lambda _: None)
    assert sorted(clip.category for clip in clips) == ["articulated", "single"]
    assert all(len(clip.prompts.splitlines()) == 2 for clip in clips)


def test_clips_are_refused_where_the_suite_has_its_own(tmp_path):
    with pytest.raises(UsageError, match="--clips mine: is for --suite folder"):
        bench.run(BenchSettings(clips="mine", output=str(tmp_path)))
