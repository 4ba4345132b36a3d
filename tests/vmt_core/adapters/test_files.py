"""The folder of an adapter."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

from vmt_core import METHODS, MotionTransfer, Sampling
from vmt_core.adapters import files, masked_lora
from vmt_core.backbone.sampler import noise
from vmt_core.transfer import Artifact

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


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_a_plain_pipeline_makes_the_same_video_with_the_files(adapter, wan, folder, scale):
    shape, steps, shift = (16, 3, 6, 8), 3, 3.0
    method = METHODS["follow_your_motion"](preset="nano", adapter={"spatial_scale": scale})
    ours = MotionTransfer(wan, method, Sampling(steps, shift, 4.0), files.load(adapter, **ABOUT))
    artifact = Artifact(torch.zeros(shape), wan.caption(""))
    (frames,) = ours.transfer(artifact, ["a red ball"], [5])

    pipeline = WanPipeline.from_pretrained(folder)
    for stage in files.STAGES:
        pipeline.load_lora_weights(adapter, weight_name=files.name(stage), adapter_name=stage)
    pipeline.set_adapters(list(files.STAGES), [scale, 1.0])
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    own = pipeline.scheduler.set_timesteps
    sigmas = np.linspace(1, 0, steps + 1)[:-1]  # Wan's; left alone, diffusers shifts the last one twice
    pipeline.scheduler.set_timesteps = lambda _steps, device=None, **_: own(sigmas=sigmas, device=device)

    def made():
        latents = noise(5, shape)[0].unsqueeze(0)
        video = pipeline(
            prompt="a red ball", negative_prompt="", height=48, width=64, num_frames=9, num_inference_steps=steps,
            guidance_scale=4.0, latents=latents, output_type="pt",
        ).frames[0]  # fmt: skip
        return 255 * video

    assert (made() - frames).abs().max() < 1
    pipeline.disable_lora()
    assert (made() - frames).abs().mean() > 5
