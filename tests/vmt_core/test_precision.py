"""bf16 only where it is fast."""

import pytest
import torch

from vmt_core import precision


@pytest.mark.parametrize(
    ("amx", "avx512", "expected"),
    [(False, False, torch.float32), (True, False, torch.bfloat16), (False, True, torch.bfloat16)],
)
def test_a_cpu_computes_in_what_it_has_instructions_for(monkeypatch, amx, avx512, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert precision.fast_dtype("cpu") is expected
    assert precision.fast_dtype("cuda") is torch.bfloat16
    with precision.autocast(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is expected
