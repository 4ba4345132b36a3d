"""Wan 2.1 as this project uses it: load parts of it, pixels <-> latents, captions, velocity, features.

    Backbone.load("wan-nano" | folder | hub id)  ->  encode · decode · caption · velocity · features

diffusers layout; safetensors only. The VAE is in fp32 (torch lets convolutions of newer GPUs round to TF32), the transformer and the text
encoder in `dtype`; latents are fp32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vmt_core.backbone import taps
from vmt_core.backbone.geometry import Geometry, Tap
from vmt_core.backbone.weights import locate, revision
from vmt_core.faults import device_is_broken, out_of_memory
from vmt_core.precision import fast_dtype
from vmt_core.presets import WAN, Native, native
from vmt_core.shapes import Frames, LatentBatch, Latents, Text, TextBatch

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

Part = Literal["transformer", "vae", "text"]
ALL_PARTS: tuple[Part, ...] = ("transformer", "vae", "text")
_FOLDERS: dict[Part, tuple[str, ...]] = {
    "transformer": ("transformer",),
    "vae": ("vae",),
    "text": ("text_encoder", "tokenizer"),
}
TEXT_LENGTH = 512  # tokens; Wan 2.1 was trained on zero-padded captions of this length


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Names the folder of what the libraries say of its files."""
    try:
        yield
    except Exception as error:
        if out_of_memory(error) or device_is_broken(error):
            raise
        if "meta tensor" in str(error):  # how torch says that there was no weight in the file
            raise ValueError(f"{folder}: cannot be loaded, its files lack weights") from error
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder}: cannot be loaded ({type(error).__name__}: {reason})") from error


