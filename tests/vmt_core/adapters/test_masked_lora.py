"""LoRA on chosen heads: exact zeros elsewhere, ordinary files."""

import json

import pytest
import torch
from diffusers import WanPipeline
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers
from safetensors.torch import load_file, save_file

from vmt_core.adapters import masked_lora
from vmt_core.adapters.settings import TARGETS


@pytest.fixture
def clip(wan):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(1, 16, 3, 8, 8, generator=generator),
        torch.tensor([500.0]),
        wan.pad([wan.caption("a red circle")]),
    )


def fill(transformer, name, seed=0):
    """Random values where the masks let them be, as if trained."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(masked_lora.parameters(transformer, name), lr=1.0)
    for weight in masked_lora.parameters(transformer, name):
        noise = 0.3 * torch.randn(weight.shape, generator=generator)
        (weight * noise).sum().backward()  # through the hooks
    optimizer.step()
    optimizer.zero_grad()


def layer(wan, block, target):
    return wan.transformer.blocks[block].attn1.get_submodule(target)


def test_a_fresh_adapter_changes_nothing(wan, clip, heads):
    stock = wan.velocity(*clip)
    masked_lora.add(wan.transformer, "one", heads, rank=4, alpha=4)
    assert torch.equal(wan.velocity(*clip), stock)
    fill(wan.transformer, "one")
    assert not torch.allclose(wan.velocity(*clip), stock, atol=1e-4)
    masked_lora.use(wan.transformer, {})
    assert torch.equal(wan.velocity(*clip), stock)


@pytest.mark.parametrize("target", ["to_q", "to_k", "to_v"])
def test_rows_of_other_heads_are_those_of_the_base_bit_for_bit(wan, heads, target):
    masked_lora.add(wan.transformer, "one", heads, rank=4, alpha=8)
    fill(wan.transformer, "one")
    x = torch.randn(1, 7, 48, generator=torch.Generator().manual_seed(1))
    lora = layer(wan, 0, target)
    adapted, base = lora(x), lora.base_layer(x)
    assert torch.equal(adapted[..., 24:], base[..., 24:])
    assert not torch.allclose(adapted[..., :24], base[..., :24], atol=1e-3)


def test_the_output_projection_reads_the_chosen_heads_alone(wan, heads):
    masked_lora.add(wan.transformer, "one", heads, rank=4, alpha=8)
    fill(wan.transformer, "one")
    lora = layer(wan, 0, "to_out.0")
    x = torch.randn(1, 7, 48, generator=torch.Generator().manual_seed(1))
    others = x * torch.tensor([0.0, 1.0]).repeat_interleave(24)
    assert torch.equal(lora(others), lora.base_layer(others))
    assert not torch.allclose(lora(x), lora.base_layer(x), atol=1e-3)


def test_layers_without_a_chosen_head_have_no_adapter(wan, heads):
    masked_lora.add(wan.transformer, "one", heads, rank=4, alpha=4)
    assert {key.split(".")[1] for key in masked_lora.state(wan.transformer, "one")} == {"0", "1"}
    assert not hasattr(layer(wan, 2, "to_q"), "base_layer")


def test_no_head_at_all_is_refused(wan, heads):
    with pytest.raises(ValueError, match="adapter one: no layer has a head of this kind"):
        masked_lora.add(wan.transformer, "one", heads & False, rank=4, alpha=4)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_masked_entries_stay_exactly_zero_under_weight_decay(wan, clip, heads, optimizer):
    parameters = masked_lora.add(wan.transformer, "one", heads, rank=4, alpha=4)
    steps = optimizer(parameters, lr=0.01, weight_decay=0.5)
    for _ in range(20):
        wan.velocity(*clip).square().mean().backward()
        steps.step()
        steps.zero_grad()
    weights = masked_lora.state(wan.transformer, "one")
    for target in ("to_q", "to_k", "to_v"):
        rows = weights[f"blocks.0.attn1.{target}.lora_B.weight"]
        assert not rows[24:].any() and rows[:24].any()
    columns = weights["blocks.0.attn1.to_out.0.lora_A.weight"]
    assert not columns[:, 24:].any() and columns[:, :24].any()


def test_one_adapter_is_trained_beside_a_frozen_one(wan, clip, heads):
    masked_lora.add(wan.transformer, "spatial", heads, rank=4, alpha=4)
    fill(wan.transformer, "spatial")
    before = masked_lora.state(wan.transformer, "spatial")
    masked_lora.add(wan.transformer, "temporal", ~heads, rank=2, alpha=2)
    trained = masked_lora.train_only(wan.transformer, "temporal", ["spatial"])
    assert trained and all(weight.requires_grad for weight in trained)
    assert sum(weight.requires_grad for weight in wan.transformer.parameters()) == len(trained)
    steps = torch.optim.AdamW(trained, lr=0.01)
    for _ in range(3):
        wan.velocity(*clip).square().mean().backward()
        steps.step()
    after = masked_lora.state(wan.transformer, "spatial")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(weight.grad is None for weight in masked_lora.parameters(wan.transformer, "spatial"))
    assert any(
        bool(value.any()) for key, value in masked_lora.state(wan.transformer, "temporal").items() if "lora_B" in key
    )


def test_an_adapted_head_leaks_through_the_shared_norm_unless_norms_are_isolated(wan, heads):
    """The leak is Wan's and documented; strict mode has none."""
    masked_lora.add(wan.transformer, "one", heads, rank=4, alpha=4)
    fill(wan.transformer, "one")
    attention = wan.transformer.blocks[0].attn1
    x = torch.randn(1, 7, 48, generator=torch.Generator().manual_seed(1))
    base = attention.norm_q(attention.to_q.base_layer(x))
    leaked = attention.norm_q(attention.to_q(x))[..., 24:]
    assert not torch.equal(leaked, base[..., 24:])
    with masked_lora.isolated_norms(wan.transformer):
        isolated = attention.norm_q(attention.to_q(x))
    assert torch.allclose(isolated[..., 24:], base[..., 24:], rtol=1e-6, atol=1e-7)
    assert not torch.allclose(isolated[..., :24], base[..., :24], atol=1e-3)
    assert torch.equal(attention.norm_q(attention.to_q(x))[..., 24:], leaked)


