"""jobs/pretrain.py, a few steps of it: through Ray Train, resumed, with two workers, to a model that transfers motion."""

import json
import os
import re
from pathlib import Path

import pytest
from diffusers import WanPipeline

from support import jobs

FEW = ["--steps-scale", "0.005", "--threads", 1, "--no-compile", "--validation-clips", 1]  # 3 steps of a last phase


def steps(folder):
    """Every step that is in the logs, in order."""
    lines = [
        json.loads(line) for file in sorted(folder.glob("steps-*.jsonl")) for line in file.read_text().splitlines()
    ]
    return [line["step"] for line in lines]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """wan-nano's autoencoder, trained on for a few steps in two runs."""
    output = Path(os.path.relpath(tmp_path_factory.mktemp("pretrain") / "out"))  # workers have another directory
    code, text = jobs.run(
        "pretrain", "--stage", "vae", "--start", "wan-nano", "--output", output, "--minutes", "0.0001", *FEW
    )
    assert code == 0, text
    assert "vae: step 1, " in text
    code, text = jobs.run("pretrain", "--stage", "vae", "--start", "wan-nano", "--output", output, "--resume", *FEW)
    assert code == 0, text
    assert re.search(r"vae: step 3, .* in this run", text)
    assert float(re.search(r"psnr_17 ([\d.]+)", text)[1]) > 20  # random weights reach 10 at most
    return output


def test_a_resumed_run_goes_on_where_the_first_stopped_and_logs_every_step(trained):
    assert steps(trained / "vae" / "logs") == [1, 2, 3]
    assert list((trained / "vae" / "logs").glob("events.out.tfevents.*"))
    assert json.loads((trained / "vae" / "weights" / "config.json").read_text())["latents_std"] != [1.0] * 16


def test_a_second_run_without_resume_is_refused(trained):
    code, text = jobs.here("pretrain", "--stage", "vae", "--output", trained, *FEW)
    assert code == 2
    assert "holds a run of this stage; --resume goes on" in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--stage", "dit"], "has no trained autoencoder; run --stage vae first"),
        (["--stage", "vae", "--resume"], "has no checkpoint of stage vae to --resume"),
        (["--stage", "dit", "--start", "nowhere"], "--start nowhere: no such folder"),
        (["--stage", "both"], "stage: Input should be 'vae', 'dit' or 'decoder'"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_a_line(tmp_path, flags, words):
    code, text = jobs.here("pretrain", "--output", tmp_path / "out", *flags)
    assert code == 2
    assert words in text
    assert "Traceback" not in text


def test_a_transformer_follows_the_autoencoder_and_becomes_a_model_that_plan_takes(trained, clips, prompts, tmp_path):
    code, text = jobs.run(
        "pretrain", "--stage", "dit", "--start", "wan-nano", "--output", trained, "--minutes", "0.0001", "--cache", tmp_path / "latents",
        *FEW,
    )  # fmt: skip
    assert code == 0, text
    assert "dit: step 1, " in text
    made, before = (
        WanPipeline.from_pretrained(trained / "wan-nano"),
        json.loads((trained / "vae" / "weights" / "config.json").read_text()),
    )
    assert made.transformer.config.num_layers == 8
    assert made.vae.config.latents_std == before["latents_std"]  # of the autoencoder in out, not of the one in wan-nano
    assert before["_name_or_path"] == ""
    code, text = jobs.here(
        "plan", "--references", clips, "--prompts", prompts, "--model", trained / "wan-nano", "--preset", "nano",
        "--height", 64, "--width", 64, "--frames", 9, "--output", tmp_path / "manifest",
    )  # fmt: skip
    assert code == 0, text


def test_two_workers_train_together_on_s3(bucket):
    output = f"s3://{bucket}/out"
    code, text = jobs.run(
        "pretrain", "--stage", "vae", "--output", output, "--workers", 2, *FEW, "--steps-scale", "0.001"
    )
    assert code == 0, text
    assert "vae: step 3, " in text  # one of each phase
