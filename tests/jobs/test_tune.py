"""jobs/tune.py and transfers with what it makes, on a tiny model."""

import json
import os
import shutil
import signal
import time

import psutil
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from pipelines import tune
from pipelines.storage import Storage
from schemas import ErrorCode
from support import jobs
from support.clips import clip

STEPS = 24
EAGER = ["--training.checkpoint-seconds", 0.5, "--training.at-once", 1]
QUICK = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}  # Ray takes a checkpoint only then


def flags(model, references, output, steps=STEPS, **tuning):
    """Command line of a tuning of a few steps."""
    settings = {
        "rank": 4, "alpha": 4, "spatial": {"steps": steps, "validate_every": 12}, "temporal": {"steps": steps, "validate_every": 12},
    } | tuning  # fmt: skip
    return [
        "--references", references, "--output", output, "--model", model, "--preset", "nano", "--height", 64, "--width", 64,
        "--frames", 9, "--tuning", json.dumps(settings), "--progress-s", 1, "--training.deepspeed.bf16",  # as on GPUs
    ]  # fmt: skip


@pytest.fixture(scope="module")
def captioned(clips):
    """A table of the two clips, with captions."""
    table = clips / "references.csv"
    table.write_text("uri,caption,category\nline.mp4,a red circle,single\npan.mp4,a blue square,camera\n")
    return table


@pytest.fixture(scope="module")
def tuned(model, captioned, tmp_path_factory):
    """OUT of a run over both, and what it printed. Places are relative: workers have another directory."""
    output = tmp_path_factory.mktemp("tune") / "out"
    code, text = jobs.run(
        "tune",
        *flags(os.path.relpath(model), os.path.relpath(captioned), os.path.relpath(output)),
        "--training.export",
        "comfyui,merged",
        "--training.sample-every",
        STEPS,
    )
    assert code == 0, text
    return output, text


def rows(output):
    return list(tune.index(Storage(), str(output)).values())


def test_every_reference_has_an_adapter_and_a_row(tuned):
    output, text = tuned
    assert "2 adapters, 0 failed, 0 left" in text
    assert f"estimate: {4 * STEPS} steps" in text
    found = rows(output)
    assert {row.status for row in found} == {"ok"}
    assert {row.category for row in found} == {"single", "camera"}
    for row in found:
        assert (row.spatial_steps, row.temporal_steps, row.workers) == (STEPS, STEPS, 1)
        folder = output / "adapters" / "method=follow_your_motion" / row.adapter_id
        assert row.folder == str(folder)
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert {
            "spatial.safetensors", "temporal.safetensors", "head_types.json", "heads.png", "tuning.json", "merged.safetensors",
            "comfyui/spatial.safetensors", "comfyui/temporal.safetensors",
        } <= names  # fmt: skip
        assert list((output / "run" / "tensorboard" / row.adapter_id).glob("events.*"))
        samples = sorted(path.name for path in (output / "run" / "samples" / row.adapter_id).iterdir())
        assert samples == [f"spatial-{STEPS:06d}.mp4", f"temporal-{STEPS:06d}.mp4"]
        about = json.loads((folder / "tuning.json").read_text())
        assert [point[0] for point in about["spatial"]["curve"]] == list(range(1, STEPS + 1))
    assert not [path for path in (output / "run" / "training").rglob("*") if path.is_file()]


def test_a_second_run_makes_nothing(tuned, model, captioned):
    output, _ = tuned
    code, text = jobs.here("tune", *flags(model, captioned, output))
    assert code == 0
    assert "2 done before, 0 to tune now" in text


def test_a_dry_run_says_what_it_would_cost_and_makes_nothing(model, captioned, tmp_path):
    code, text = jobs.here("tune", *flags(model, captioned, tmp_path / "out"), "--dry-run")
    assert code == 0
    assert "2 to tune now" in text and "FLOPs" in text and "of one GPU at" in text and "M trained weights" in text
    assert not (tmp_path / "out").exists()


def test_bad_references_and_trainings_that_break_are_failed_rows_that_say_why(model, clips, tmp_path):
    clip(tmp_path / "short.mp4", frames=3)
    (tmp_path / "text.mp4").write_text("no video\n" * 20)
    table, good = tmp_path / "references.csv", clips / "line.mp4"
    table.write_text(f"uri,caption\nshort.mp4,a red circle\ntext.mp4,a red circle\n{good},\n{good},a red circle\n")
    command = flags(model, table, tmp_path / "out", spatial={"steps": 9, "learning_rate": 1e30, "warmup": 0})
    code, text = jobs.run("tune", *command)
    assert code == 3, text
    assert "0 adapters, 4 failed, 0 left" in text
    codes = sorted(str(row.error_code) for row in rows(tmp_path / "out"))
    assert codes == ["caption_empty", "non_finite", "not_a_video", "too_few_frames"]
    assert "has no caption; give one in a references table" in text
    code, text = jobs.here("tune", *command)
    assert code == 3
    assert "4 done before, 0 to tune now" in text