def test_isolated_norms_leave_nothing_behind_however_they_are_nested(wan, heads):
    def hooks():
        return sum(len(part._forward_hooks) for part in wan.transformer.modules())

    masked_lora.add(wan.transformer, "one", heads, rank=4, alpha=4)
    before = hooks()
    masked_lora.isolate_norms(wan.transformer)
    strict = hooks()
    with masked_lora.isolated_norms(wan.transformer):
        pass
    assert hooks() == strict > before
    masked_lora.clear(wan.transformer)
    assert hooks() == before


def test_the_file_loads_in_a_plain_pipeline_and_gives_the_same(wan, folder, clip, heads, tmp_path):
    masked_lora.add(wan.transformer, "one", heads, rank=4, alpha=8)
    fill(wan.transformer, "one")
    weights = masked_lora.state(wan.transformer, "one")
    masked_lora.write(weights, tmp_path / "one.safetensors", rank=4, alpha=8, about={"method": "m"})
    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path, weight_name="one.safetensors", adapter_name="one")
    latents, timestep, text = clip
    assert torch.allclose(pipeline.transformer(latents, timestep, text)[0], wan.velocity(*clip), atol=1e-6)


def test_a_file_comes_back_onto_a_loaded_model(wan, fresh, clip, heads, tmp_path):
    masked_lora.add(wan.transformer, "one", heads, rank=4, alpha=8)
    fill(wan.transformer, "one")
    wanted, stock = wan.velocity(*clip), fresh.velocity(*clip)
    weights = masked_lora.state(wan.transformer, "one")
    masked_lora.write(weights, tmp_path / "one.safetensors", rank=4, alpha=8, about={"method": "m"})
    weights, about = masked_lora.read(tmp_path / "one.safetensors")
    assert about["method"] == "m"
    for _ in range(2):  # again under the same name
        masked_lora.attach(fresh.transformer, "loaded", weights)
        masked_lora.use(fresh.transformer, {"loaded": 1.0})
        assert torch.allclose(fresh.velocity(*clip), wanted, atol=1e-6)
    masked_lora.use(fresh.transformer, {"loaded": 0.0})
    assert torch.equal(fresh.velocity(*clip), stock)
    fresh.transformer.delete_adapters("loaded")
    assert torch.equal(fresh.velocity(*clip), stock)


def test_two_adapters_merge_into_one(wan, fresh, clip, heads):
    masked_lora.add(wan.transformer, "a", heads, rank=4, alpha=4)
    fill(wan.transformer, "a")
    masked_lora.add(wan.transformer, "b", ~heads, rank=2, alpha=2)
    fill(wan.transformer, "b", seed=1)
    masked_lora.use(wan.transformer, {"a": 0.5, "b": 1.0})
    weights, rank = masked_lora.merged(
        [(masked_lora.state(wan.transformer, "a"), 0.5), (masked_lora.state(wan.transformer, "b"), 1.0)]
    )
    assert rank == 6
    masked_lora.attach(fresh.transformer, "both", weights)
    masked_lora.use(fresh.transformer, {"both": 1.0})
    assert torch.allclose(fresh.velocity(*clip), wan.velocity(*clip), atol=5e-6)
    fresh.transformer.delete_adapters("both")


