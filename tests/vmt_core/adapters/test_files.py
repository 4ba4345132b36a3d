"""The folder of an adapter."""

import pytest
import torch

from vmt_core.adapters import files, masked_lora

ABOUT = {"method": "follow_your_motion", "model_revision": "r1"}


@pytest.fixture
def adapter(wan, heads, tmp_path):
    for stage, group, seed in (("spatial", heads, 0), ("temporal", ~heads, 1)):
        masked_lora.add(wan.transformer, stage, group, rank=2, alpha=4, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        weights = {
            name: value if "lora_A" in name else torch.randn(value.shape, generator=generator)
            for name, value in masked_lora.state(wan.transformer, stage).items()
        }
        masked_lora.write(weights, tmp_path / files.name(stage), rank=2, alpha=4, about={**ABOUT, "stage": stage})
    return tmp_path


def test_an_adapter_comes_back(adapter):
    found = files.load(adapter, method="follow_your_motion", model_revision="r1")
    assert set(found) == {"spatial", "temporal"}


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"method": "det"}, "its method is 'follow_your_motion', wanted is 'det'"),
        ({"model_revision": "r2"}, "its model_revision is 'r1', wanted is 'r2'"),
    ],
)
def test_another_methods_or_models_adapter_is_refused(adapter, wanted, words):
    with pytest.raises(ValueError, match=words):
        files.load(adapter, **(ABOUT | wanted))


def test_a_missing_or_swapped_file_is_refused(adapter):
    (adapter / "spatial.safetensors").rename(adapter / "kept")
    with pytest.raises(ValueError, match=r"spatial\.safetensors: missing"):
        files.load(adapter, **ABOUT)
    (adapter / "spatial.safetensors").write_bytes((adapter / "temporal.safetensors").read_bytes())
    with pytest.raises(ValueError, match="its stage is 'temporal', wanted is 'spatial'"):
        files.load(adapter, **ABOUT)


@pytest.mark.parametrize(("options", "scale"), [({}, 1.0), ({"spatial_scale": 0.5}, 0.5), ({"spatial_scale": 0}, 0)])
def test_a_merged_file_does_what_both_adapters_do(adapter, wan, fresh, options, scale):
    parts = files.load(adapter, **ABOUT)
    merged, *_ = files.export(adapter, "merged", **options)
    masked_lora.attach(fresh.transformer, "merged", masked_lora.read(merged)[0])
    masked_lora.use(fresh.transformer, {"merged": 1.0})
    for stage, weights in parts.items():
        masked_lora.attach(wan.transformer, stage, weights)
    masked_lora.use(wan.transformer, {"spatial": scale, "temporal": 1.0})
    latents, timestep = torch.randn(1, 16, 3, 6, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500.0])
    text = wan.pad([wan.caption("a red ball")])
    two, one = (model.velocity(latents, timestep, text) for model in (wan, fresh))
    assert torch.allclose(two, one, atol=1e-4)
    masked_lora.use(wan.transformer, {})
    assert not torch.allclose(two, wan.velocity(latents, timestep, text), atol=1e-2)


def test_comfyui_has_a_file_for_each_stage(adapter):
    assert [path.name for path in files.export(adapter, "comfyui")] == ["spatial.safetensors", "temporal.safetensors"]


def test_an_unknown_format_is_refused(adapter):
    with pytest.raises(ValueError, match="export 'kohya' is not one of comfyui, merged"):
        files.export(adapter, "kohya")
