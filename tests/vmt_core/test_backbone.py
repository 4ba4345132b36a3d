"""Loading a Wan, pixels and latents."""

import json
import os
import shutil

import pytest
import torch
from diffusers import WanPipeline

from vmt_core import Backbone
from vmt_core.backbone import nano, weights
from vmt_core.world.clips import render


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the tiny model that a test may spoil."""
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_latents_are_the_normalised_mode_of_the_posterior(tiny):
    frames = render("circle", frames=9, height=32, width=48)
    latents = tiny.encode(frames)
    pixels = (frames.float() / 127.5 - 1).permute(1, 0, 2, 3)[None]
    vae = tiny.parts["vae"]
    with torch.no_grad():
        mode = vae.encode(pixels).latent_dist.mode()[0]
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    assert latents.shape == (16, 3, 4, 6)
    assert latents.dtype == torch.float32
    assert torch.allclose(latents, (mode - mean) / std, atol=1e-6)


def test_decoding_gives_the_pixels_of_the_vae(tiny):
    latents = torch.randn(16, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    frames = tiny.decode(latents)
    assert frames.shape == (9, 3, 32, 48)
    assert frames.dtype == torch.uint8
    mean, std = tiny._statistics()
    with torch.no_grad():
        pixels = tiny.parts["vae"].decode(latents[None] * std + mean).sample[0].permute(1, 0, 2, 3)
    assert (frames.float() - (pixels.clamp(-1, 1) + 1) * 127.5).abs().max() <= 0.5


def test_only_valid_tokens_of_a_caption_are_kept_and_padding_is_zero(tiny):
    caption = tiny.caption("a ball")
    assert caption.shape == (len("a ball") + 1, 64)  # one token a character, and the end
    padded = tiny.pad([caption, tiny.caption("")])
    assert padded.shape == (2, 512, 64)
    assert padded[0, len(caption) :].abs().max() == 0


def test_a_caption_of_any_length_fits(tiny):
    assert tiny.caption("word " * 4000).shape[0] == 512


def test_parts_can_be_loaded_alone(folder):
    backbone = Backbone.load(str(folder), parts=("vae",))
    assert list(backbone.parts) == ["vae"]


def test_wan_nano_is_a_plain_wan_pipeline():
    pipeline = WanPipeline.from_pretrained(nano.folder())
    assert pipeline.transformer.config.num_layers == 8
    assert pipeline.vae.config.scale_factor_spatial == 8


def test_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Backbone.load(str(tmp_path / "nowhere"))


def test_a_folder_without_a_model_index(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model_index\.json"):
        Backbone.load(str(tmp_path))


@pytest.mark.parametrize("change", [{"image_dim": 32}, {"in_channels": 36}])
def test_image_to_video_models_are_refused(copy, change):
    file = copy / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=r"only Wan 2\.1 text-to-video is supported"):
        Backbone.load(str(copy), parts=("transformer",))


def test_pickled_weights_are_not_read(copy):
    (file,) = (copy / "vae").glob("*.safetensors")
    torch.save({}, file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(OSError, match="safetensors"):
        Backbone.load(str(copy), parts=("vae",))


def test_the_revision_follows_the_bytes_and_not_the_dates(copy, folder):
    before = weights.revision(folder)
    assert weights.revision(copy) == before
    (file,) = (copy / "transformer").glob("*.safetensors")
    os.utime(file, (0, 0))
    assert weights.revision(copy) == before
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert weights.revision(copy) != before
