"""The folder of an adapter."""

import pytest
import torch

from vmt_core.adapters import files, masked_lora

ABOUT = {"method": "follow_your_motion", "model_revision": "r1"}


@pytest.fixture
def folder(wan, heads, tmp_path):
    for stage, group, seed in (("spatial", heads, 0), ("temporal", ~heads, 1)):
        masked_lora.add(wan.transformer, stage, group, rank=2, alpha=4, seed=seed)
        weights = masked_lora.state(wan.transformer, stage)
        masked_lora.write(weights, tmp_path / files.name(stage), rank=2, alpha=4, about={**ABOUT, "stage": stage})
    return tmp_path


def test_an_adapter_comes_back(folder):
    found = files.load(folder, method="follow_your_motion", model_revision="r1")
    assert set(found) == {"spatial", "temporal"}


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"method": "det"}, "its method is 'follow_your_motion', wanted is 'det'"),
        ({"model_revision": "r2"}, "its model_revision is 'r1', wanted is 'r2'"),
    ],
)
def test_another_methods_or_models_adapter_is_refused(folder, wanted, words):
    with pytest.raises(ValueError, match=words):
        files.load(folder, **(ABOUT | wanted))


def test_a_missing_or_swapped_file_is_refused(folder):
    (folder / "spatial.safetensors").rename(folder / "kept")
    with pytest.raises(ValueError, match=r"spatial\.safetensors: missing"):
        files.load(folder, **ABOUT)
    (folder / "spatial.safetensors").write_bytes((folder / "temporal.safetensors").read_bytes())
    with pytest.raises(ValueError, match="its stage is 'temporal', wanted is 'spatial'"):
        files.load(folder, **ABOUT)


def test_exports_are_the_same_adapter(folder):
    merged, *_ = files.export(folder, "merged", spatial_scale=0.5)
    weights, _ = masked_lora.read(merged)
    parts = files.load(folder, **ABOUT)
    place = "blocks.0.attn1.to_q"
    product = sum(
        scale * parts[stage][f"{place}.lora_B.weight"] @ parts[stage][f"{place}.lora_A.weight"]
        for stage, scale in (("spatial", 0.5), ("temporal", 1.0))
    )
    assert torch.allclose(weights[f"{place}.lora_B.weight"] @ weights[f"{place}.lora_A.weight"], product, atol=1e-6)
    assert [path.name for path in files.export(folder, "comfyui")] == ["spatial.safetensors", "temporal.safetensors"]


def test_an_unknown_format_is_refused(folder):
    with pytest.raises(ValueError, match="export 'kohya' is not one of comfyui, merged"):
        files.export(folder, "kohya")
