"""Features with an early exit: the same bits as a full forward, and nothing computed in vain."""

import pytest
import torch
from diffusers.models.transformers import transformer_wan

from vmt_core import Backbone
from vmt_core.backbone import taps
from vmt_core.backbone.geometry import Geometry, Tap

LATENT = (2, 16, 3, 8, 6)
GEOMETRY = Geometry(3, 4, 3)


def inputs(backbone, seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(LATENT, generator=generator)
    text = backbone.pad([backbone.caption("a red ball"), backbone.caption("a star")])
    return latents, torch.full((2,), 700.0), text


@pytest.fixture(params=["tiny", "tiny_bf16"])
def backbone(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("block", [0, 1, 2])
@torch.no_grad()
def test_q_and_k_are_those_of_a_full_forward_bit_for_bit(backbone, block, monkeypatch):
    seen = []
    attend = transformer_wan.dispatch_attention_fn

    def spy(query, key, *args, **kwargs):
        if query.shape == key.shape:  # self-attention
            seen.append((query.clone(), key.clone()))
        return attend(query, key, *args, **kwargs)

    latents, timestep, text = inputs(backbone)
    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", spy)
    backbone.velocity(latents, timestep, text)
    full = seen[block]
    query, key = backbone.features(latents, timestep, text, (Tap(block, "qk"),))[Tap(block, "qk")]
    assert query.shape == (2, 3, 12, 2, 24)
    assert torch.equal(query.flatten(1, 2), full[0])
    assert torch.equal(key.flatten(1, 2), full[1])


@torch.no_grad()
def test_fused_projections_give_the_same_q_and_k(folder):
    backbone = Backbone.load(str(folder), parts=("transformer", "text"), dtype=torch.float32)
    latents, timestep, text = inputs(backbone)
    apart = backbone.features(latents, timestep, text, (Tap(1, "qk"),))[Tap(1, "qk")]
    for block in backbone.transformer.blocks:
        block.attn1.fuse_projections()
        del block.attn1.to_q, block.attn1.to_k, block.attn1.to_v
    fused = backbone.features(latents, timestep, text, (Tap(1, "qk"),))[Tap(1, "qk")]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(apart, fused, strict=True))


@torch.no_grad()
def test_hidden_states_are_those_of_a_full_forward_bit_for_bit(backbone):
    outputs = {}
    hooks = [
        block.register_forward_hook(lambda module, args, out, index=index: outputs.update({index: out}))
        for index, block in enumerate(backbone.transformer.blocks)
    ]
    latents, timestep, text = inputs(backbone)
    backbone.velocity(latents, timestep, text)
    for hook in hooks:
        hook.remove()
    wanted = (Tap(0, "hidden"), Tap(2, "hidden"), Tap(1, "qk"))
    found = backbone.features(latents, timestep, text, wanted)
    assert set(found) == set(wanted)
    for index in (0, 2):
        assert found[Tap(index, "hidden")].shape == (2, 3, 4, 3, 48)
        assert torch.equal(found[Tap(index, "hidden")].flatten(1, 3), outputs[index])


@torch.no_grad()
def test_nothing_runs_after_the_last_q_and_k(tiny):
    ran = []
    hooks = [
        module.register_forward_hook(lambda module, args, out, name=name: ran.append(name))
        for name, module in tiny.transformer.named_modules()
    ]
    tiny.features(*inputs(tiny), (Tap(1, "qk"),))
    for hook in hooks:
        hook.remove()
    of_block = {name.removeprefix("blocks.1.") for name in ran if name.startswith("blocks.1.")}
    assert of_block == {"norm1", "attn1.to_q", "attn1.to_k", "attn1.norm_q", "attn1.norm_k"}
    assert not any(name.startswith(("blocks.2", "proj_out", "norm_out")) for name in ran)
    assert "blocks.0.ffn" in ran


def gradient(backbone, policy):
    latents, timestep, text = inputs(backbone)
    latents.requires_grad_()
    found = taps.features(
        backbone.transformer, latents, timestep, text, (Tap(2, "qk"), Tap(1, "hidden")), checkpoint_policy=policy
    )
    query, key = found[Tap(2, "qk")]
    loss = (query.float() * key.float()).sum() + found[Tap(1, "hidden")].float().square().sum()
    return torch.autograd.grad(loss, latents)[0]


def test_the_gradient_goes_to_the_latents_and_to_no_weight(tiny):
    assert gradient(tiny, "selective").shape == LATENT
    assert not any(weight.requires_grad for weight in tiny.transformer.parameters())


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_gradients_are_bit_equal_under_every_checkpoint_policy(backbone, policy):
    kept = gradient(backbone, "none")
    assert kept.abs().max() > 0
    assert torch.equal(kept, gradient(backbone, policy))


def test_selective_checkpointing_keeps_attention_and_recomputes_the_rest(tiny):
    calls = {"attention": 0, "linear": 0}

    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            name = str(operator)
            calls["attention"] += "_scaled_dot_product" in name and "backward" not in name
            calls["linear"] += "addmm.default" in name
            return operator(*args, **(kwargs or {}))

    counts = {}
    for policy in ("none", "selective", "full"):
        calls.update(attention=0, linear=0)
        with Counter():
            gradient(tiny, policy)
        counts[policy] = dict(calls)
    assert counts["selective"]["attention"] == counts["none"]["attention"]
    assert counts["full"]["attention"] > counts["none"]["attention"]
    assert counts["selective"]["linear"] > counts["none"]["linear"]


def test_a_tap_beyond_the_last_block_is_refused(tiny):
    with pytest.raises(ValueError, match=r"block 3, but the transformer has blocks 0\.\.2"):
        tiny.features(*inputs(tiny), (Tap(3, "qk"),))


def test_a_row_of_a_batch_is_what_an_objective_takes(tiny):
    found = tiny.features(*inputs(tiny), (Tap(0, "qk"), Tap(0, "hidden")))
    one = taps.row(found, 1)
    assert one[Tap(0, "qk")][0].shape == (3, 12, 2, 24)
    assert torch.equal(one[Tap(0, "hidden")], found[Tap(0, "hidden")][1])


def test_the_grid_follows_from_the_latent_and_the_patch():
    assert Geometry.of_latents(torch.Size((16, 21, 60, 104)), (1, 2, 2)) == Geometry(21, 30, 52)
    with pytest.raises(ValueError, match="not divisible"):
        Geometry.of_latents((2, 7, 8), (1, 2, 2))
