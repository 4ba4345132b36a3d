"""Temporal RoPE at given positions."""

import pytest
import torch

from vmt_core.backbone.positions import temporal_positions


@pytest.fixture
def clip(tiny):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(1, 16, 5, 4, 4, generator=generator),
        torch.tensor([500.0]),
        tiny.pad([tiny.caption("a red circle")]),
    )


def test_whole_numbers_give_the_stock_rows_bit_for_bit(tiny):
    rope = tiny.transformer.rope
    stock = rope(torch.zeros(1, 16, 9, 4, 6))
    with temporal_positions(tiny.transformer, [0, 3, 8]):
        sparse = rope(torch.zeros(1, 16, 3, 4, 6))
    for whole, part in zip(stock, sparse, strict=True):
        assert torch.equal(whole.unflatten(1, (9, -1))[:, [0, 3, 8]].flatten(1, 2), part)


def test_the_usual_positions_are_the_stock_output_and_it_comes_back_afterwards(tiny, clip):
    stock = tiny.velocity(*clip)
    with temporal_positions(tiny.transformer, range(5)):
        assert torch.equal(tiny.velocity(*clip), stock)
    with temporal_positions(tiny.transformer, [0, 2, 4, 6, 8]):
        assert not torch.allclose(tiny.velocity(*clip), stock, atol=1e-4)
    assert torch.equal(tiny.velocity(*clip), stock)


def test_only_the_spacing_matters(tiny, clip):
    with temporal_positions(tiny.transformer, [0, 1.5, 3, 4.5, 6]):
        one = tiny.velocity(*clip)
    with temporal_positions(tiny.transformer, [20, 21.5, 23, 24.5, 26]):
        assert torch.allclose(tiny.velocity(*clip), one, atol=1e-5)


def test_a_single_frame_may_stand_anywhere(tiny, clip):
    latents, *rest = clip
    stock = tiny.velocity(latents[:, :, :1], *rest)
    with temporal_positions(tiny.transformer, [13.7]):
        assert torch.allclose(tiny.velocity(latents[:, :, :1], *rest), stock, atol=1e-5)


def test_other_frames_than_positions_are_refused_and_nothing_stays_behind(tiny, clip):
    with (
        pytest.raises(ValueError, match="3 temporal positions for 5 latent frames"),
        temporal_positions(tiny.transformer, [0, 1, 2]),
    ):
        tiny.velocity(*clip)
    tiny.velocity(*clip)


def test_features_of_guidance_see_them_too(tiny, clip):
    from vmt_core.backbone.geometry import Tap

    tap = Tap(0, "qk")
    stock = tiny.features(*clip, [tap])[tap][0]
    with temporal_positions(tiny.transformer, [0, 2, 4, 6, 8]):
        assert not torch.equal(tiny.features(*clip, [tap])[tap][0], stock)