def test_a_training_that_hangs_is_ended(tuned, model, captioned, tmp_path):
    shutil.copytree(tuned[0] / "prepared", tmp_path / "out" / "prepared")  # which has the same limit
    limits = ["--limits.row-seconds", 0.001, "--training.attempts", 1, "--limit", 1]
    code, text = jobs.run("tune", *flags(model, captioned, tmp_path / "out"), *limits)
    assert code == 3, text
    (row,) = rows(tmp_path / "out")
    assert row.error_code == "crashed"
    assert "hung in a step for limits.row_seconds=0.001, 1 times" in row.error_message


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--height", "100"], "height: "),
        (["--tuning", '{"rank": 0}'], "rank"),
        (["--method", "fastvmt"], "--method 'fastvmt' is not one of follow_your_motion"),
        (["--preset", "best"], "preset 'best' is not one of default, paper, code, nano"),
        (["--training.export", "kohya"], "training.export.0: Input should be 'comfyui' or 'merged'"),
        (["--tuning", '{"head_rule": "file", "head_file": "heads.json"}'], "head_file heads.json: give its whole path"),
        (["--tuning", '{"head_rule": "file", "head_file": "/nowhere.json"}'], "head_file /nowhere.json is not there"),
        (["--model", "/nowhere"], "--model"),
    ],
)
def test_what_cannot_be_tuned_is_refused_in_a_line(model, captioned, tmp_path, extra, words):
    code, text = jobs.here("tune", *flags(model, captioned, tmp_path / "out"), *extra)
    assert code == 2
    assert words in text and "Traceback" not in text
    assert not (tmp_path / "out").exists()


def plan(model, references, prompts, output, *extra):
    code, text = jobs.here(
        "plan", "--references", references, "--prompts", prompts, "--methods", "none,follow_your_motion", "--model", model,
        "--preset", "nano", "--height", 64, "--width", 64, "--frames", 9, "--steps", 2, "--output", output, *extra,
    )  # fmt: skip
    assert code == 0, text
    return text


def same_tuning(folder, **adapter):
    """A settings file by which plan wants the adapters of `flags`."""
    tuning = {
        "rank": 4,
        "alpha": 4,
        "spatial": {"steps": STEPS, "validate_every": 12},
        "temporal": {"steps": STEPS, "validate_every": 12},
    }
    path = folder / "plan.yaml"
    path.write_text(json.dumps({"method_settings": {"follow_your_motion": {"adapter": {"tuning": tuning, **adapter}}}}))
    return path


def test_videos_are_made_with_the_adapters_that_are_whole_and_the_page_shows_them(
    tuned, model, captioned, prompts, tmp_path
):
    """Of adapters with another alpha one is damaged, and the other's tuning has failed."""
    shutil.copytree(tuned[0] / "adapters", tmp_path / "adapters")
    settings = json.loads(same_tuning(tmp_path).read_text())
    sweep = {"adapter.spatial_scale": [0, 1], "adapter.tuning.alpha": [4, 3]}
    (tmp_path / "plan.yaml").write_text(json.dumps(settings | {"sweep": {"follow_your_motion": sweep}}))
    text = plan(model, captioned, prompts, tmp_path / "manifest", "--settings", tmp_path / "plan.yaml")
    assert "4 adapters are needed" in text
    whole = {row.adapter_id: row for row in rows(tuned[0])}
    lacking = {
        row["category"]: row["adapter_id"]
        for row in pq.read_table(tmp_path / "manifest").to_pylist()
        if row["adapter_id"] not in {None, *whole}
    }
    folder = tmp_path / "adapters" / "method=follow_your_motion"
    shutil.copytree(folder / next(iter(whole)), folder / lacking["single"])
    (folder / lacking["single"] / "temporal.safetensors").write_bytes(b"\x00" * 100)
    (camera,) = [row for row in whole.values() if row.category == "camera"]
    failed = {"status": "failed", "error_code": ErrorCode.NON_FINITE, "error_message": "nan at step 3"}
    tune._keep(Storage(), str(tmp_path), camera.model_copy(update=failed | {"adapter_id": lacking["camera"]}))

    code, text = jobs.run(
        "transfer", "--manifest", tmp_path / "manifest", "--model", model, "--output", tmp_path / "out",
        "--adapters", tmp_path / "adapters",
    )  # fmt: skip
    assert code == 3, text
    made = jobs.results(tmp_path / "out")
    codes = {row.category: str(row.error_code) for row in made if row.status == "failed"}
    assert codes == {"single": "adapter_unfit", "camera": "adapter_missing"}
    missing = [row.error_message for row in made if row.error_code == "adapter_missing"]
    assert missing and all(text.endswith("its tuning failed: non_finite: nan at step 3") for text in missing)
    looks = {}
    for row in [row for row in made if row.status == "ok"]:
        scale = json.loads(row.method_settings).get("adapter", {}).get("spatial_scale", "none")
        looks.setdefault((row.reference_uri, row.prompt), {})[scale] = row.video_sha256
    assert len(looks) == 4
    assert all(len(set(variants.values())) == 3 for variants in looks.values())
    page = (tmp_path / "out/run/report.html").read_text()
    assert page.count("data:image/png;base64,") == 3  # of all that have a map of heads
    assert "Loss of the temporal stage" in page


