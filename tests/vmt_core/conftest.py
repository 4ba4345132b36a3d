"""A tiny random Wan, built once."""

import pytest
import torch

from support import tiny as models
from vmt_core import Backbone


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A Wan of 3 blocks in diffusers layout."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    return models.build(path)


@pytest.fixture(scope="session")
def tiny(folder):
    """The tiny Wan in fp32."""
    return Backbone.load(str(folder), dtype=torch.float32)


@pytest.fixture
def wan(folder):
    """The tiny Wan in fp32, for a test that adds adapters to it."""
    return Backbone.load(str(folder), dtype=torch.float32)


@pytest.fixture(scope="session")
def tiny_bf16(folder):
    return Backbone.load(str(folder), dtype=torch.bfloat16)
