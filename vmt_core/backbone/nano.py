"""wan-nano: a small Wan of the real classes, so that every command works on a fresh machine.

Its weights are seeded random numbers for now: it exercises every code path at full shape, but its videos show noise.
The folder is in diffusers layout and loads with a plain `WanPipeline.from_pretrained`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NAME = "wan-nano"
NOTICE = (
    "wan-nano has random weights: its videos show noise, not the prompt. Use trained Wan 2.1 weights for real results."
)
_LAYOUT = 1  # part of the cache folder's name; bump when the recipe below changes
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .,;:!?'\"()-/&+%#"


def folder() -> Path:
    """The folder of wan-nano; built once per user (about a second), then reused."""
    cache = (
        Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        / "vmt"
        / f"{NAME}-{_LAYOUT}-torch{torch.__version__}"
    )
    if not (cache / "model_index.json").is_file():
        cache.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=cache.parent))
        build(building)
        try:
            building.rename(cache)  # atomic: another process sees all of it or nothing
        except OSError:  # another process was first
            shutil.rmtree(building)
    return cache


def build(path: Path, *, layers: int = 8, heads: int = 4, head_dim: int = 48, seed: int = 0) -> None:
    """Writes a small random Wan in diffusers layout; every weight follows from `seed`.

    The VAE has Wan's compression (8x8 space, 4x time, 16 channels), the transformer Wan's patch (1, 2, 2).
    """
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKLWan(
            base_dim=32,
            z_dim=16,
            dim_mult=[1, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=8,
            scale_factor_temporal=4,
        )
        transformer = WanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            text_dim=64,
            freq_dim=64,
            ffn_dim=4 * heads * head_dim,
            num_layers=layers,
        )
        text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(_CHARACTERS) + 3,
                d_model=64,
                d_kv=16,
                d_ff=128,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
                pad_token_id=0,
                eos_token_id=1,
            )
        )
    WanPipeline(
        tokenizer=_tokenizer(),
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(path, safe_serialization=True)


def _tokenizer() -> PreTrainedTokenizerFast:
    """A character tokenizer with T5's special tokens and its trailing end-of-sequence."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", *_CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