def test_transfer_says_where_adapters_come_from(tuned, model, captioned, prompts, tmp_path):
    plan(model, captioned, prompts, tmp_path / "manifest", "--settings", same_tuning(tmp_path))
    code, text = jobs.here(
        "transfer", "--manifest", tmp_path / "manifest", "--model", model, "--output", tmp_path / "out"
    )
    assert code == 2
    assert "follow_your_motion needs adapters: give --adapters OUT/adapters of jobs/tune.py, or --tune them now" in text
    code, text = jobs.here(
        "transfer", "--manifest", tmp_path / "manifest", "--model", model, "--output", tmp_path, "--method", "x"
    )
    assert code == 2
    assert "has no rows of x, only of follow_your_motion, none" in text


def test_one_command_tunes_and_transfers_on_s3_where_another_measures(model, clips, prompts, bucket, tmp_path):
    table = tmp_path / "references.csv"
    table.write_text(f"uri,caption\n{clips / 'line.mp4'},a red circle\n")
    adapter = {"tuning": {"rank": 2, "spatial": {"steps": 1, "draws": 2}, "temporal": {"steps": 1, "draws": 2}}}
    chosen = {"adapter": adapter, "guidance": {"span": 0.5}, "objective": {"block": 1}}
    settings = {"method_settings": {"follow_your_motion": chosen}}
    (tmp_path / "plan.yaml").write_text(json.dumps(settings))
    plan(model, table, prompts, f"s3://{bucket}/manifest", "--settings", tmp_path / "plan.yaml")
    command = [
        "transfer", "--manifest", f"s3://{bucket}/manifest", "--model", model, "--output", f"s3://{bucket}/out", "--tune",
        "--training.workers-per-reference", 2, "--training.deepspeed.zero", 2, "--training.threads", 1,
    ]  # fmt: skip
    code, text = jobs.here(*command, "--training.workers-per-reference", 3)
    assert code == 2, text
    assert "2 draws a step cannot be shared evenly by 3 workers; set spatial.draws to a multiple of 3" in text
    code, text = jobs.run(*command)
    assert code == 0, text
    assert "1 adapters, 0 failed, 0 left" in text
    (tuned,) = tune.index(Storage(), f"s3://{bucket}/out").values()
    assert (tuned.workers, tuned.spatial_steps, tuned.temporal_steps) == (2, 1, 1)
    made = jobs.results(f"s3://{bucket}/out")
    assert {row.status for row in made} == {"ok"} and len(made) == 4
    assert {row.evaluations for row in made if row.method == "follow_your_motion"} == {4}  # tuned and guided

    command = ["evaluate", "--run", f"s3://{bucket}/out", "--output", f"s3://{bucket}/evaluation"]
    code, text = jobs.run(*command)
    assert code == 0, text
    assert "4 results, 0 measured before, 4 to measure now" in text
    page = Storage().read(f"s3://{bucket}/evaluation/report.html").decode()
    assert all(f"../out/videos/method={row.method}/{row.sample_id}.mp4" in page.replace("%3D", "=") for row in made)
    code, text = jobs.here(*command)
    assert code == 0, text
    assert "4 results, 4 measured before, 0 to measure now" in text


def weights(output):
    """Weights of every adapter, by id and stage."""
    folder = output / "adapters" / "method=follow_your_motion"
    return {(path.parent.name, path.stem): load_file(path) for path in folder.glob("*/*al.safetensors")}


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for key, tensors in wanted.items():
        for name, value in tensors.items():
            assert abs(found[key][name] - value).max() < 1e-6, (key, name)


def until(condition, seconds=300):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def checkpoints(output):
    return list((output / "run" / "training").rglob("progress.json"))


def test_killed_workers_and_a_killed_driver_go_on_and_nothing_finished_is_repeated(model, captioned, tuned, tmp_path):
    """A worker dies in the first training, everything in the second; the adapters are those of an undisturbed run."""
    output = tmp_path / "out"
    process = jobs.start("tune", *flags(model, captioned, output), *EAGER, env=QUICK)
    until(lambda: checkpoints(output))
    workers = [
        one
        for one in psutil.Process(process.pid).children(recursive=True)
        if "RayTrainWorker" in " ".join(one.cmdline())
    ]
    assert workers
    for one in workers:
        os.kill(one.pid, signal.SIGKILL)
    until(lambda: len(rows(output)) == 1 and checkpoints(output))
    jobs.kill(process)
    (first,) = rows(output)
    assert first.status == "ok", first.error_message
    before = {path: path.stat().st_mtime_ns for path in (output / "adapters").rglob("*.safetensors")}
    code, text = jobs.run("tune", *flags(model, captioned, output), *EAGER, env=QUICK)
    assert code == 0, text
    assert "1 done before, 1 to tune now" in text
    assert all(path.stat().st_mtime_ns == moment for path, moment in before.items() if first.adapter_id in str(path))
    same(weights(output), weights(tuned[0]))
