"""Loading a Wan, pixels and latents."""

import json
import os
import shutil

import huggingface_hub
import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file

from support import tiny as tiny_model
from vmt_core import Backbone
from vmt_core.backbone import nano, weights
from vmt_core.world import render, sample


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the tiny model that a test may spoil."""
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_latents_are_the_normalised_mode_of_the_posterior(tiny):
    frames = render(sample(1, frames=9, height=32, width=48))
    latents = tiny.encode(frames)
    pixels = (frames.float() / 127.5 - 1).permute(1, 0, 2, 3)[None]
    vae = tiny.parts["vae"]
    with torch.no_grad():
        mode = vae.encode(pixels).latent_dist.mode()[0]
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    assert latents.shape == (16, 3, 4, 6)
    assert latents.dtype == torch.float32
    assert torch.allclose(latents, (mode - mean) / std, atol=1e-6)


@pytest.mark.parametrize("change", [lambda f: f[:4], lambda f: f[..., :40], lambda f: f.float()])
def test_frames_that_the_vae_would_cut_or_change_are_refused(tiny, change):
    frames = torch.zeros(5, 3, 48, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"they must be \(4k\+1, 3, H, W\) uint8"):
        tiny.encode(change(frames))


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
    assert caption.shape == (3, 128)  # two words, and the end
    padded = tiny.pad([caption, tiny.caption("")])
    assert padded.shape == (2, 512, 128)
    assert padded[0, len(caption) :].abs().max() == 0


def test_a_kept_caption_keeps_no_padding_alive(tiny, tiny_bf16):
    for backbone in (tiny, tiny_bf16):
        caption = backbone.caption("a red ball")
        assert caption.untyped_storage().nbytes() == caption.nbytes


def test_a_part_that_was_not_loaded_is_named(folder):
    backbone = Backbone.load(str(folder), parts=("transformer",))
    with pytest.raises(ValueError, match="loaded without its vae"):
        backbone.encode(torch.zeros(5, 3, 48, 64, dtype=torch.uint8))


def test_a_caption_of_any_length_fits(tiny):
    assert tiny.caption("word " * 4000).shape[0] == 512


def test_parts_can_be_loaded_alone(folder):
    backbone = Backbone.load(str(folder), parts=("vae",))
    assert list(backbone.parts) == ["vae"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_frozen_and_only_the_vae_stays_in_fp32(folder, dtype):
    parts = Backbone.load(str(folder), dtype=dtype).parts
    for name, wanted in {"transformer": dtype, "text": dtype, "vae": torch.float32}.items():
        assert not parts[name].training
        assert not any(weight.requires_grad for weight in parts[name].parameters())
        assert parts[name].dtype == wanted


def test_wan_nano_is_a_plain_wan_pipeline_of_wan_2_1s_compression():
    pipeline = WanPipeline.from_pretrained(nano.folder())
    assert type(pipeline.vae).__name__ == "AutoencoderKLWan"
    assert (pipeline.vae.config.scale_factor_spatial, pipeline.vae.config.scale_factor_temporal) == (8, 4)
    assert pipeline.vae.config.z_dim == 16
    assert pipeline.transformer.config.patch_size == [1, 2, 2]
    assert type(pipeline.text_encoder).__name__ == "UMT5EncoderModel"


def test_wan_nano_ships_safetensors_of_at_most_24_mb_and_a_card():
    files = [path for path in nano.folder().rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".png"}
    assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") <= 24e6
    assert (nano.folder() / "README.md").is_file()


def test_the_revision_follows_from_the_weights(folder, tmp_path):
    assert weights.revision(tiny_model.build(tmp_path / "same")) == weights.revision(folder)
    assert weights.revision(tiny_model.build(tmp_path / "other", seed=1)) != weights.revision(folder)


def test_a_hub_id_is_fetched_without_pickles_and_a_failure_names_it(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda model, **kw: asked.append((model, kw)) or folder)
    assert weights.locate("Wan-AI/Wan2.1") == folder
    ((model, settings),) = asked
    assert model == "Wan-AI/Wan2.1"
    assert not any(pattern.endswith((".bin", ".pt", ".pth", ".ckpt", "*")) for pattern in settings["allow_patterns"])

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"Wan-AI/Wan2\.1: not a local folder, .*no network"):
        weights.locate("Wan-AI/Wan2.1")


def test_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Backbone.load(str(tmp_path / "nowhere"))


def test_a_folder_without_a_model_index(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model_index\.json"):
        Backbone.load(str(tmp_path))


@pytest.mark.parametrize("content", ["{", '"x"', "[1]"])
def test_a_damaged_model_index_is_named(copy, content):
    (copy / "model_index.json").write_text(content)
    with pytest.raises(ValueError, match=f"{copy.name}: cannot be loaded"):
        Backbone.load(str(copy), parts=("transformer",))


@pytest.mark.parametrize("change", [{"image_dim": 32}, {"in_channels": 36}])
def test_image_to_video_models_are_refused(copy, change):
    file = copy / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=r"only Wan 2\.1 text-to-video is supported"):
        Backbone.load(str(copy), parts=("transformer",))


def test_wan_2_2_is_refused(copy):
    (copy / "transformer_2").mkdir()
    with pytest.raises(ValueError, match=r"not image-to-video or Wan 2\.2"):
        Backbone.load(str(copy), parts=("transformer",))


@pytest.mark.parametrize(
    ("part", "subfolder"), [("vae", "vae"), ("transformer", "transformer"), ("text", "text_encoder")]
)
def test_pickled_weights_are_not_read(copy, part, subfolder):
    (file,) = (copy / subfolder).glob("*.safetensors")
    torch.save({}, file.with_suffix(".bin"))
    torch.save({}, file.with_name("pytorch_model.bin"))
    file.unlink()
    with pytest.raises(ValueError, match=f"{subfolder}: cannot be loaded .*safetensors"):
        Backbone.load(str(copy), parts=(part,))


@pytest.mark.parametrize("damage", ["a weight is missing", "cut off", "no JSON"])
@pytest.mark.parametrize(
    ("part", "subfolder"), [("vae", "vae"), ("transformer", "transformer"), ("text", "text_encoder")]
)
def test_damaged_files_are_named_and_nothing_is_made_up(copy, part, subfolder, damage):
    (file,) = (copy / subfolder).glob("*.safetensors")
    if damage == "a weight is missing":
        tensors = load_file(file)
        tensors.pop(sorted(tensors)[3])
        save_file(tensors, file, metadata={"format": "pt"})
    elif damage == "cut off":
        file.write_bytes(file.read_bytes()[:-1000])
    else:
        (copy / subfolder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=f"{subfolder}: cannot be loaded") as caught:
        Backbone.load(str(copy), parts=(part,))
    assert "\n" not in str(caught.value)


def test_the_revision_follows_the_bytes_and_not_the_dates(copy, folder):
    before = weights.revision(folder)
    assert weights.revision(copy) == before
    (file,) = (copy / "transformer").glob("*.safetensors")
    os.utime(file, (0, 0))
    assert weights.revision(copy) == before


@pytest.mark.parametrize("subfolder", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize("place", [0.0, 0.37, 1.0])
def test_the_revision_changes_with_any_byte_of_any_weights(copy, folder, subfolder, place):
    (file,) = (copy / subfolder).glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    file.write_bytes(content)
    assert weights.revision(copy) != weights.revision(folder)


def test_the_revision_of_large_files_counts_their_size_and_samples_from_end_to_end(tmp_path):
    file = tmp_path / "weights.safetensors"
    size = 256 << 20  # a hole on the disk

    def revision(size, at):
        with file.open("wb") as stream:
            stream.truncate(size)
            stream.seek(at)
            stream.write(b"x")
        return weights.revision(tmp_path)

    places = [0, size // 63 * 31, size - 1]
    assert len({revision(size, at) for at in places} | {revision(size + 1, 0)}) == 4
