"""jobs/synthesize.py: a dataset that says exactly how it moves."""

import json
import time

import numpy as np
import pyarrow.dataset as ds
import pytest

from pipelines import synthesize
from pipelines.storage import Storage
from pipelines.synthesize import category_of, seeds
from schemas import LimitSettings, SynthesizeSettings, UsageError, WorldClip
from support import jobs
from vmt_core import video
from vmt_core.world import Scene, grid_points, render, split, tracks

SMALL = ["--height", 48, "--width", 64, "--frames", 5, "--track-spacing", 16, "--progress-s", 1]


def rows(output):
    """The dataset as a user reads it."""
    storage = Storage()
    filesystem, path = storage.arrow(f"{output}/references")
    return ds.dataset(path, filesystem=filesystem, partitioning="hive", format="parquet").to_table().to_pylist()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """40 clips."""
    output = tmp_path_factory.mktemp("world") / "out"
    code, text = jobs.run("synthesize", "--count", 40, "--seed", 0, "--output", output, *SMALL)
    assert code == 0, text
    return output, text


def test_every_seed_is_one_row_and_one_video_that_its_row_describes(made):
    output, text = made
    found = rows(output)
    assert sorted(row["seed"] for row in found) == list(range(40))
    assert len({row["clip_id"] for row in found}) == 40
    assert len(list((output / "videos").rglob("*.mp4"))) == 40
    for row in found[::7]:
        clip = WorldClip.model_validate({name: row[name] for name in WorldClip.model_fields})
        scene = Scene.model_validate_json(clip.scene)
        assert (scene.seed, scene.category, scene.motion) == (clip.seed, clip.category, clip.motion)
        assert f"split={clip.split}/{clip.clip_id}.mp4" in clip.uri
        assert split(clip.seed) == clip.split
        frames = video.read(clip.uri, height=48, width=64, frames=5, fps=12, limits=LimitSettings())
        assert (frames.float() - render(scene).float()).abs().mean() < 6  # what H.264 at crf 18 loses
        exact = tracks(scene, grid_points(48, 64, 16))
        positions = np.array(row["tracks"], np.float32).reshape(5, -1, 2)
        assert np.array_equal(positions, exact.points.numpy())
        assert np.array_equal(np.array(row["visible"]).reshape(5, -1), exact.visible.numpy())
        assert row["track_body"] == exact.body.tolist()
        assert np.array(row["camera"]).shape == (45,)
    assert "40 clips wanted, 0 done before, 40 to make now" in text
    assert "40 clips, 40 of them made" in text


def test_plan_takes_the_dataset_with_its_captions_and_categories(made, model, prompts, tmp_path):
    output, _ = made
    flags = ["--model", model, "--preset", "nano", "--height", 48, "--width", 64, "--frames", 5, "--steps", 2]
    for references, count in ((output, 40), (output / "references" / "split=test", 2)):
        code, text = jobs.here(
            "plan",
            "--references",
            references,
            "--prompts",
            prompts,
            "--methods",
            "none",
            "--output",
            tmp_path / "m",
            *flags,
        )
        assert code == 0, text
        assert f" {count} references x" in text
        planned = ds.dataset(tmp_path / "m").to_table().to_pylist()
        assert {row["category"] for row in planned} <= {"camera", "single", "multiple", "articulated"}
        assert all(" on a " in row["caption"] or " on an " in row["caption"] for row in planned)


def test_other_settings_need_another_output(made):
    output, _ = made
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthesize, "WORLD_VERSION", 0)
        with pytest.raises(UsageError, match=r"holds clips of world_version=\d+, not 0; take another folder"):
            synthesize.run(
                SynthesizeSettings(count=2, output=str(output), height=48, width=64, frames=5, track_spacing=16)
            )
    with pytest.raises(UsageError, match=r"holds clips of height=48, not 64; take another folder"):
        synthesize.run(SynthesizeSettings(count=2, output=str(output), height=64, width=64, frames=5))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--categories", "single,flying"], "'flying' is not one of camera, single, multiple, articulated"),
        (["--height", 63], "height=63 is odd, H.264 videos are even; use 64"),
        (["--count", 0], "count: Input should be greater than 0 (got '0')"),
        (["--track-spacing", "400"], "track_spacing=400 is over the shorter side"),
        (["--split", "holdout"], "split: Input should be 'all', 'train', 'val' or 'test'"),
    ],
)
def test_wrong_usage_is_one_line(tmp_path, flags, words):
    code, text = jobs.here("synthesize", "--count", 1, "--output", tmp_path / "out", *flags)
    assert code == 2
    assert words in text
    assert "Traceback" not in text


def test_seeds_of_a_split_and_categories_in_turn():
    settings = SynthesizeSettings(count=8, output="x", split="test", seed=100)
    assert seeds(settings) == [119 + 20 * index for index in range(8)]
    assert {category_of(seed, settings) for seed in seeds(settings)[:4]} == set(settings.categories)
    everything = SynthesizeSettings(count=4, output="x")
    assert {category_of(seed, everything) for seed in seeds(everything)} == set(everything.categories)
    assert {
        category_of(seed, SynthesizeSettings(count=9, output="x", categories=("single",))) for seed in range(9)
    } == {"single"}


def test_killed_on_s3_the_same_command_goes_on_and_may_ask_for_more(made, bucket):
    output = f"s3://{bucket}/world"
    command = ["--output", output, "--rows-per-block", 5, "--render.actors", 1, *SMALL]
    process = jobs.start("synthesize", "--count", 60, *command)
    storage, deadline = Storage(), time.monotonic() + 300
    while not any(name.endswith(".parquet") for name in storage.find(f"{output}/references")):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    jobs.kill(process)
    time.sleep(3)  # what its workers had under way
    before = {row["uri"]: row["seed"] for row in rows(output)}
    assert 0 < len(before) < 60
    fs, _ = storage.filesystem(output)
    stamps = {uri: fs.info(uri)["LastModified"] for uri in before}
    code, text = jobs.run("synthesize", "--count", 70, *command)
    assert code == 0, text
    assert f"70 clips wanted, {len(before)} done before, {70 - len(before)} to make now" in text
    fs.invalidate_cache()
    assert {uri: fs.info(uri)["LastModified"] for uri in before} == stamps
    found = rows(output)
    assert sorted(row["seed"] for row in found) == list(range(70))
    assert {row["uri"] for row in found} == set(storage.find(f"{output}/videos"))
    summary = json.loads(storage.read(f"{output}/run/summary.json"))
    assert (summary["wanted"], summary["left"]) == (70, 0)
    # the same seed gives the same bytes, whatever the place, the blocks and the actors
    bytes_of = {row["seed"]: row["video_sha256"] for row in found}
    assert {row["seed"]: row["video_sha256"] for row in rows(made[0])}.items() <= bytes_of.items()
