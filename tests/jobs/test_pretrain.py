"""jobs/pretrain.py, a few steps of it: through Ray Train, resumed, with two workers, to a model that transfers motion."""

import json
import os
import re
from pathlib import Path

import pytest
from diffusers import WanPipeline

from support import jobs

FEW = [
    "--steps-scale",
    "0.001",
    "--threads",
    1,
    "--no-compile",
    "--validation-clips",
    1,
]  # 1 + 1 + 1 steps of the autoencoder


def steps(folder):
    """Every step that is in the logs, in order."""
    lines = [
        json.loads(line) for file in sorted(folder.glob("steps-*.jsonl")) for line in file.read_text().splitlines()
    ]
    return [line["step"] for line in lines]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An autoencoder after its few steps, in two runs."""
    output = Path(os.path.relpath(tmp_path_factory.mktemp("pretrain") / "out"))  # workers have another directory
    code, text = jobs.run("pretrain", "--stage", "vae", "--output", output, "--minutes", "0.0001", *FEW)
    assert code == 0, text
    assert "vae: step 1, " in text
    code, text = jobs.run("pretrain", "--stage", "vae", "--output", output, "--resume", *FEW)
    assert code == 0, text
    assert re.search(r"vae: step 3, .* in this run", text)
    assert "psnr_17" in text
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


def test_the_transformer_becomes_a_model_that_plan_takes(trained, clips, prompts, tmp_path):
    code, text = jobs.run(
        "pretrain", "--stage", "dit", "--output", trained, "--minutes", "0.0001", "--cache", tmp_path / "latents", *FEW
    )
    assert code == 0, text
    assert "dit: step 1, " in text
    assert WanPipeline.from_pretrained(trained / "wan-nano").transformer.config.num_layers == 8
    code, text = jobs.here(
        "plan", "--references", clips, "--prompts", prompts, "--model", trained / "wan-nano", "--preset", "nano",
        "--height", 64, "--width", 64, "--frames", 9, "--output", tmp_path / "manifest",
    )  # fmt: skip
    assert code == 0, text


def test_an_autoencoder_is_trained_on_and_a_transformer_follows_it(tmp_path):
    output = tmp_path / "out"
    code, text = jobs.run("pretrain", "--stage", "vae", "--start", "wan-nano", "--output", output, *FEW)
    assert code == 0, text
    assert float(re.search(r"psnr_17 ([\d.]+)", text)[1]) > 20  # random weights reach 10 at most
    trained = json.loads((output / "vae" / "weights" / "config.json").read_text())
    assert trained["_name_or_path"] == ""
    code, text = jobs.run(
        "pretrain", "--stage", "dit", "--start", "wan-nano", "--output", output, "--cache", tmp_path / "latents", *FEW
    )
    assert code == 0, text
    made = WanPipeline.from_pretrained(output / "wan-nano").vae.config
    assert made.latents_std == trained["latents_std"]  # of the autoencoder in out, not of the one in wan-nano


def test_two_workers_train_together_on_s3(bucket):
    output = f"s3://{bucket}/out"
    code, text = jobs.run("pretrain", "--stage", "vae", "--output", output, "--workers", 2, *FEW)
    assert code == 0, text
    assert "vae: step 3, " in text
