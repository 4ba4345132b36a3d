"""A tiny random Wan, built once."""

import pytest
import torch

from vmt_core import Backbone
from vmt_core.backbone import nano


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A Wan of 3 blocks in diffusers layout."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    nano.build(path, layers=3, heads=2, head_dim=24)
    return path


@pytest.fixture(scope="session")
def tiny(folder):
    """The tiny Wan in fp32."""
    return Backbone.load(str(folder), dtype=torch.float32)


@pytest.fixture(scope="session")
def tiny_bf16(folder):
    return Backbone.load(str(folder), dtype=torch.bfloat16)
