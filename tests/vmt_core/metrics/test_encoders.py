"""Metrics on CLIP and DINO features: the arithmetic by hand, the loading on tiny random checkpoints."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import normalize
from transformers import CLIPImageProcessor

from vmt_core.metrics.encoders import (
    AestheticHead,
    Clip,
    Dino,
    temporal_consistency,
    text_similarity,
    vbench_consistency,
)

E = torch.eye(3)
DIAGONAL = normalize(torch.tensor([1.0, 1.0, 0.0]), dim=0)


def test_by_hand():
    images = torch.stack([E[0], E[0], DIAGONAL, E[1]])
    assert text_similarity(images, E[0]) == pytest.approx((1 + 1 + 0.5**0.5 + 0) / 4)
    assert temporal_consistency(images) == pytest.approx((1 + 2 * 0.5**0.5) / 3)
    assert vbench_consistency(images) == pytest.approx(((1 + 1) + (0.5**0.5 + 0.5**0.5) + (0.5**0.5 + 0)) / 6)


def test_opposite_features_count_as_nothing_in_vbench():
    images = torch.stack([E[0], -E[0]])
    assert temporal_consistency(images) == -1
    assert vbench_consistency(images) == 0


def test_a_still_clip_is_consistent():
    images = normalize(torch.randn(1, 16), dim=-1).expand(5, -1)
    assert temporal_consistency(images) == pytest.approx(1)
    assert vbench_consistency(images) == pytest.approx(1)


@pytest.fixture(scope="module")
def frames():
    return torch.randint(0, 256, (5, 3, 48, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_clip_features_are_those_of_the_model(clip_folder, frames):
    clip = Clip(clip_folder)
    images = clip.images(frames)
    assert images.shape == (5, 24)
    assert torch.allclose(images.norm(dim=-1), torch.ones(5), atol=1e-5)
    assert not torch.equal(images, clip.images(frames, antialias=False))
    with torch.no_grad():
        processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        pixels = processor([frame.permute(1, 2, 0).numpy() for frame in frames], return_tensors="pt").pixel_values
        wanted = clip.model.visual_projection(clip.model.vision_model(pixels).pooler_output)
    assert torch.allclose(images, normalize(wanted, dim=-1), atol=5e-3)
    assert clip.text("red circle").shape == (24,)
    assert not torch.allclose(clip.text("red circle"), clip.text("blue circle"), atol=1e-4)
    assert torch.equal(clip.text("red " * 100), clip.text("red " * 200))  # cut at the model's length
    assert torch.allclose(images[2:3], clip.images(frames[2:3]), atol=1e-5)


def test_dino_takes_frames_that_are_not_square(dino_folder, frames):
    dino = Dino(dino_folder)
    images = dino.images(frames)
    assert images.shape == (5, 32)
    assert torch.allclose(images.norm(dim=-1), torch.ones(5), atol=1e-5)
    small = torch.nn.functional.interpolate(frames.float(), (32, 53), mode="bilinear").round() / 255
    mean, deviation = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        wanted = dino.model((small - mean) / deviation, interpolate_pos_encoding=True).last_hidden_state[:, 0]
    assert torch.allclose(images, normalize(wanted, dim=-1), atol=1e-5)
    right = frames.clone()
    right[:, :, :, 60:] = 0  # beyond a centre crop
    assert not torch.allclose(dino.images(right), images, atol=1e-4)


def test_the_aesthetic_head_is_linear(tmp_path):
    save_file({"weight": torch.full((1, 3), 2.0), "bias": torch.tensor([4.0])}, tmp_path / "head.safetensors")
    assert AestheticHead(tmp_path / "head.safetensors").score(torch.stack([E[0], E[1]])) == pytest.approx(0.6)


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(OSError, match="safetensors"):
        Clip(str(tmp_path))