@dataclass
class Backbone:
    """A loaded Wan, or the parts of it that were asked for."""

    path: Path
    device: torch.device
    dtype: torch.dtype
    checkpoint_policy: taps.CheckpointName = "selective"
    parts: dict[str, Any] = field(default_factory=dict)
    adapter: Any = None  # weights by stage of the adapter that it holds, if any
    native: Native = WAN  # what it is made for

    @classmethod
    def load(
        cls,
        model: str,
        *,
        parts: Sequence[Part] = ALL_PARTS,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        checkpoint_policy: taps.CheckpointName | None = None,
    ) -> Backbone:
        """Loads the parts of a model in diffusers layout; weights are frozen and in eval mode.

        Args:
            dtype: of the transformer and the text encoder; by default what the device computes fastest in.
            checkpoint_policy: what backward passes recompute; by default all but attention, for wan-nano nothing.

        Raises:
            FileNotFoundError: no such folder, or it lacks a part.
            ValueError: not a Wan 2.1 text-to-video model, or files that are damaged, incomplete or of another kind; names the folder.
        """
        from diffusers import AutoencoderKLWan, WanTransformer3DModel  # here: seconds, which a driver has no use for

        path = locate(model)
        for folder in dict.fromkeys(folder for part in parts for folder in _FOLDERS[part]):
            if not (path / folder).is_dir():
                raise FileNotFoundError(f"{model}: has no folder {folder}")
        device = torch.device(device)
        dtype = dtype or fast_dtype(device)
        defaults = native(model)
        self = cls(path, device, dtype, checkpoint_policy or defaults.checkpoint, native=defaults)
        safe: dict[str, Any] = {"use_safetensors": True}
        if "transformer" in parts:
            with _reading(path / "transformer"):
                config = WanTransformer3DModel.load_config(path, subfolder="transformer")
            image = config.get("image_dim") is not None or config.get("in_channels", 16) != config.get(
                "out_channels", 16
            )
            with _reading(path):
                about = dict(json.loads((path / "model_index.json").read_text()))
            later = about.get("expand_timesteps") or (path / "transformer_2").exists()
            if config.get("_class_name", "WanTransformer3DModel") != "WanTransformer3DModel":
                raise ValueError(f"{model}: its transformer is a {config['_class_name']}, not a WanTransformer3DModel")
            if image or later:
                raise ValueError(f"{model}: only Wan 2.1 text-to-video is supported, not image-to-video or Wan 2.2")
            with _reading(path / "transformer"):
                transformer = WanTransformer3DModel.from_pretrained(path, subfolder="transformer", dtype=dtype, **safe)
                self.parts["transformer"] = transformer.eval().requires_grad_(False).to(device)
        if "vae" in parts:
            with _reading(path / "vae"):
                vae = AutoencoderKLWan.from_pretrained(path, subfolder="vae", dtype=torch.float32, **safe)
                self.parts["vae"] = vae.eval().requires_grad_(False).to(device)
        if "text" in parts:
            from transformers import AutoTokenizer, UMT5EncoderModel

            with _reading(path / "text_encoder"):
                text, found = UMT5EncoderModel.from_pretrained(
                    path, subfolder="text_encoder", dtype=dtype, output_loading_info=True, **safe
                )
                if found["missing_keys"]:  # transformers would make them up
                    raise ValueError(f"its file lacks {', '.join(sorted(found['missing_keys'])[:3])}")
                self.parts["text"] = text.eval().requires_grad_(False).to(device)
            with _reading(path / "tokenizer"):
                self.parts["tokenizer"] = AutoTokenizer.from_pretrained(path / "tokenizer")
        return self

    @cached_property
    def revision(self) -> str:
        """Identity of the weights, see `weights.revision`; empty if they are of no folder."""
        return revision(self.path) if (self.path / "model_index.json").is_file() else ""

    def part(self, name: str) -> Any:
        """A part that was loaded.

        Raises:
            ValueError: it was not.
        """
        if name not in self.parts:
            raise ValueError(f"this Backbone was loaded without its {name}: Backbone.load(…, parts={ALL_PARTS})")
        return self.parts[name]

    @property
    def transformer(self) -> WanTransformer3DModel:
        return self.part("transformer")

    @property
    def patch(self) -> tuple[int, ...]:
        return tuple(self.transformer.config.patch_size)

    def geometry(self, latents: Tensor) -> Geometry:
        """Token grid of latents (…, F, H, W)."""
        return Geometry.of_latents(latents.shape, self.patch)

    @torch.no_grad()
    def encode(self, frames: Frames) -> Latents:
        """Pixels to normalised latents, fp32 on the CPU: posterior mode, (mode - latents_mean) / latents_std.

        Args:
            frames: (T, 3, H, W) uint8, T = 4k+1, H and W multiples of 16.

        Raises:
            ValueError: other frames. The VAE would leave out those after the last multiple of four without a word.
        """
        length, _, height, width = frames.shape
        if frames.dtype != torch.uint8 or length % 4 != 1 or height % 16 or width % 16:
            raise ValueError(
                f"frames are {tuple(frames.shape)} {frames.dtype}; they must be (4k+1, 3, H, W) uint8, H and W multiples of 16"
            )
        return self._encoded(frames.transpose(0, 1).unsqueeze(0))[0]

    @torch.no_grad()
    def encode_images(self, frames: Frames, at_once: int = 8) -> Float[Tensor, "frames channels height width"]:
        """Each frame's own latent, as `encode` gives it for a clip of that frame alone; `at_once` of them are computed together."""
        return torch.cat([self._encoded(some.unsqueeze(2)) for some in frames.split(at_once)])[:, :, 0]

    def _encoded(self, clips: Tensor) -> Tensor:
        """uint8 (B, 3, T, H, W) -> (B, C, F, h, w)."""
        pixels = clips.to(self.device, torch.float32).div_(127.5).sub_(1)
        latents: Tensor = self.part("vae").encode(pixels).latent_dist.mode()
        mean, std = self._statistics()
        return ((latents - mean) / std).float().cpu()

    @torch.no_grad()
    def decode(self, latents: Latents) -> Frames:
        """Normalised latents (C, F, H, W) to pixels (4F-3, 3, 8H, 8W), uint8 on the CPU."""
        mean, std = self._statistics()
        pixels: Tensor = (
            self.part("vae").decode(latents.to(self.device, torch.float32).unsqueeze(0) * std + mean).sample[0]
        )
        return pixels.clamp_(-1, 1).add_(1).mul_(127.5).round_().to(torch.uint8).transpose(0, 1).cpu()

    @torch.no_grad()
    def caption(self, prompt: str) -> Text:
        """UMT5 embedding of a prompt: its valid tokens only (at most 512), on the CPU; `pad` makes a batch of them.

        One prompt a call, so that an embedding never depends on its neighbours in a batch.
        """
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        tokens = self.part("tokenizer")(
            [prompt_clean(prompt)],
            padding="max_length",
            max_length=TEXT_LENGTH,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        ids, mask = tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)
        embedding: Tensor = self.part("text")(ids, mask).last_hidden_state[0]
        return embedding[: int(mask.sum())].to(self.dtype).cpu().clone()  # not a view that keeps all 512 rows alive

    def pad(self, captions: Sequence[Text]) -> TextBatch:
        """Captions as a batch (B, 512, dim) on the device; zeros after the last valid token, as Wan was trained."""
        batch = captions[0].new_zeros(len(captions), TEXT_LENGTH, captions[0].shape[1])
        for row, caption in zip(batch, captions, strict=True):
            row[: len(caption)] = caption
        return batch.to(self.device, self.dtype)

    def velocity(self, latents: LatentBatch, timestep: Tensor, text: TextBatch) -> LatentBatch:
        """v = eps - z of a batch, fp32; the transformer sees the latents in its own dtype."""
        out: Tensor = self.transformer(latents.to(self.dtype), timestep, text, return_dict=False)[0]
        return out.float()

    def features(
        self, latents: LatentBatch, timestep: Tensor, text: TextBatch, at: Sequence[Tap]
    ) -> taps.BatchedFeatures:
        """Features of a batch at the taps, with an early exit; see `taps.features`."""
        return taps.features(self.transformer, latents, timestep, text, at, checkpoint_policy=self.checkpoint_policy)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """latents_mean and latents_std, each (1, C, 1, 1, 1)."""
        config = self.part("vae").config
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=self.device).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, std
