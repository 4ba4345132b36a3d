"""The training loop on a problem of a few numbers, and both stages on models of a few weights."""

import json
from copy import deepcopy
from random import Random

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from torch import nn

from vmt_core import Backbone
from vmt_core.pretraining import export, loop, pool
from vmt_core.pretraining import vae as autoencoder
from vmt_core.pretraining.ahead import Helpers
from vmt_core.pretraining.dit import BODIES, GPU_MORE_PHASES, MORE_PHASES, NAMED_BLOCK, NAMING, DitLoss, DitStage
from vmt_core.pretraining.dit import PHASES as PHASES_OF_CLIPS
from vmt_core.pretraining.loop import Phase, Run
from vmt_core.pretraining.vae import DecoderStage, VaeStage, crop, look_at_one_frame, pixels
from vmt_core.world import Scene, render, sample, split
from vmt_core.world.judge import KINDS
from vmt_core.world.render import masks
from vmt_core.world.spec import Background, Object
from vmt_core.world.spec import Line as Straight

PHASES = (Phase(30, ((4, 1, 1, 1),), 0.1, warmup=5), Phase(20, ((4, 1, 1, 1),), 0.05, warmup=2, decay_to=0.0))


class Line(nn.Module):
    """y = a x + b, with the loss inside."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x):
        error = (self.layer(x) - (3 * x + 1)).square().mean()
        return error, {"error": error.detach()}


class LineStage:
    name, ema_decay, phases = "line", 0.9, PHASES

    def __init__(self, name="line"):
        torch.manual_seed(0)
        self.name, self.module = name, Line()

    def optimizers(self):
        return [
            torch.optim.AdamW([self.module.layer.weight], lr=1.0),
            torch.optim.SGD([self.module.layer.bias], lr=1.0),
        ]

    def batch(self, step, rank):
        return (torch.randn(16, 1, generator=torch.Generator().manual_seed(1000 * rank + step)),)

    def validate(self, module):
        return {"error": module(torch.linspace(-1, 1, 9)[:, None])[1]["error"]}


def trained(run, **options):
    seen = []
    loop.train(run, minutes=options.pop("minutes", 5), report=lambda logs, save: seen.append((logs, save)), **options)
    return seen


def weights(run):
    return torch.cat(
        [
            value.flatten()
            for value in [*run.stage.module.state_dict().values(), *run.average.module.state_dict().values()]
        ]
    )


def test_it_learns_validates_and_saves_at_the_end():
    run = Run(LineStage())
    seen = trained(run, validate_every=20)
    assert run.done
    assert [logs["step"] for logs, _ in seen] == list(range(1, 51))
    assert seen[-1][0]["loss"] < 0.2 * seen[0][0]["loss"]
    validated = [logs["step"] for logs, _ in seen if "validation/error" in logs]
    assert validated == [20, 40, 50]
    assert [save for _, save in seen] == [False] * 49 + [True]


def test_a_run_that_goes_on_is_the_run_that_never_stopped(tmp_path):
    whole = Run(LineStage())
    trained(whole)
    first = Run(LineStage())
    for _ in range(23):
        first.train_step()
    first.save(tmp_path / "saved")
    again = Run(LineStage())
    again.load(tmp_path / "saved")
    assert again.step == 23
    trained(again)
    assert torch.equal(weights(again), weights(whole))


def test_time_is_kept_and_what_was_done_is_saved():
    run = Run(LineStage())
    seen = trained(run, minutes=0)
    assert run.step == 1
    assert seen[-1][1]
    assert all(save for _, save in trained(Run(LineStage()), checkpoint_minutes=0))


def test_nothing_is_done_where_nothing_is_left():
    run = Run(LineStage())
    run.step = 50
    assert trained(run) == []


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    Run(LineStage()).save(tmp_path / "saved")
    with pytest.raises(ValueError, match="a checkpoint of stage line, not of circle"):
        Run(LineStage("circle")).load(tmp_path / "saved")
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state | {"stage": "vae"}))
    with pytest.raises(ValueError, match="not of this architecture"):
        Run(VaeStage()).load(tmp_path / "saved")


def test_a_gradient_that_is_not_finite_stops_the_training():
    run = Run(LineStage())
    run.stage.batch = lambda step, rank: (torch.full((4, 1), float("inf")),)
    with pytest.raises(FloatingPointError, match="line: the gradient at step 0 is not finite"):
        run.train_step()


def test_learning_rates_warm_up_and_decay_in_each_phase():
    rates = [loop.learning_rate(PHASES, step) for step in range(50)]
    assert rates[0] == pytest.approx(0.02)
    assert max(rates) <= 0.1
    assert rates[29] == pytest.approx(0.1 * 0.1, rel=0.05)
    assert rates[30] == pytest.approx(0.025)
    assert rates[49] < 0.001
    assert loop.scaled(PHASES, 0.1)[0].steps == 3


def test_the_moving_average_forgets_its_beginning():
    update = loop.moving_average(0.9)
    mean = [torch.tensor(100.0)]
    for count in range(1, 60):
        update(mean, [torch.tensor(1.0)], count)
    assert mean[0] == pytest.approx(1.0, abs=0.3)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A VAE of one training step, as `save_vae` writes it."""
    folder = tmp_path_factory.mktemp("vae")
    run = Run(VaeStage(phases=(Phase(1, ((1, 5, 32, 32),), 1e-3),)))
    run.train_step()
    export.save_vae(run.average.module, folder, clips=3)
    return AutoencoderKLWan.from_pretrained(folder)


