"""What guidance costs, counted by torch on the real configurations without any weights."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from vmt_core import METHODS, flops
from vmt_core.adapters.settings import FollowYourMotion
from vmt_core.backbone import taps
from vmt_core.backbone.geometry import Geometry, Tap

aten = torch.ops.aten
GEOMETRY = Geometry(21, 30, 52)  # 480x832, 81 frames: 32,760 tokens
CONFIGS = {
    "1.3B": {"num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960},
    "14B": {"num_layers": 40, "num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824},
}
#: FlopCounterMode does not know the CPU's flash attention.
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *a, out_shape=None, **kw: sdpa_flop_count(
        q, k, v
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *a, out_shape=None, **kw: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def model(config, layers):
    return WanTransformer3DModel(**(config | {"num_layers": layers})).requires_grad_(False)


def count(run):
    """FLOPs of a call on tensors without storage."""
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        run()
    return counter.get_total_flops()


def inputs():
    latents = torch.empty(1, 16, 21, 60, 104)
    return latents, torch.empty(1), torch.empty(1, 512, 4096)


def forward_flops(config, layers):
    with FakeTensorMode():
        transformer, (latents, timestep, text) = model(config, layers), inputs()
        with torch.no_grad():
            return count(lambda: transformer(latents, timestep, text, return_dict=False))


def evaluation_flops(config, block, policy):
    """One guidance gradient through `block` blocks, the objective's part left out."""

    def run(transformer, latents, timestep, text):
        found = taps.features(transformer, latents, timestep, text, (Tap(block, "qk"),), checkpoint_policy=policy)
        query, key = found[Tap(block, "qk")]
        (query.float() * key.float()).sum().backward()

    with FakeTensorMode():
        transformer, (latents, timestep, text) = model(config, block + 1), inputs()
        return count(lambda: run(transformer, latents.requires_grad_(), timestep, text))


def linear(at, low, high, wanted):
    """A count at `wanted` blocks from counts at `low` and `high`: every block costs the same."""
    first, second = at(low), at(high)
    return first + (second - first) * (wanted - low) / (high - low)


def forward_of(config):
    return linear(lambda layers: forward_flops(config, layers), 1, 2, config["num_layers"])


def evaluation_of(config, policy):
    return linear(lambda block: evaluation_flops(config, block, policy), 1, 2, 14)


def test_every_block_costs_the_same():
    config = CONFIGS["1.3B"]
    one, two, three = (forward_flops(config, layers) for layers in (1, 2, 3))
    assert three - two == two - one
    one, two, three = (evaluation_flops(config, block, "selective") for block in (1, 2, 3))
    assert three - two == two - one


@pytest.mark.parametrize(("size", "teraflops"), [("1.3B", 283), ("14B", 1678)])
def test_a_full_forward(size, teraflops):
    assert forward_of(CONFIGS[size]) == pytest.approx(teraflops * 1e12, rel=0.01)


@pytest.mark.parametrize(
    ("name", "size", "policy", "most"),
    [
        ("fastvmt", "1.3B", "none", 1.57),
        ("fastvmt", "1.3B", "selective", 1.63),
        ("fastvmt", "1.3B", "full", 1.76),
        ("fastvmt", "14B", "none", 1.39),
        ("fastvmt", "14B", "selective", 1.46),
        ("fastvmt", "14B", "full", 1.53),
        ("ditflow", "1.3B", "selective", 1.78),
        ("ditflow", "14B", "selective", 1.57),
    ],
)
def test_guided_over_plain_sampling(name, size, policy, most):
    """50 steps with classifier-free guidance, 40 evaluations of FastVMT and 50 of DiTFlow."""
    ratio = 1 + METHODS[name]().guidance.evaluations(50) * evaluation_of(CONFIGS[size], policy) / (
        100 * forward_of(CONFIGS[size])
    )
    assert round(ratio, 2) <= most
    assert ratio == pytest.approx(most, rel=0.03)


@pytest.mark.parametrize("size", CONFIGS)
def test_the_formulas_of_the_plan_agree_with_the_count(size):
    config = CONFIGS[size]
    assert flops.forward(config, GEOMETRY.tokens) == pytest.approx(forward_of(config), rel=0.02)
    for policy in ("none", "selective", "full"):
        assert flops.evaluation(config, GEOMETRY.tokens, 14, policy) == pytest.approx(
            evaluation_of(config, policy), rel=0.02
        )


@pytest.mark.parametrize(("scale", "forwards"), [(5.0, 100), (1.0, 50)])
@pytest.mark.parametrize(("name", "evaluations"), [("fastvmt", 40), ("ditflow", 50), ("none", 0)])
def test_a_video_costs_its_denoiser_calls_and_its_guidance_gradients(name, evaluations, scale, forwards):
    config = CONFIGS["1.3B"]
    wanted = forwards * flops.forward(config, GEOMETRY.tokens) + evaluations * flops.evaluation(
        config, GEOMETRY.tokens, 14, "selective"
    )
    assert flops.video(config, GEOMETRY, METHODS[name](), 50, scale) == pytest.approx(wanted, rel=1e-9)


def test_a_video_costs_what_its_settings_add():
    """The reference's own forwards at every guided step, and what is computed again in the backward passes."""
    config, tokens = CONFIGS["1.3B"], GEOMETRY.tokens
    plain, paper = (
        flops.video(config, GEOMETRY, METHODS["fastvmt"](preset), 50, 5.0) for preset in ("default", "paper")
    )
    assert paper - plain == pytest.approx(10 * 14 * flops.block(config, tokens).total)
    kept = flops.video(config, GEOMETRY, METHODS["fastvmt"](), 50, 5.0, "none")
    assert plain - kept == pytest.approx(40 * 14 * flops.block(config, tokens).linear)


@pytest.mark.parametrize(("sparse", "frames"), [("latent", 5), ("pixel", 5), ("off", 21)])
def test_tuning_costs_its_draws_and_its_validations(sparse, frames):
    config = CONFIGS["1.3B"]
    settings = FollowYourMotion(sparse=sparse, rank=8)
    image, whole = GEOMETRY.per_frame, GEOMETRY.tokens
    drawn = 1000 * 4 * flops.step(config, image) + 1500 * flops.step(config, frames * image)
    validated = 20 * 4 * 5 * flops.forward(config, image) + 6 * 4 * flops.forward(config, whole)
    found = flops.tuning(config, GEOMETRY, settings)
    assert found.flops == pytest.approx(drawn + validated, rel=1e-9)
    assert found.parameters == 30 * 4 * 2 * 1536 * 8
    assert validated < 0.1 * found.flops


def test_a_training_step_is_a_gradient_through_every_block():
    config = CONFIGS["1.3B"]
    assert flops.step(config, 8190) == flops.evaluation(config, 8190, 30, "selective")
    assert 3 < flops.step(config, 8190) / flops.forward(config, 8190) < 4
