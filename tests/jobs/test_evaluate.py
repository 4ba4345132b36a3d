"""jobs/evaluate.py on a small run."""

import base64
import csv
import hashlib
import json
import os
import shutil

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
    """A run of 2 procedural clips x 1 prompt x 2 methods."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "world").mkdir()
    for seed in (19, 39):
        scene = sample(seed, motion="line", frames=9, height=64, width=64)
        tags = {"scene": scene.model_dump_json()}  # as synthesize writes it: the exact motion
        video.write(folder / "world" / f"{seed}.mp4", render(scene), scene.fps, tags=tags)
    (folder / "prompts.txt").write_text("a red circle\n")
    code, text = jobs.here(
        "plan", "--references", folder / "world", "--prompts", folder / "prompts.txt", "--methods", "none,fastvmt", "--model", model,
        "--preset", "nano", "--height", 64, "--width", 64, "--frames", 9, "--steps", 2, "--output", folder / "manifest",
    )  # fmt: skip
    assert code == 0, text
    code, text = jobs.run("transfer", "--manifest", folder / "manifest", "--model", model, "--output", folder / "out")
    assert code == 0, text
    return folder / "out"


def rows(output, **models):
    folder = measure.folder_of(EvaluateSettings(run=["x"], output=str(output), **models))
    return [MetricRow.model_validate(row) for row in pq.read_table(folder, partitioning=None).to_pylist()]


def test_every_video_is_measured_once_against_exact_motion(run, tmp_path):
    code, text = jobs.run("evaluate", "--run", run, "--output", tmp_path / "eval", "--measure.actors", 1)
    assert code == 0, text
    assert "4 results, 0 measured before, 4 to measure now" in text
    assert "text_similarity: not measured (no CLIP was given)" in text
    found = rows(tmp_path / "eval")
    assert len(found) == 4
    assert pq.read_table(tmp_path / "eval" / "metrics").num_rows == 4  # its folders' names are columns, too
    assert all({"model_revision", "video_version"} <= set(json.loads(row.sampling)) for row in found)
    assert all(row.exact and row.status == "ok" and row.smoothness is not None for row in found)
    assert all(row.text_similarity is None for row in found)
    table = list(csv.DictReader((tmp_path / "eval" / "categories.csv").open()))
    assert [line["method"] for line in table if line["category"] == "all"] == ["none", "fastvmt"]
    assert all(len(base64.b64decode(row.tracks)) == len(base64.b64decode(row.reference_tracks)) > 0 for row in found)
    page = (tmp_path / "eval" / "report.html").read_text()
    assert "<h2>Methods</h2>" in page and found[0].sample_id in page and found[0].tracks in page
    for name in ("comparison.md", "comparison.tex", "comparison.parquet", "paper.md", "run/summary.json"):
        assert (tmp_path / "eval" / name).stat().st_size
    code, text = jobs.here("evaluate", "--run", run, "--output", tmp_path / "eval")
    assert code == 0
    assert "4 measured before, 0 to measure now" in text


def test_a_run_without_results_is_refused(tmp_path):
    code, text = jobs.here("evaluate", "--run", tmp_path, "--output", tmp_path / "eval")
    assert code == 2
    assert f"--run {tmp_path}: has no results; make some with jobs/transfer.py" in text


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


def test_missing_truncated_and_deadly_videos_are_counted_and_the_rest_goes_on(run, tmp_path):
    shutil.copytree(run, tmp_path / "out")
    for path in (tmp_path / "out" / "results").rglob("*.parquet"):
        table = pq.read_table(path, partitioning=None)
        uris = [uri.replace(str(run), str(tmp_path / "out")) for uri in table["video_uri"].to_pylist()]
        table = table.set_column(table.schema.get_field_index("video_uri"), "video_uri", [uris])
        pq.write_table(table, path)
    missing, truncated = sorted((tmp_path / "out" / "videos" / "method=none").glob("*.mp4"))
    missing.unlink()
    truncated.write_bytes(truncated.read_bytes()[:200])
    deadly, sound = sorted((tmp_path / "out" / "videos" / "method=fastvmt").glob("*.mp4"))
    (tmp_path / "code" / "cotracker").mkdir(parents=True)
    (tmp_path / "code" / "cotracker" / "predictor.py").write_text(KILLER)
    weights = str(tmp_path / "weights.safetensors")
    save_file({"weight": torch.zeros(1, 1)}, weights)
    frames = video.read(deadly, height=64, width=64, frames=9, fps=video.probe(deadly, LimitSettings()).fps)
    environment = {
        "PYTHONPATH": os.pathsep.join([str(jobs.ROOT), str(tmp_path / "code")]),
        "VMT_TEST_DEADLY": hashlib.sha256(frames.numpy().tobytes()).hexdigest(),
    }
    code, text = jobs.run(
        "evaluate", "--run", tmp_path / "out", "--output", tmp_path / "eval", "--measure.actors", 1, "--cotracker", weights,
        env=environment,
    )  # fmt: skip
    assert code == 3, text
    assert {row.sample_id: row.error_code for row in rows(tmp_path / "eval", cotracker=weights)} == {
        missing.stem: "reference_missing",
        truncated.stem: "no_video_stream",
        deadly.stem: "crashed",
        sound.stem: None,
    }
    assert "3 without metrics" in text and "crashed 1" in text
    summary = json.loads((tmp_path / "eval" / "run" / "summary.json").read_text())
    assert (summary["results"], summary["measured"], summary["failed"]) == (4, 1, 3)
