"""The one sampling loop."""

import pytest
import torch

from vmt_core.backbone.sampler import Schedule, denoiser_calls, noise, noised, sample, shifted

SHAPE = (2, 16, 2, 4, 4)
TEXT = torch.zeros(2, 8, 4)


def latents(seed=0):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def linear(x, timestep, text):
    """A velocity that depends on everything it is given."""
    return 0.1 * x + timestep.view(-1, 1, 1, 1, 1) / 1000 + text.mean()


def test_levels_are_shifted_as_wan_does():
    assert shifted(torch.tensor([0.0, 0.5, 1.0]), 5.0).tolist() == pytest.approx([0, 0.8333333, 1])
    each = shifted(torch.full((2,), 0.5), torch.tensor([1.0, 3.0]))
    assert each.tolist() == pytest.approx([0.5, 0.75])


@pytest.mark.parametrize(
    ("steps", "shift", "strength"), [(1, 1.0, 1.0), (20, 3.0, 1.0), (50, 5.0, 0.92), (7, 8.0, 0.3)]
)
def test_sigmas_are_shifted_from_equal_steps_and_fall_to_zero(steps, shift, strength):
    u = torch.linspace(strength, 0, steps + 1, dtype=torch.float64)
    schedule = Schedule.shifted(steps, shift, strength)
    assert torch.allclose(schedule.sigmas.double(), shift * u / (1 + (shift - 1) * u), atol=1e-6)
    assert schedule.sigmas[-1] == 0
    assert torch.equal(schedule.timesteps, schedule.sigmas[:-1] * 1000)
    assert schedule.steps == steps


@pytest.mark.parametrize("strength", [0.0, -1.0, 1.1])
def test_a_strength_outside_0_to_1_is_refused(strength):
    with pytest.raises(ValueError, match="strength"):
        Schedule.shifted(10, 3.0, strength)


@pytest.mark.parametrize("at", [0, 2, 5])
def test_an_edit_of_the_latents_survives_the_scheduler_wholly(at):
    schedule = Schedule.shifted(6, 3.0)
    bump = latents(1)

    def run(edit=None):
        return sample(
            lambda x, t, text: torch.ones_like(x), latents(), schedule, TEXT, TEXT, guidance_scale=1, edit=edit
        )

    edited = run(lambda step, x: x + bump if step == at else x)
    assert torch.allclose(edited - run(), bump, atol=1e-6)


def test_every_step_is_eulers_and_every_edit_comes_before_it():
    schedule = Schedule.shifted(4, 3.0, 0.8)
    seen = []

    def edit(step, x):
        seen.append((step, x))
        return x + step

    found = sample(linear, latents(), schedule, TEXT, TEXT, guidance_scale=1, edit=edit)
    x = latents()
    for step, (sigma, after) in enumerate(zip(schedule.sigmas[:-1], schedule.sigmas[1:], strict=True)):
        assert seen[step][0] == step
        assert torch.equal(seen[step][1], x)
        x = x + step
        x = x + (after - sigma) * linear(x, (1000 * sigma).expand(2), TEXT)
    assert torch.equal(found, x)
    assert found.dtype == torch.float32


def test_noise_follows_from_the_seed_alone():
    first, second = noise(7, SHAPE, draws=2)
    assert torch.equal(noise(7, SHAPE)[0], first)
    assert not torch.equal(first, second)
    assert not torch.equal(noise(8, SHAPE)[0], first)
    torch.manual_seed(0)
    assert torch.equal(noise(7, SHAPE)[0], first)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63])
def test_seeds_that_would_repeat_the_noise_of_others_are_refused(seed):
    assert len({float(noise(one, (1,))[0]) for one in (0, 1, 2**31, 2**32 - 1)}) == 4
    with pytest.raises(ValueError, match=f"seed {seed} is not from 0 to 4294967295"):
        noise(seed, (1,))


def test_noised_is_the_flow_matching_path():
    clean, eps = latents(0), latents(1)
    assert torch.equal(noised(clean, eps, 0.0), clean)
    assert torch.equal(noised(clean, eps, 1.0), eps)
    assert torch.allclose(noised(clean, eps, 0.3), 0.7 * clean + 0.3 * eps)


def test_one_forward_of_twice_the_batch_gives_what_two_forwards_give():
    text, negative = torch.ones(2, 8, 4), torch.zeros(2, 8, 4)

    def per_row(x, t, text):
        return 0.1 * x + text.mean((1, 2)).view(-1, 1, 1, 1, 1)

    schedule = Schedule.shifted(4, 3.0)
    two, one = (
        sample(per_row, latents(), schedule, text, negative, guidance_scale=4, cfg=cfg)
        for cfg in ("two_pass", "batched")
    )
    assert torch.allclose(two, one, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_the_denoiser_is_called_as_often_as_reported_and_never_for_an_unused_negative(scale):
    schedule = Schedule.shifted(5, 3.0)
    calls = []

    def counting(x, t, text):
        calls.append(float(text.mean()))
        return linear(x, t, text)

    sample(counting, latents(), schedule, torch.ones(2, 8, 4), torch.zeros(2, 8, 4), guidance_scale=scale)
    assert len(calls) == denoiser_calls(schedule, scale)
    assert calls.count(0.0) == (5 if scale > 1 else 0)
