"""How a gradient is used."""

import math

import pytest
import torch

from vmt_core import METHODS
from vmt_core.guidance import Guidance, GuidanceLog, optimise
from vmt_core.motion.amf import WindowedAMF

SHAPE = (3, 4, 2, 4, 4)


def latents():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def logs():
    return [GuidanceLog() for _ in range(SHAPE[0])]


def losses(x):
    return (x - 1).square().sum((1, 2, 3, 4)) + x.pow(4).sum((1, 2, 3, 4))


def test_cached_gradients_are_the_same_as_feeding_that_gradient_by_hand():
    rates = [0.003 - 0.0001 * j for j in range(10)]
    found = optimise(latents(), losses, rates, 3, logs())
    for row, start in zip(found, latents(), strict=True):
        x = start.clone().requires_grad_()
        adam = torch.optim.Adam([x], lr=rates[0])
        for j, rate in enumerate(rates):
            if j % 3 == 0:
                (gradient,) = torch.autograd.grad(losses(x[None]).sum(), x)
            x.grad = gradient.clone()
            adam.param_groups[0]["lr"] = rate
            adam.step()
        assert torch.equal(row, x.detach())


def test_ten_updates_at_interval_three_take_four_gradients():
    calls = []

    def counted(x):
        calls.append(1)
        return losses(x)

    found = logs()
    optimise(latents(), counted, [0.003] * 10, 3, found)
    assert len(calls) == 4
    assert [log.evaluations for log in found] == [4, 4, 4]
    assert [len(log.losses) for log in found] == [4, 4, 4]


@pytest.mark.parametrize(("method", "evaluations"), [("fastvmt", 40), ("ditflow", 50)])
def test_evaluations_of_a_run_of_50_steps(method, evaluations):
    assert METHODS[method]().guidance.evaluations(50) == evaluations


def test_a_gradient_that_is_not_finite_is_skipped_for_its_row_alone():
    def broken(x):
        value = losses(x)
        return torch.cat([value[:1], value[1:2] * math.nan, value[2:]])

    found = logs()
    edited, clean = (
        optimise(latents(), broken, [0.01] * 3, 1, found),
        optimise(latents(), losses, [0.01] * 3, 1, logs()),
    )
    assert torch.equal(edited[1], latents()[1])
    assert torch.equal(edited[0], clean[0])
    assert torch.equal(edited[2], clean[2])
    assert [log.skipped for log in found] == [0, 3, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_whose_gradient_broke_moves_again_from_its_next_good_one(bad):
    """Updates 0 and 1 are left out: what remains is a run of the last two."""
    calls = []

    def once(x):
        calls.append(1)
        return losses(x) + (bad if len(calls) == 1 else 0)  # an infinite loss, even with a finite gradient

    rates = [0.01, 0.02, 0.03, 0.04]
    found = logs()
    edited = optimise(latents(), once, rates, 2, found)
    assert torch.equal(edited, optimise(latents(), losses, rates[2:], 2, logs()))
    assert [(log.evaluations, log.skipped) for log in found] == [(2, 1)] * 3


def test_a_gradient_that_is_not_finite_though_its_loss_is_counts_as_skipped():
    def corner(x):
        return (x - x.detach()).abs().sqrt().sum((1, 2, 3, 4))  # 0, with an infinite slope

    found = logs()
    assert torch.equal(optimise(latents(), corner, [0.01], 1, found), latents())
    assert [log.skipped for log in found] == [1, 1, 1]


def test_a_row_does_not_see_its_neighbours():
    together = optimise(latents(), losses, [0.01] * 4, 2, logs())
    for index in range(3):
        assert torch.equal(
            optimise(latents()[index : index + 1], losses, [0.01] * 4, 2, logs()[:1])[0], together[index]
        )


def test_latents_stay_in_fp32_and_are_not_edited_in_place():
    start = latents()
    found = optimise(start, losses, [0.01], 1, logs())
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert torch.equal(start, latents())


@pytest.mark.parametrize(
    ("steps", "span", "guided"), [(50, 0.2, 10), (20, 0.2, 4), (7, 0.2, 2), (10, 0.0, 0), (10, 1.0, 10), (50, 0.14, 7)]
)
def test_the_first_share_of_the_steps_is_guided(steps, span, guided):
    assert Guidance(objective=WindowedAMF(), span=span).guided_steps(steps) == guided


def test_learning_rates_fall_over_the_inner_updates_or_over_the_guided_steps():
    objective = WindowedAMF()
    inner = Guidance(objective=objective, inner=4, learning_rate=(0.4, 0.2), decay="inner")
    assert inner.learning_rates(0, 50) == pytest.approx([0.4, 0.35, 0.3, 0.25])
    assert inner.learning_rates(9, 50) == inner.learning_rates(0, 50)
    outer = Guidance(objective=objective, inner=2, learning_rate=(0.4, 0.2), decay="outer")
    assert outer.learning_rates(0, 50) == pytest.approx([0.4, 0.4])
    assert outer.learning_rates(5, 50) == pytest.approx([0.3, 0.3])
