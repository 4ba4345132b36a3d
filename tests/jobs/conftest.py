"""A tiny model that the jobs run for real, and clips to run it on."""

import pytest

from support import tiny
from support.clips import clip


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    return str(tiny.build(path, layers=8))  # as many as preset "nano" counts on


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """A folder of two clips of 9 frames."""
    path = tmp_path_factory.mktemp("clips")
    clip(path / "line.mp4", frames=9, motion="line")
    clip(path / "pan.mp4", frames=9, motion="pan")
    return path


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red ball\n\na yellow star at night\n")
    return path


@pytest.fixture(scope="session")
def small(model):
    """Flags of a plan that the tiny model runs in a second."""
    return ["--model", model, "--preset", "nano", "--height", 64, "--width", 64, "--frames", 9, "--steps", 3]
