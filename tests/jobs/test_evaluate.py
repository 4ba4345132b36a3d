"""jobs/evaluate.py on a small run."""

import base64
import csv
import hashlib
import json
import os

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from pipelines import measure
from schemas import EvaluateSettings, LimitSettings, MetricRow
from support import jobs
from vmt_core import video
from vmt_core.world import render, sample


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """A run of 2 procedural clips x 2 seeds x 2 methods."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "world").mkdir()
    for seed in (19, 39):
        scene = sample(seed, motion="line", frames=9, height=64, width=64)
        tags = {"scene": scene.model_dump_json()}  # as synthesize writes it: the exact motion
        video.write(folder / "world" / f"{seed}.mp4", render(scene), scene.fps, tags=tags)
    (folder / "prompts.txt").write_text("a red circle\n")
    code, text = jobs.here(
        "plan", "--references", folder / "world", "--prompts", folder / "prompts.txt", "--methods", "none,fastvmt", "--seeds", "0,1",
        "--model", model, "--preset", "nano", "--height", 64, "--width", 64, "--frames", 9, "--steps", 2, "--output", folder / "manifest",
    )  # fmt: skip
    assert code == 0, text
    code, text = jobs.run("transfer", "--manifest", folder / "manifest", "--model", model, "--output", folder / "out")
    assert code == 0, text
    return folder / "out"


def rows(output, **models):
    folder = measure.folder_of(EvaluateSettings(run=["x"], output=str(output), **models))
    return [MetricRow.model_validate(row) for row in pq.read_table(folder, partitioning=None).to_pylist()]


KILLER = """
import hashlib
import os
import torch

class CoTrackerPredictor(torch.nn.Module):
    # One video takes its process down, every time.

    def __init__(self, checkpoint, window_len):
        super().__init__()
        self.model = torch.nn.Linear(1, 1, bias=False)

    def forward(self, video, grid_size):
        if hashlib.sha256(video.byte().numpy().tobytes()).hexdigest() == os.environ["VMT_TEST_DEADLY"]:
            os._exit(1)
        return torch.zeros(1, video.shape[1], grid_size**2, 2), None
"""


def test_sound_videos_are_measured_against_exact_motion_and_missing_truncated_and_deadly_ones_are_counted(
    run, tmp_path
):
    missing, truncated, *_ = sorted((run / "videos" / "method=none").glob("*.mp4"))
    missing.unlink()
    truncated.write_bytes(truncated.read_bytes()[:200])
    deadly, *_ = sorted((run / "videos" / "method=fastvmt").glob("*.mp4"))
    (tmp_path / "code" / "cotracker").mkdir(parents=True)
    (tmp_path / "code" / "cotracker" / "predictor.py").write_text(KILLER)
    weights = str(tmp_path / "weights.safetensors")
    save_file({"weight": torch.zeros(1, 1)}, weights)
    frames = video.read(deadly, height=64, width=64, frames=9, fps=video.probe(deadly, LimitSettings()).fps)
    environment = {
        "PYTHONPATH": os.pathsep.join([str(jobs.ROOT), str(tmp_path / "code")]),
        "VMT_TEST_DEADLY": hashlib.sha256(frames.numpy().tobytes()).hexdigest(),
    }
    command = ["evaluate", "--run", run, "--output", tmp_path / "eval", "--measure.actors", 1, "--cotracker", weights]
    code, text = jobs.run(*command, env=environment)
    assert code == 3, text
    assert "8 results, 0 measured before, 8 to measure now" in text
    assert "text_similarity: not measured (no CLIP was given)" in text
    assert "3 without metrics" in text and "crashed 1" in text
    summary = json.loads((tmp_path / "eval" / "run" / "summary.json").read_text())
    assert (summary["results"], summary["measured"], summary["failed"]) == (8, 5, 3)
    found = rows(tmp_path / "eval", cotracker=weights)
    assert {row.sample_id: row.error_code for row in found if row.status == "failed"} == {
        missing.stem: "reference_missing",
        truncated.stem: "no_video_stream",
        deadly.stem: "crashed",
    }
    assert len(found) == 8
    assert pq.read_table(tmp_path / "eval" / "metrics").num_rows == 8  # its folders' names are columns, too
    assert all({"model_revision", "video_version"} <= set(json.loads(row.sampling)) for row in found)
    sound = [row for row in found if row.status == "ok"]
    assert all(row.exact and row.smoothness is not None and row.text_similarity is None for row in sound)
    assert all(len(base64.b64decode(row.tracks)) == len(base64.b64decode(row.reference_tracks)) > 0 for row in sound)
    table = list(csv.DictReader((tmp_path / "eval" / "categories.csv").open()))
    assert [line["method"] for line in table if line["category"] == "all"] == ["none", "fastvmt"]
    page = (tmp_path / "eval" / "report.html").read_text()
    assert "<h2>Methods</h2>" in page and sound[0].sample_id in page and sound[0].tracks in page
    assert "crashed: " in page  # beside the video, which is there
    for name in ("comparison.md", "comparison.tex", "comparison.parquet", "paper.md", "run/summary.json"):
        assert (tmp_path / "eval" / name).stat().st_size


def test_a_run_without_results_is_refused(tmp_path):
    code, text = jobs.here("evaluate", "--run", tmp_path, "--output", tmp_path / "eval")
    assert code == 2
    assert f"--run {tmp_path}: has no results; make some with jobs/transfer.py" in text
