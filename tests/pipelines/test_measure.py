"""What decides which videos are compared, and what their motion is compared with."""

import json

import pytest

from pipelines import measure
from support.jobs import row
from vmt_core.world import sample

SCENE = sample(3, frames=9, height=64, width=64, fps=12)
SEEN = {"start_frame": 0, "fps": 12.0, "frames": 9, "height": 32, "width": 32}


def test_a_reference_that_was_seen_whole_has_exact_motion_at_the_videos_size():
    found = measure._scene(SEEN, {"scene": SCENE.model_dump_json()})
    assert found == SCENE.model_copy(update={"height": 32, "width": 32})


@pytest.mark.parametrize("change", [{"start_frame": 4}, {"fps": 6.0}, {"frames": 5}, {"width": 48}])
def test_of_a_part_of_a_reference_no_motion_is_known_exactly(change):
    assert measure._scene(SEEN | change, {"scene": SCENE.model_dump_json()}) is None


@pytest.mark.parametrize("tags", [{}, {"scene": ""}, {"scene": "{}"}, {"scene": json.dumps({"category": "x"})}])
def test_other_clips_have_no_scene(tags):
    assert measure._scene(SEEN, tags) is None


@pytest.mark.parametrize(
    "change",
    [
        {"reference_digest": "1" * 64}, {"start_frame": 1}, {"end_frame": 8}, {"fps": 6.0}, {"frames": 9}, {"prompt": "b"}, {"seed": 1},
        {"steps": 3}, {"shift": 4.0}, {"guidance_scale": 2.0}, {"negative_prompt": "blurred"}, {"height": 80}, {"width": 80},
        {"dtype": "float32"}, {"model_revision": "other"}, {"video_version": 1},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_videos_are_a_pair_only_if_nothing_but_the_method_sets_them_apart(change):
    values = row("a").model_dump()
    other = values | change
    assert measure.pair_of(other | {"method": "ditflow"}) != measure.pair_of(values)
    assert measure.pair_of(values | {"method": "ditflow", "sample_id": "other"}) == measure.pair_of(values)