def test_the_statistics_make_latents_of_unit_variance(few):
    clips = [pixels(render(sample(20 * index, height=128, width=128))).unsqueeze(0) for index in range(3)]
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (few.config.latents_mean, few.config.latents_std)
    )
    with torch.no_grad():
        latents = torch.cat([(few.encode(clip).latent_dist.mode() - mean) / std for clip in clips])
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.ones(16), atol=1e-3, rtol=0)


def test_a_decoder_is_trained_on_for_latents_that_stay_what_they_are(few):
    vae = deepcopy(few)
    run = Run(DecoderStage(vae, phases=(Phase(2, ((1, 5, 32, 32),), 1e-3, warmup=1),)))
    for _ in range(2):
        run.train_step()
    before = few.state_dict()
    changed = {name.split(".")[0] for name, value in vae.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"decoder", "post_quant_conv"}
    assert {name.split(".")[0] for name in before} > changed  # the encoder's are there, too


def test_a_fresh_autoencoder_treats_every_frame_alike():
    """So a still clip decodes without flicker before anything of time was learnt."""
    vae = VaeStage().module.vae.eval()
    still = pixels(render(sample(0, frames=1, height=32, width=32))).unsqueeze(0)
    with torch.no_grad():
        one = vae.decode(vae.encode(still).latent_dist.mode()).sample
        many = vae.decode(vae.encode(still.expand(-1, -1, 9, -1, -1)).latent_dist.mode()).sample
    torch.testing.assert_close(many, one.expand_as(many), atol=1e-4, rtol=1e-3)
    usual = AutoencoderKLWan(**{name: vae.config[name] for name in ("base_dim", "z_dim", "dim_mult", "num_res_blocks")},
                             temperal_downsample=[True, True], in_channels=12, out_channels=12, patch_size=2)  # fmt: skip
    with torch.no_grad():
        many = usual.decode(usual.encode(still.expand(-1, -1, 9, -1, -1)).latent_dist.mode()).sample
        assert many.diff(dim=2).abs().mean() > 1e-3
        look_at_one_frame(usual)
        many = usual.decode(usual.encode(still.expand(-1, -1, 9, -1, -1)).latent_dist.mode()).sample
        assert many.diff(dim=2).abs().max() < 1e-4


def test_an_autoencoder_is_trained_on_from_its_weights(few):
    stage = VaeStage()
    stage.start_from(few)
    assert stage.module.vae is few
    assert stage.phases == autoencoder.PHASES[-1:]  # of a CPU


@pytest.mark.parametrize(
    "phases",
    [
        autoencoder.PHASES, autoencoder.DECODER_PHASES, autoencoder.GPU_MORE_PHASES, autoencoder.GPU_DECODER_PHASES,
        PHASES_OF_CLIPS, MORE_PHASES, GPU_MORE_PHASES,
    ],
)  # fmt: skip
def test_every_clip_is_of_a_size_that_the_model_takes(phases):
    for phase in phases:
        for _, frames, height, width in phase.clips:
            assert frames % 4 == 1
            assert height % 16 == width % 16 == 0


@pytest.mark.parametrize("phases", [autoencoder.PHASES, autoencoder.GPU_MORE_PHASES, autoencoder.GPU_DECODER_PHASES])
def test_the_autoencoder_sees_every_length_on_offer_to_the_end(phases):
    assert {frames for _, frames, *_ in phases[-1].clips} == {1, 9, 17, 33}  # it does not extrapolate in time


