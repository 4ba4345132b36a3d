"""jobs/bench.py: everything in one command, and again."""

import csv
import json

import pytest

from support import jobs


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A tuning of a few steps."""
    tuning = {"rank": 2, "alpha": 2, "spatial": {"steps": 2}, "temporal": {"steps": 2}}
    path = tmp_path_factory.mktemp("bench") / "bench.yaml"
    path.write_text(json.dumps({"method_settings": {"follow_your_motion": {"adapter": {"tuning": tuning}}}}))
    return path


def test_a_folder_of_clips_with_prompts_is_planned_tuned_made_and_compared(model, clips, settings, tmp_path):
    table = tmp_path / "clips.csv"
    table.write_text(f"uri,caption,category,prompts\n{clips / 'line.mp4'},a red circle,single,a blue square\n")
    refused = [
        "bench",
        "--suite",
        "folder",
        "--clips",
        tmp_path / "clip.csv",
        "--model",
        model,
        "--output",
        tmp_path / "out",
    ]
    code, text = jobs.here(*refused)  # a typo, which leaves nothing that the right command would stumble over
    assert code == 2, text
    command = [
        "bench", "--suite", "folder", "--clips", table, "--model", model, "--preset", "nano", "--settings", settings,
        "--height", 64, "--width", 64, "--frames", 9, "--steps", 2, "--methods", "none,follow_your_motion",
        "--output", tmp_path / "out", "--measure.actors", 1,
    ]  # fmt: skip
    code, text = jobs.run(*command)
    assert code == 0, text
    table = list(csv.DictReader((tmp_path / "out" / "comparison.csv").open()))
    assert [line["method"] for line in table] == ["none", "follow_your_motion"]
    assert {line["category"] for line in table} == {"all"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h2>Methods</h2>" in page and "<svg" in page
    assert "<h2>Adapters (1)</h2>" in page and "Loss of the temporal stage" in page
    baseline, tuned = (page.index(f"videos/method={method}") for method in ("none", "follow_your_motion"))
    assert baseline < tuned  # what others are compared to is first
    assert "videos/method=none" in page and "../videos" not in page
    code, text = jobs.here(*command)
    assert code == 0
    assert "nothing was left to make" in text and "0 to measure now" in text
    code, text = jobs.here(*command, "--fps", 6)
    assert code == 2
    assert "holds a benchmark with another fps; take another folder" in text
