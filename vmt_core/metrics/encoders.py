"""Encoders whose weights the user gives (a folder, or a hub id), and the metrics that are means of cosines of their features.

CLIP (openai/clip-vit-base-patch32, -large-patch14; MIT) · DINO (facebook/dino-vitb16; Apache-2.0) · LAION's linear aesthetic head (MIT).
VBench is arXiv 2311.17982; its preprocessing differs from CLIP's own in leaving out antialiasing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from vmt_core.shapes import Frames

Features = Float[Tensor, "frames d"]

_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_AT_ONCE = 16  # frames


class Clip:
    """A CLIP; features are of unit length."""

    def __init__(self, model: str, device: str = "cpu") -> None:
        from transformers import AutoTokenizer, CLIPModel  # here: seconds, and most evaluations are given no encoder

        self.model: Any = CLIPModel.from_pretrained(model, use_safetensors=True).eval().to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.side = self.model.config.vision_config.image_size

    @torch.no_grad()
    def images(self, frames: Frames, *, antialias: bool = True) -> Features:
        """Shorter side to the model's size, bicubic; centre crop. VBench's way is without antialiasing."""
        parts = []
        for some in frames.split(_AT_ONCE):
            some = some.to(self.model.device)
            pixels = _prepared(some, self.side, *_CLIP, mode="bicubic", antialias=antialias)
            top, left = (pixels.shape[2] - self.side) // 2, (pixels.shape[3] - self.side) // 2
            pixels = pixels[:, :, top : top + self.side, left : left + self.side]
            parts.append(_pooled(self.model.get_image_features(pixels)).float().cpu())
        return normalize(torch.cat(parts), dim=-1)

    @torch.no_grad()
    def text(self, prompt: str) -> Float[Tensor, " d"]:
        """Of the first 77 tokens."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer([prompt], truncation=True, max_length=length, return_tensors="pt").to(self.model.device)
        features = _pooled(self.model.get_text_features(tokens.input_ids, tokens.attention_mask))
        return normalize(features.float().cpu(), dim=-1)[0]


class Dino:
    """A DINO ViT; features are its class token's, of unit length."""

    def __init__(self, model: str, device: str = "cpu") -> None:
        from transformers import ViTModel

        self.model: Any = (
            ViTModel.from_pretrained(model, use_safetensors=True, add_pooling_layer=False).eval().to(device)
        )

    @torch.no_grad()
    def images(self, frames: Frames) -> Features:
        """Shorter side to 224, bilinear; no crop, position embeddings are interpolated (VBench)."""
        parts = []
        for some in frames.split(_AT_ONCE):
            some = some.to(self.model.device)
            pixels = _prepared(some, self.model.config.image_size, *_IMAGENET, mode="bilinear", antialias=False)
            hidden = self.model(pixels, interpolate_pos_encoding=True).last_hidden_state
            parts.append(hidden[:, 0].float().cpu())
        return normalize(torch.cat(parts), dim=-1)


class AestheticHead:
    """LAION's linear head on features of CLIP ViT-L/14: `weight` (1, 768) and `bias` (1) in a safetensors file."""

    def __init__(self, path: str | Path) -> None:
        tensors = load_file(path)
        self.weight, self.bias = tensors["weight"].float(), tensors["bias"].float()

    def score(self, features: Features) -> float:
        """Mean over the frames, about 0 to 1 (VBench)."""
        return float((features @ self.weight.T + self.bias).mean() / 10)


def text_similarity(images: Features, text: Float[Tensor, " d"]) -> float:
    """Mean cosine of the frames with the prompt, in [-1, 1]; CLIP's usual range is 0.15 to 0.35."""
    return float((images @ text).mean())


def temporal_consistency(images: Features) -> float:
    """Mean cosine of neighbouring frames; 1 for a still clip, so read it beside how much moves."""
    return float((images[1:] * images[:-1]).sum(-1).mean())


def vbench_consistency(images: Features) -> float:
    """VBench's subject (DINO) and background (CLIP) consistency: each frame with the one before and with the first, in [0, 1]."""
    before = (images[1:] * images[:-1]).sum(-1).clamp(min=0)
    first = (images[1:] @ images[0]).clamp(min=0)
    return float(((before + first) / 2).mean())


def _prepared(
    frames: Frames,
    side: int,
    mean: tuple[float, ...],
    deviation: tuple[float, ...],
    *,
    mode: Literal["bicubic", "bilinear"],
    antialias: bool,
) -> Float[Tensor, "frames 3 h w"]:
    """Frames with their shorter side at `side`, normalised."""
    height, width = frames.shape[-2:]
    scale = side / min(height, width)
    size = (max(side, int(height * scale + 1e-6)), max(side, int(width * scale + 1e-6)))  # cut, as torchvision does
    pixels = (
        interpolate(frames.float(), size, mode=mode, antialias=antialias, align_corners=False).round().clamp(0, 255)
    )
    return (pixels / 255 - pixels.new_tensor(mean).view(3, 1, 1)) / pixels.new_tensor(deviation).view(3, 1, 1)


def _pooled(output: Any) -> Tensor:
    """transformers 5 gives an output object where 4 gave a tensor."""
    pooled: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return pooled
