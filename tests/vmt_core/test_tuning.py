"""The loop that tunes adapters, on a toy task."""

import json

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from vmt_core.tuning import StageSchedule, TorchEngine, Tuning


class Line:
    """Fits y = 2x with one weight; draw d is a batch that follows from d."""

    name = "line"

    def __init__(self, values=None, **schedule):
        self.schedule = StageSchedule(
            **{"steps": 12, "learning_rate": 0.1, "warmup": 3, "validate_every": 4, **schedule}
        )
        self.module = Squared()
        self.values = values
        self.drawn = []

    def batch(self, draw):
        self.drawn.append(draw)
        x = torch.randn(8, generator=torch.Generator().manual_seed(draw))
        return x, 2 * x

    def validate(self):
        if self.values:
            return self.values.pop(0)
        with torch.no_grad():
            return (self.module.weight - 2).square().item()


class Squared(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.frozen = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x, y):
        return (self.weight * x - y).square().mean(), {"target": y.square().mean()}


def tuning(task, **options):
    return Tuning(task, TorchEngine(task.module, task.schedule, torch.device("cpu")), **options)


def finish(run):
    while not run.done:
        run.advance()
    return run


def test_the_loss_falls_and_validations_stand_in_the_curve():
    run = finish(tuning(Line()))
    assert run.step == 12 and [point.step for point in run.curve] == list(range(1, 13))
    assert [point.step for point in run.curve if point.validation is not None] == [4, 8, 12]
    assert run.curve[-1].validation < run.curve[3].validation


def test_the_learning_rate_warms_up_and_stays():
    run = tuning(Line())
    rates = [run.advance()["learning_rate"] for _ in range(5)]
    assert rates == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, 0.1, 0.1])


@pytest.mark.parametrize("stop", [1, 4, 11])
def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path, stop):
    whole = finish(tuning(Line()))
    first = tuning(Line())
    for _ in range(stop):
        first.advance()
    first.save(tmp_path, first.engine.state())
    second = tuning(Line())
    second.load(tmp_path)
    assert second.step == stop
    finish(second)
    assert torch.equal(second.task.module.weight, whole.task.module.weight)
    assert second.curve == whole.curve


def test_a_checkpoint_before_the_first_step_can_be_resumed(tmp_path):
    first = tuning(Line())
    first.save(tmp_path, first.engine.state())
    second = tuning(Line())
    second.load(tmp_path)
    assert finish(second).curve == finish(tuning(Line())).curve


def test_workers_share_the_draws_of_a_step():
    task = Line(draws=4, steps=2)
    finish(tuning(task))
    assert task.drawn == [0, 1, 2, 3, 4, 5, 6, 7]
    second = Line(draws=4, steps=2)
    finish(tuning(second, rank=1, workers=2))
    assert second.drawn == [1, 3, 5, 7]


def test_accumulated_draws_are_one_large_batch():
    """Gradient of the mean over draws, by hand."""
    task = Line(draws=2, steps=1, warmup=0, weight_decay=0)
    run = tuning(task)
    batches = [task.batch(draw) for draw in (0, 1)]
    wanted = sum(2 * (x * (0 * x - y)).mean() for x, y in batches) / 2
    assert run.advance()["gradient_norm"] == pytest.approx(abs(wanted.item()), rel=1e-5)


def test_what_is_logged_beside_the_loss_is_the_mean_over_the_draws_too():
    task = Line(draws=3)
    logs = tuning(task).advance()
    assert logs["target"] == pytest.approx(sum(task.batch(draw)[1].square().mean().item() for draw in range(3)) / 3)


@pytest.mark.parametrize("wrong", [{"betas": (0.9, 1.0)}, {"learning_rate": float("inf")}])
def test_a_schedule_that_can_only_fail_is_refused(wrong):
    with pytest.raises(ValidationError):
        StageSchedule(steps=1, **wrong)


def test_draws_that_cannot_be_shared_are_refused():
    with pytest.raises(ValueError, match="3 draws a step cannot be shared evenly by 2 workers"):
        tuning(Line(draws=3), workers=2)


def test_it_stops_when_validation_no_longer_falls():
    run = finish(tuning(Line(values=[1.0, 0.5, 0.6, 0.55, 0.1], patience=2, steps=40)))
    assert run.stopped_early and run.step == 16
    assert not finish(tuning(Line(values=[1.0, 0.5, 0.6, 0.4, 0.5], patience=2, steps=20))).stopped_early


def test_a_run_that_stopped_early_stays_stopped(tmp_path):
    run = finish(tuning(Line(values=[1.0, 2.0, 3.0], patience=1, steps=40)))
    run.save(tmp_path, run.engine.state())
    again = tuning(Line())
    again.load(tmp_path)
    assert again.done


def test_a_gradient_that_is_not_finite_stops_the_run():
    task = Line()
    task.module.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="line: the gradient at step 0 is not finite"):
        tuning(task).advance()


def test_a_checkpoint_of_another_task_is_refused(tmp_path):
    run = tuning(Line())
    run.save(tmp_path, run.engine.state())
    (tmp_path / "tuning.json").write_text(
        json.dumps(json.loads((tmp_path / "tuning.json").read_text()) | {"task": "other"})
    )
    with pytest.raises(ValueError, match="a checkpoint of task other, not of line"):
        tuning(Line()).load(tmp_path)


def test_frozen_weights_are_neither_trained_nor_kept():
    run = finish(tuning(Line()))
    assert run.task.module.frozen.item() == 1
    assert set(run.engine.state()) == {"weight.weight", "weight.exp_avg", "weight.exp_avg_sq"}