def test_comfyui_keys_come_back_through_diffusers_own_converter(wan, heads):
    masked_lora.add(wan.transformer, "a", heads | True, rank=4, alpha=4)
    fill(wan.transformer, "a")
    weights = masked_lora.state(wan.transformer, "a")
    renamed = masked_lora.comfy(weights)
    assert set(renamed) >= {f"diffusion_model.blocks.0.self_attn.{x}.lora_A.weight" for x in "qkvo"}
    back = _convert_non_diffusers_wan_lora_to_diffusers(dict(renamed))
    assert set(back) == {f"transformer.{key}" for key in weights}
    assert all(torch.equal(back[f"transformer.{key}"], value) for key, value in weights.items())


def spoil(path, weights, about="{}"):
    tensors = {f"transformer.{key}": value for key, value in weights.items()}
    save_file(tensors, path, metadata={"lora_adapter_metadata": about})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path, w: path.write_bytes(b"\x00" * 40), "not a readable safetensors file"),
        (lambda path, w: path.write_bytes(b""), "not a readable safetensors file"),
        (lambda path, w: save_file({"weight": torch.zeros(2)}, path), "holds no LoRA"),
        (lambda path, w: spoil(path, {k: v * float("nan") for k, v in w.items()}), "is not finite"),
        (lambda path, w: spoil(path, dict([*w.items()][1:])), "has no pair of lora_A and lora_B"),
        (lambda path, w: spoil(path, dict([*w.items()][:-1])), "has no pair of lora_A and lora_B"),
        (lambda path, w: spoil(path, {k: v.int() for k, v in w.items()}), "are no matrices of real numbers"),
        (lambda path, w: spoil(path, {k: v[0] for k, v in w.items()}), "are no matrices of real numbers"),
        (lambda path, w: spoil(path, w | {next(k for k in w if "_A" in k): torch.zeros(3, 48)}), r"ranks 3, 4\)"),
        (lambda path, w: spoil(path, {k.replace("attn1.to_q", "ffn.net.2"): v for k, v in w.items()}), "holds no LoRA"),
        (lambda path, w: spoil(path, w, "{"), "gives no rank and alpha"),
        (lambda path, w: spoil(path, w, "[]"), "gives no rank and alpha"),
        (lambda path, w: spoil(path, w, '{"transformer.lora_alpha": null}'), "gives no rank and alpha"),
        (lambda path, w: spoil(path, w, '{"transformer.r": 0}'), "gives no rank and alpha"),
        (lambda path, w: spoil(path, w, '{"transformer.lora_alpha": NaN}'), "gives no finite alpha"),
    ],
)
def test_what_is_no_adapter_file_is_refused(wan, heads, tmp_path, make, words):
    masked_lora.add(wan.transformer, "a", heads, rank=4, alpha=4)
    make(tmp_path / "bad.safetensors", masked_lora.state(wan.transformer, "a"))
    with pytest.raises(ValueError, match=words) as error:
        masked_lora.read(tmp_path / "bad.safetensors")
    assert "bad.safetensors" in str(error.value)


def test_an_adapter_of_another_model_is_refused(wan, heads):
    masked_lora.add(wan.transformer, "a", heads, rank=4, alpha=4)
    weights = masked_lora.state(wan.transformer, "a")
    wider = {key: torch.zeros(value.shape[0], 96) if "lora_A" in key else value for key, value in weights.items()}
    with pytest.raises(ValueError, match=r"adapter x: blocks\.0.*this model's layer has 48 features"):
        masked_lora.attach(wan.transformer, "x", wider)
    deeper = {key.replace("blocks.0", "blocks.29"): value for key, value in weights.items()}
    with pytest.raises(ValueError, match=r"blocks\.29\.attn1\.to_q is no layer of this model"):
        masked_lora.attach(wan.transformer, "x", deeper)


def test_metadata_say_rank_and_alpha_as_diffusers_wants_them(wan, heads, tmp_path):
    masked_lora.add(wan.transformer, "a", heads, rank=4, alpha=8)
    masked_lora.write(masked_lora.state(wan.transformer, "a"), tmp_path / "a.safetensors", rank=4, alpha=8)
    weights, about = masked_lora.read(tmp_path / "a.safetensors")
    config = json.loads(about["lora_adapter_metadata"])
    assert (config["transformer.r"], config["transformer.lora_alpha"]) == (4, 8)
    assert set(config["transformer.target_modules"]) == {
        f"blocks.{n}.attn1.{target}" for n in (0, 1) for target in TARGETS
    }
    raw = load_file(tmp_path / "a.safetensors")
    assert len(weights) == len(raw) == 2 * len(TARGETS) * 2
