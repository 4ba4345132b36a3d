"""DeepSpeed as the engine of tuning: any ZeRO stage and any number of workers is plain AdamW."""

import pytest
import torch
from torch import nn

from pipelines import distributed
from pipelines.engine import DeepSpeedEngine, configuration
from schemas import DeepSpeedSettings
from support import tiny, workers
from vmt_core import Backbone
from vmt_core.adapters import follow_your_motion as method
from vmt_core.adapters.settings import FollowYourMotion
from vmt_core.tuning import StageSchedule, TorchEngine, Tuning
from vmt_core.world import render, sample


class Net(nn.Module):
    """A frozen layer, and two that are trained, as a base with its adapters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(8, 16).requires_grad_(False)
        self.first, self.second = nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x, y):
        x, y = x.to(self.frozen.weight.dtype), y.to(self.frozen.weight.dtype)
        loss = (self.second(torch.tanh(self.first(self.frozen(x)))) - y).float().square().mean()
        return loss, {}


class Fit:
    name = "fit"

    def __init__(self):
        self.schedule = StageSchedule(steps=6, learning_rate=0.02, warmup=2, draws=2, validate_every=3)
        self.module = Net()

    def batch(self, draw):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(draw))
        return x, x[:, :4]

    def validate(self):
        return 0.0


def train(rank, count, settings, folder, stop):
    """A run of 6 steps that is stopped after `stop` and continued by a fresh engine; its curve and final weights."""
    for last in (stop, 6):
        task = Fit()
        engine = DeepSpeedEngine(task.module, task.schedule, settings, workers=count, device=torch.device("cpu"))
        run = Tuning(task, engine, rank=rank, workers=count, mean=distributed.mean)
        if last == 6 and stop:
            run.load(folder)
        while run.step < last:
            run.advance()
        state = engine.state()
        if rank == 0:
            run.save(folder, state)
        distributed.barrier()
    return [point.loss for point in run.curve], {name: value.numpy() for name, value in state.items()}


@pytest.fixture(scope="module")
def plain():
    """What AdamW in one process gives."""
    task = Fit()
    run = Tuning(task, TorchEngine(task.module, task.schedule, torch.device("cpu")))
    while not run.done:
        run.advance()
    return [point.loss for point in run.curve], run.engine.state()


@pytest.mark.parametrize(
    ("count", "zero", "offload", "stop"),
    [
        (1, 0, False, 3),
        (1, 0, True, 3),
        (1, 2, False, 3),
        (2, 0, False, 0),
        (2, 1, False, 3),
        (2, 2, True, 3),
        (2, 3, False, 3),
    ],
)
def test_every_zero_stage_and_number_of_workers_gives_the_same_run_resumed_or_not(
    plain, tmp_path, count, zero, offload, stop
):
    results = workers.run(train, count, DeepSpeedSettings(zero=zero, offload=offload), tmp_path, stop)
    for losses, state in results:
        assert losses == pytest.approx(plain[0], rel=1e-4)
        assert set(state) == set(plain[1])
        for name, value in plain[1].items():
            assert torch.allclose(torch.from_numpy(state[name]), value, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize(("zero", "offload"), [(0, False), (2, True)])
def test_bf16_has_fp32_masters(plain, tmp_path, zero, offload):
    """Zero 0 in bf16 is the default on GPUs."""
    settings = DeepSpeedSettings(zero=zero, bf16=True, offload=offload)
    ((losses, state),) = workers.run(train, 1, settings, tmp_path, 3)
    assert set(state) == set(plain[1])
    assert losses == pytest.approx(plain[0], rel=0.05)
    weight = torch.from_numpy(state["first.weight.weight"])
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())


def adapters(rank, count, settings, folder, engine=None):
    """Both adapters of a clip on a tiny Wan; their weights and validation losses."""
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    whole = Backbone.load(folder, dtype=torch.float32)
    prepared = method.prepare(whole, render(sample(3, motion="line", frames=17, height=64, width=64)), "a red square")
    short = {"steps": 3, "warmup": 1, "draws": 2, "learning_rate": 1e-3, "validate_every": 3}
    tuning = FollowYourMotion.preset("nano", rank=4, alpha=4, spatial=short, temporal=short)
    types = method.head_types(whole, prepared, tuning)
    done, losses = {}, []
    for name in ("spatial", "temporal"):
        backbone = Backbone.load(folder, parts=("transformer",), dtype=dtype, checkpoint_policy="selective")
        task = method.begin(backbone, name, prepared, types, tuning, done)
        device = torch.device("cpu")
        made = (
            TorchEngine(task.module, task.schedule, device)
            if engine == "torch"
            else DeepSpeedEngine(task.module, task.schedule, settings, workers=count, device=device)
        )
        run = Tuning(task, made, rank=rank, workers=count, mean=distributed.mean)
        while not run.done:
            run.advance()
        done[name] = method.weights(made.state(), name, tuning)
        losses.append(run.curve[-1].validation)
    return {f"{name}.{key}": value.numpy() for name, weights in done.items() for key, value in weights.items()}, losses


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A tiny Wan, and its adapters as AdamW in one process makes them."""
    folder = str(tiny.build(tmp_path_factory.mktemp("model") / "tiny"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "mean", lambda value: value)
        return folder, adapters(0, 1, DeepSpeedSettings(), folder, "torch")


@pytest.mark.parametrize(("count", "zero", "bf16"), [(2, 3, False), (1, 0, True)], ids=["two workers", "bf16"])
def test_both_adapters_of_a_clip_are_those_of_plain_adamw(wan, count, zero, bf16):
    folder, (weights, losses) = wan
    (found, measured), *rest = workers.run(adapters, count, DeepSpeedSettings(zero=zero, bf16=bf16), folder)
    assert found.keys() == weights.keys()
    assert measured == pytest.approx(losses, rel=0.02 if bf16 else 1e-4)
    for name, value in weights.items():
        assert abs(value).max() > 0  # trained, B as well
        assert (found[name][value == 0] == 0).all()  # nothing at the other heads
        if not bf16:
            assert abs(found[name] - value).max() < 1e-5, name
    for other, _ in rest:  # every worker has all of it
        assert all((other[name] == found[name]).all() for name in found)


def test_settings_become_deepspeeds_own():
    made = configuration(StageSchedule(steps=1, draws=4), DeepSpeedSettings(zero=3, offload=True), 2, bf16=True)
    assert made["gradient_accumulation_steps"] == 2
    assert made["zero_optimization"]["stage"] == 3
    assert made["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert made["bf16"] == {"enabled": True}


@pytest.mark.parametrize(
    ("settings", "bf16", "expected"),
    [({}, False, 0), ({}, True, 1), ({"offload": True}, False, 1), ({"zero": 2, "offload": True}, True, 2)],
    ids=["nothing parted", "masters", "an optimizer elsewhere", "as was said"],
)
def test_masters_and_optimizers_elsewhere_are_those_of_zero(settings, bf16, expected):
    made = configuration(StageSchedule(steps=1), DeepSpeedSettings(**settings), 1, bf16=bf16)
    assert made["zero_optimization"]["stage"] == expected