def test_crops_are_of_train_scenes_and_some_stand_still():
    clips = [crop(Random(index), 5, 64, 64) for index in range(60)]
    assert all(clip.shape == (3, 5, 64, 64) and clip.abs().max() <= 1 for clip in clips)
    still = sum(bool((clip == clip[:, :1]).all()) for clip in clips)
    assert 4 <= still < 50


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(pool, "CLIPS_A_SHARD", 4)
    monkeypatch.setattr(pool, "FIRST_SHARDS", 1)
    monkeypatch.setattr(pool, "MOST_SHARDS", 2)


DIT = (Phase(3, ((2, 5, 32, 32),), 1.0, warmup=1), Phase(2, ((1, 5, 32, 48),), 0.5, warmup=1))


def test_the_transformer_trains_resumes_and_becomes_a_model(few, small, tmp_path):
    whole = Run(DitStage(few, tmp_path / "latents", phases=DIT))
    seen = trained(whole, validate_every=5)
    assert {"validation/loss", "validation/loss_wrong_captions"} <= set(seen[-1][0])
    half = Run(DitStage(few, tmp_path / "others", phases=DIT))
    half.train_step()
    half.train_step()
    half.save(tmp_path / "saved")
    assert max(file.stat().st_size for file in (tmp_path / "saved").iterdir()) < 16 * 2**20
    again = Run(DitStage(few, tmp_path / "third", phases=DIT))
    again.load(tmp_path / "saved")
    trained(again)
    assert torch.equal(weights(again), weights(whole))
    export.save_pipeline(again.average.module, few, tmp_path / "model")
    size = sum(file.stat().st_size for file in (tmp_path / "model").rglob("*") if file.is_file())
    assert size < 24 * 2**20
    made = WanPipeline.from_pretrained(tmp_path / "model")(
        "a red circle", height=32, width=32, num_frames=5, num_inference_steps=1, output_type="pt"
    )
    assert made.frames.shape == (1, 5, 3, 32, 32)
    assert Backbone.load(str(tmp_path / "model")).caption("a red circle").shape == (4, 128)
    more = DitStage(few, tmp_path / "latents")
    more.start_from(tmp_path / "model")
    assert more.phases == MORE_PHASES
    for name in ("transformer", "text"):
        kept, taken = (getattr(module, name).state_dict() for module in (again.average.module, more.module))
        assert all(torch.equal(taken[key], kept[key].bfloat16().float()) for key in kept)


@pytest.mark.parametrize("phases", [PHASES_OF_CLIPS, MORE_PHASES, GPU_MORE_PHASES])
def test_validation_is_on_clips_that_move(few, tmp_path, monkeypatch, phases):
    stage = DitStage(few, tmp_path, phases=phases)

    class Asked(Exception):
        pass

    def ask(size, clips):
        raise Asked(size)

    monkeypatch.setattr(stage.pool, "validation", ask)
    with pytest.raises(Asked) as asked:
        stage.validate(stage.module)
    assert asked.value.args == ((17, 192, 192),)


def test_more_training_starts_with_the_clips_of_the_run_before(few, tmp_path, monkeypatch):
    stage = DitStage(few, tmp_path, phases=MORE_PHASES)
    steps = []

    def drawn(random, step, count, size, *, renew):
        steps.append(step)
        raise KeyboardInterrupt

    monkeypatch.setattr(stage.pool, "draw", drawn)
    for step in (0, 7):
        with pytest.raises(KeyboardInterrupt):
            stage.batch(step, 0)
    assert steps == [MORE_PHASES[0].before, MORE_PHASES[0].before + 7]


def test_the_pool_is_renewed_and_follows_from_the_step(few, small, tmp_path):
    size = (5, 32, 32)
    first = pool.LatentPool(few, tmp_path / "a")
    latents, kinds, seeds = first.draw(Random(1), 0, 6, size, renew=2)
    assert latents.shape == (6, 16, 2, 4, 4)
    assert kinds.shape == (6, 2, 2, 2)
    assert {split(seed) for seed in seeds} == {"train"}
    assert len(set(seeds)) <= 4
    _, _, later = first.draw(Random(1), 8, 6, size, renew=2)
    assert not set(later) & set(seeds)
    again, _, same = pool.LatentPool(few, tmp_path / "b").draw(Random(1), 8, 6, size, renew=2)
    assert same == later
    torch.testing.assert_close(again, first.draw(Random(1), 8, 6, size, renew=2)[0])
    folder = next((tmp_path / "a").rglob("5x32x32"))
    assert len(list(folder.iterdir())) == 2  # older ones are gone
    held, validation = first.validation(size, 4)
    assert {split(seed) for seed in validation} == {"val"}
    assert len(held) == len(validation) == 4


