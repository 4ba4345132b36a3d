"""Which precision a device computes fastest in."""

from __future__ import annotations

import torch


def fast_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """bf16 on a GPU and on CPUs with instructions for it, fp32 on others: they multiply bf16 some fifty times slower than fp32."""
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    # torch tells neither under a public name
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def autocast(device: torch.device) -> torch.autocast:
    """Autocast to bf16 where that is fast, and none elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_dtype(device) is torch.bfloat16)
