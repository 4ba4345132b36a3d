"""A small Wan of the real classes with random weights, so that tests of what does not depend on them are quick."""

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from vmt_core.pretraining.text import TEXT_CONFIG, tokenizer
from vmt_core.pretraining.vae import CONFIG as VAE_CONFIG


def build(path, *, layers=3, heads=2, head_dim=24, seed=0):
    """Writes the model in diffusers layout; every weight follows from `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKLWan(**VAE_CONFIG)
        transformer = WanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            text_dim=TEXT_CONFIG["d_model"],
            freq_dim=64,
            ffn_dim=4 * heads * head_dim,
            num_layers=layers,
        )
        text = UMT5EncoderModel(UMT5Config(**TEXT_CONFIG))
    WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=text,
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(path, safe_serialization=True)
    return path