def test_helpers_change_nothing_of_what_is_trained_on(few, small, tmp_path):
    helpers, size = Helpers(1), (5, 32, 32)
    drawn = [
        pool.LatentPool(few, tmp_path / name, helpers=some).draw(Random(1), 4, 6, size, renew=2)
        for name, some in (("alone", None), ("helped", helpers))
    ]
    assert drawn[0][2] == drawn[1][2]
    assert all(torch.equal(one, other) for one, other in zip(drawn[0][:2], drawn[1][:2], strict=True))
    phases = (Phase(3, ((2, 5, 32, 32), (1, 1, 32, 32)), 1e-3),)
    stages = [VaeStage(phases=phases, helpers=some) for some in (None, helpers)]
    for step in range(3):
        assert torch.equal(*(stage.batch(step, 0)[0] for stage in stages))


def test_captions_belong_to_their_clips(few, small, tmp_path):
    """The caption of a drawn clip is that of the scene that was encoded, whatever its size."""
    stage = DitStage(few, tmp_path, phases=(Phase(5, ((3, 5, 32, 64),), 1.0),))
    size = (5, 32, 64)
    latents, kinds, seeds = stage.pool.draw(Random(0), 0, 3, size, renew=2)
    for latent, shown, seed in zip(latents, kinds, seeds, strict=True):
        scene = sample(seed, frames=5, height=32, width=64)
        assert torch.equal(shown, pool.seen(scene))
        with torch.no_grad():
            mode = few.encode(pixels(render(scene)).unsqueeze(0)).latent_dist.mode()[0]
        mean, std = (
            torch.tensor(values).view(-1, 1, 1, 1) for values in (few.config.latents_mean, few.config.latents_std)
        )
        torch.testing.assert_close(latent, ((mode - mean) / std), atol=0.15, rtol=0.05)
        assert scene.background.pattern in stage._caption(seed, size)


def test_tokens_know_what_they_show():
    """A token shows what covers some of its 16 by 16 pixels in some of its frames; the first frame has tokens of its own."""
    path = Straight(start=(-0.25, -0.25), end=(0.25, 0.25))
    cross = Object(shape="cross", colour="red", size=0.1, path=path)
    scene = Scene(
        category="single", motion="line", bodies=(cross,), background=Background(pattern="plain", colour="gray"),
        frames=5, height=64, width=128,
    )  # fmt: skip
    kinds = pool.seen(scene)
    assert kinds.shape == (2, 4, 8)
    assert {int(kind) for kind in kinds.unique()} == {0, KINDS.index("cross")}
    whole = masks(scene) >= 0
    for row in range(4):
        for col in range(8):
            cell = whole[:, 16 * row : 16 * row + 16, 16 * col : 16 * col + 16].float().mean((1, 2))
            if cell[0] > 0.2 or cell[0] == 0:
                assert (kinds[0, row, col] > 0) == (cell[0] > 0)
            if cell[1:].max() > 0.2 or cell[1:].max() == 0:
                assert (kinds[1, row, col] > 0) == (cell[1:].max() > 0)


def test_errors_near_bodies_count_more_where_their_place_can_be_known():
    torch.manual_seed(0)
    loss = DitLoss()
    latents, noise = torch.randn(2, 1, 16, 1, 8, 8)
    ids, mask = torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.long)
    kinds = torch.zeros(1, 1, 4, 4, dtype=torch.int8)
    kinds[0, 0, 0, 0] = 3
    for level, factor in ((0.5, BODIES), (0.9, 1.0)):
        sigma = torch.tensor([level])
        squared = loss.errors(latents, noise, sigma, ids, mask)[0, 0]
        near = torch.zeros(4, 4, dtype=torch.bool)
        near[:2, :2] = True
        weight = torch.where(near, factor, 1.0)
        total, logs = loss(latents, noise, sigma, ids, mask, kinds)
        expected = (weight * squared).sum() / weight.sum() + NAMING * logs["naming"]
        assert total.item() == pytest.approx(expected.item(), rel=1e-4)
        assert logs["velocity"] == pytest.approx(squared.mean().item(), rel=1e-4)
    total.backward()
    assert loss.namer.weight.grad.abs().sum() > 0
    assert loss.transformer.blocks[NAMED_BLOCK]._forward_hooks == {}
