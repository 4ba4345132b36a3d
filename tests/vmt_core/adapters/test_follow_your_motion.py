"""The stages of Follow-Your-Motion."""

import math
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vmt_core import Backbone
from vmt_core.adapters import follow_your_motion as fym
from vmt_core.adapters import masked_lora
from vmt_core.adapters.follow_your_motion import Prepared, loss_weight, motion_loss
from vmt_core.adapters.settings import VALIDATION_SIGMAS, FollowYourMotion
from vmt_core.backbone.sampler import shifted
from vmt_core.tuning import StageSchedule, TorchEngine, Tuning
from vmt_core.world import render, sample

SETTINGS = FollowYourMotion.preset("nano", rank=4, alpha=4)


def settings(**changes):
    return FollowYourMotion.preset("nano", **{"rank": 4, "alpha": 4, **changes})


def task(name, wan, prepared, chosen=SETTINGS):
    return fym.TASKS[name](wan.transformer, prepared, chosen, wan.pad([prepared.text]))


# settings


def test_presets_are_what_they_say():
    paper, code = FollowYourMotion.preset("paper"), FollowYourMotion.preset("code")
    assert (paper.rank, paper.spatial.steps, paper.temporal.steps, paper.sparse) == (128, 3000, 2000, "pixel")
    assert code.targets == ("to_q", "to_k", "to_v") and code.sparse == "off" and code.motion_loss == "vmc"
    assert (code.spatial.weight_decay, code.temporal.weight_decay) == (0.1, 0.5)
    assert FollowYourMotion.preset() == FollowYourMotion()


def test_changes_of_a_schedule_leave_the_rest_of_it():
    changed = FollowYourMotion.preset("code", temporal={"steps": 7})
    assert (changed.temporal.steps, changed.temporal.weight_decay) == (7, 0.5)
    assert FollowYourMotion.preset(temporal={"steps": 7}).temporal == StageSchedule(steps=7, validate_every=250)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0},
        {"alpha": 0},
        {"targets": ()},
        {"stride": 0},
        {"sparse": "some"},
        {"temporal": {"steps": 0}},
        {"ranks": 1},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        FollowYourMotion.preset("default", **wrong)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="preset 'best' is not one of default, paper, code, nano"):
        FollowYourMotion.preset("best")


# sparse sampling and positions


@given(st.integers(2, 40), st.integers(1, 8), st.integers(0, 10_000))
def test_sampled_frames_are_sorted_unique_in_range_and_start_at_the_first(frames, stride, seed):
    chosen = FollowYourMotion(stride=stride)
    drawn = chosen.indices(frames, torch.Generator().manual_seed(seed))
    assert drawn == sorted(set(drawn)) and drawn[0] == 0 and drawn[-1] < frames
    assert len(drawn) == min(frames, max(3, (frames - 1) // stride + 1))
    assert drawn == chosen.indices(frames, torch.Generator().manual_seed(seed))


def test_the_even_grid_of_21_latents_is_that_of_the_paper():
    assert FollowYourMotion().indices(21) == [0, 5, 10, 15, 20]


def test_every_latent_is_trained_on_at_some_time():
    generator = torch.Generator().manual_seed(0)
    seen = {index for _ in range(300) for index in FollowYourMotion().indices(21, generator)}
    assert seen == set(range(21))


def test_positions_of_every_kind():
    indices = [0, 5, 10, 15, 20]
    assert FollowYourMotion().temporal_positions(indices, 21) == indices
    assert FollowYourMotion(positions="paper").temporal_positions(indices, 21) == pytest.approx(
        [0, 4.2, 8.4, 12.6, 16.8]
    )
    assert FollowYourMotion(positions="aligned").temporal_positions(indices, 21) == pytest.approx(indices)
    assert FollowYourMotion(positions="stock").temporal_positions(indices, 21) is None
    assert FollowYourMotion(sparse="off").temporal_positions(list(range(21)), 21) is None
    assert FollowYourMotion(sparse="pixel", positions="aligned").temporal_positions([*range(5)], 21) == pytest.approx(
        indices
    )


@pytest.mark.parametrize("frames", [25, 33, 49, 65, 81])
def test_exact_positions_of_a_thinned_clip_are_where_its_frames_were(frames):
    """Also where it was cut to 4k+1: latent j of every fifth frame ends at frame 20 j, which is latent 5 j of the clip."""
    thinned = (len(range(0, frames, 5)) - 1) // 4 + 1
    found = FollowYourMotion(sparse="pixel").temporal_positions([*range(thinned)], (frames - 1) // 4 + 1)
    assert found == [5 * j for j in range(thinned)]


@given(st.integers(1, 100), st.integers(1, 100), st.integers(0, 99))
def test_the_papers_formula_is_a_stretching(whole, count, index):
    """f(F/2 + F/F' (i - F'/2)) of the paper is i F/F'."""
    index = min(index, count - 1)
    found = FollowYourMotion(sparse="pixel", positions="paper").temporal_positions([*range(count)], whole)
    assert found[index] == pytest.approx(whole / 2 + whole / count * (index - count / 2))


@pytest.mark.parametrize("frames", [21, 25, 33, 49, 65, 81])
def test_aligned_positions_end_where_the_last_frame_was(frames):
    whole, thinned = (frames - 1) // 4 + 1, (len(range(0, frames, 5)) - 1) // 4 + 1
    pixel = FollowYourMotion(sparse="pixel", positions="aligned").temporal_positions([*range(thinned)], whole)
    assert (pixel[0], pixel[-1]) == (0, 5 * (thinned - 1))
    chosen = FollowYourMotion(positions="aligned")
    latent = chosen.temporal_positions(chosen.indices(whole), whole)
    assert (latent[0], latent[-1]) == (0, whole - 1)


@pytest.mark.parametrize("frames", range(1, 41))
def test_draws_are_of_frames_far_apart_one_of_each_part_of_the_clip(frames):
    chosen = FollowYourMotion()
    even = chosen.indices(frames)
    count = min(frames, max(3, (frames - 1) // 5 + 1))
    assert len(even) == count and even[0] == 0 and even[-1] == frames - 1
    generator = torch.Generator().manual_seed(0)
    draws = [chosen.indices(frames, generator) for _ in range(400)]
    edges = torch.linspace(1, frames, count).floor().int().tolist()
    for draw in draws:
        assert draw[0] == 0 and sorted(set(draw)) == draw and len(draw) == count
        if draw != even:
            assert all(low <= index < high for low, high, index in zip(edges[:-1], edges[1:], draw[1:], strict=True))
    if frames > 12:
        assert 0.4 < sum(draw == even for draw in draws) / len(draws) < 0.65


@pytest.mark.parametrize("positions", ["aligned", "paper"])
def test_frames_of_even_positions_are_those_of_the_even_grid(positions):
    chosen, generator = FollowYourMotion(positions=positions), torch.Generator().manual_seed(0)
    assert {tuple(chosen.indices(21, generator)) for _ in range(20)} == {(0, 5, 10, 15, 20)}


# prepared references


def test_a_reference_is_prepared_once_and_comes_back(tiny, prepared, tmp_path):
    assert prepared.latents.shape == (16, 5, 8, 8)
    assert prepared.frames.shape == (17, 16, 8, 8)
    assert prepared.thinned.shape == (16, 2, 8, 8)  # 17 frames, every fourth: 5
    assert torch.allclose(prepared.frames[0], prepared.latents[:, 0], atol=1e-5)  # Wan's first latent is of one frame
    clip = render(sample(3, category="single", motion="line", frames=17, height=64, width=64))
    assert all(
        torch.allclose(prepared.frames[at], tiny.encode(clip[at : at + 1])[:, 0], atol=1e-5) for at in (1, 9, 16)
    )
    assert torch.allclose(prepared.thinned, tiny.encode(clip[::4].contiguous()), atol=1e-5)
    prepared.save(tmp_path / "prepared.safetensors")
    again = Prepared.load(tmp_path / "prepared.safetensors")
    assert all(torch.equal(getattr(again, name), value) for name, value in vars(prepared).items())
    other = fym.prepare(tiny, clip, "a red square")
    other.save(tmp_path / "prepared.safetensors")
    assert other.thinned is None is Prepared.load(tmp_path / "prepared.safetensors").thinned
    with pytest.raises(ValueError, match="prepared with a stride"):
        fym.head_types(tiny, other, settings(sparse="pixel"))


@pytest.mark.parametrize("stride", [1, 2, 3, 5, 7, 16, 40])
def test_the_thinned_clip_has_4k_plus_1_frames(tiny, stride):
    clip = render(sample(0, frames=17, height=32, width=32))
    assert fym.prepare(tiny, clip, "a", stride).thinned.shape[1] == max(1, (-(-17 // stride) - 1) // 4 + 1)


@pytest.mark.parametrize(
    ("frames", "caption", "words"), [(1, "a", "1 frames; tuning needs at least 5"), (5, " \n", "caption is empty")]
)
def test_what_cannot_be_tuned_on_is_refused(tiny, frames, caption, words):
    with pytest.raises(ValueError, match=words):
        fym.prepare(tiny, render(sample(0, frames=frames, height=32, width=32)), caption, 5)


# loss


def test_the_weight_is_a_bell_of_mean_one_over_the_drawn_levels():
    levels = shifted(torch.arange(1, 1001) / 1000, 5.0)
    weight = loss_weight(levels, 5.0)
    assert weight.mean().item() == pytest.approx(1, abs=1e-3)
    assert weight.min().item() >= -1e-6 and weight.argmin() == 999
    known = {0.9: 0.63, 0.75: 1.46, 0.5: 2.08, 0.25: 1.46, 0.05: 0.31}  # of the published code
    assert loss_weight(torch.tensor(list(known)), 5.0).tolist() == pytest.approx(list(known.values()), abs=0.01)


def test_flat_weighting_counts_every_level_alike_and_the_bell_next_to_nothing_near_noise(tiny, prepared):
    losses = {}
    for weighting in ("bell", "flat"):
        made = task("spatial", tiny, prepared, settings(weighting=weighting))
        latents, noise, _, text = made.batch(0)
        for sigma in (0.999, 0.5):
            losses[weighting, sigma], _ = made.module(latents, noise, torch.full((len(latents),), sigma), text)
    assert losses["bell", 0.999] < 0.02 * losses["flat", 0.999]
    assert losses["bell", 0.5] > losses["flat", 0.5]


@pytest.fixture
def velocity():
    return torch.randn(2, 4, 5, 3, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["signed", "vmc", "debias", "off"])
def test_motion_loss_is_zero_at_the_truth_and_for_stills(velocity, kind):
    assert motion_loss(velocity, velocity, kind).tolist() == pytest.approx([0, 0], abs=1e-5)
    still = velocity[:, :, :1].expand_as(velocity)
    assert motion_loss(still, still, kind).tolist() == pytest.approx([0, 0], abs=1e-5)


def test_motion_loss_is_signed_and_blind_to_size(velocity):
    other = torch.randn(velocity.shape, generator=torch.Generator().manual_seed(1))
    assert motion_loss(-velocity, velocity, "signed").tolist() == pytest.approx([2, 2], abs=1e-5)
    assert torch.allclose(motion_loss(other, velocity, "signed"), motion_loss(7 * other, velocity, "signed"), atol=1e-5)
    assert torch.allclose(
        motion_loss(-velocity, velocity, "vmc"), torch.zeros(2), atol=1e-5
    )  # the published code's is not


def test_motion_loss_has_a_finite_gradient_where_nothing_moves(velocity):
    for kind in ("signed", "vmc", "debias"):
        still = torch.zeros_like(velocity).requires_grad_()
        motion_loss(still, velocity, kind).sum().backward()
        assert still.grad.isfinite().all()


# tasks


def test_spatial_draws_are_single_frames_of_the_clip(wan, prepared):
    latents, noise, sigma, text = task("spatial", wan, prepared).batch(3)
    assert latents.shape == noise.shape == (8, 16, 1, 8, 8)
    assert sigma.shape == (8,) and text.shape[:2] == (8, 512)
    assert all(any(torch.equal(one[:, 0], frame) for frame in prepared.frames) for one in latents)


def test_temporal_draws_are_latents_of_the_clip_at_their_places(wan, prepared):
    for draw in range(10):
        latents, *_, positions, _ = task("temporal", wan, prepared).batch(draw)
        assert latents.shape == (4, 16, 3, 8, 8)
        assert torch.equal(latents[0], prepared.latents[:, [int(place) for place in positions]])


def test_pixel_draws_are_the_thinned_clip(wan, prepared):
    latents, *_, positions, _ = task("temporal", wan, prepared, settings(sparse="pixel", positions="paper")).batch(0)
    assert torch.equal(latents[0], prepared.thinned)
    assert positions == pytest.approx([0, 2.5])


def test_noise_levels_are_uniform_before_the_shift(wan, prepared):
    stage = task("spatial", wan, prepared, settings(frames_a_draw=1000, shift=5.0))
    sigma = stage.batch(0)[2]
    uniform = sigma / (5 - 4 * sigma)  # sigma = 5 u / (1 + 4 u)
    assert ((uniform >= 0) & (uniform <= 1)).all()
    assert torch.allclose(uniform.quantile(torch.tensor([0.25, 0.5, 0.75])), torch.tensor([0.25, 0.5, 0.75]), atol=0.05)


def test_the_loss_is_the_weighted_sum_of_both_parts_of_each_clip(wan, prepared, monkeypatch):
    stage = task("temporal", wan, prepared, settings(motion_weight=0.3, weighting="bell"))
    latents, noise, sigma, text, positions, anchor = stage.batch(0)
    predicted, velocity = noise - 0.5 * latents, noise - latents
    monkeypatch.setattr(stage.module, "velocity", lambda *_: (predicted, velocity))
    loss, logs = stage.module(latents, noise, sigma, text, positions, anchor)
    squared = (0.5 * latents).square().flatten(1).mean(1)
    motion = motion_loss(predicted, velocity, "signed")
    wanted = (loss_weight(sigma, stage.settings.shift) * (squared + 0.3 * motion)).mean()
    assert len(sigma) > 1 and loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert logs["loss_mse"].item() == pytest.approx(squared.mean().item(), rel=1e-5)
    assert logs["loss_motion"].item() == pytest.approx(motion.mean().item(), rel=1e-5)


def test_weights_have_alpha_over_rank_folded_in(wan, prepared):
    chosen = settings(rank=4, alpha=8, temporal={"steps": 2, "warmup": 0})
    types = fym.head_types(wan, prepared, chosen)
    stage = fym.begin(wan, "temporal", prepared, types, chosen, {})
    run = Tuning(stage, TorchEngine(stage.module, stage.schedule, wan.device))
    while not run.done:
        run.advance()
    wan.transformer.disable_gradient_checkpointing()
    with_adapter = stage.validate()
    found = fym.weights(run.engine.state(), "temporal", chosen)
    masked_lora.attach(wan.transformer, "temporal", found)
    masked_lora.use(wan.transformer, {"temporal": 1.0})
    assert stage.validate() == pytest.approx(with_adapter, rel=1e-5)


def test_the_temporal_stage_leaves_the_spatial_adapter_as_it_was(wan, prepared):
    chosen = settings(spatial={"steps": 2, "warmup": 0}, temporal={"steps": 2, "warmup": 0})
    types, done = fym.head_types(wan, prepared, chosen), {}
    for name in ("spatial", "temporal"):
        stage = fym.begin(wan, name, prepared, types, chosen, done)
        run = Tuning(stage, TorchEngine(stage.module, stage.schedule, wan.device))
        while not run.done:
            run.advance()
        done[name] = fym.weights(run.engine.state(), name, chosen)
    kept = masked_lora.state(wan.transformer, "spatial")
    assert kept.keys() == done["spatial"].keys()
    assert all(torch.equal(kept[key], value) for key, value in done["spatial"].items())
    assert any(value.any() for key, value in done["spatial"].items() if "lora_B" in key)
    assert any(value.any() for key, value in done["temporal"].items() if "lora_B" in key)
    assert all(weight.grad is None for weight in masked_lora.parameters(wan.transformer, "spatial"))


@pytest.mark.parametrize("name", ["spatial", "temporal"])
def test_a_resumed_stage_ends_with_the_weights_of_one_that_was_not_stopped(wan, fresh, prepared, tmp_path, name):
    chosen = settings(**{name: {"steps": 4, "warmup": 1, "validate_every": 2}})
    types = fym.head_types(wan, prepared, chosen)

    def begun(backbone):
        stage = fym.begin(backbone, name, prepared, types, chosen, {})
        return Tuning(stage, TorchEngine(stage.module, stage.schedule, backbone.device))

    whole = begun(wan)
    for step in range(4):
        whole.advance()
        if step == 1:
            whole.save(tmp_path / "half", whole.engine.state())
    resumed = begun(fresh)
    resumed.load(tmp_path / "half")
    while not resumed.done:
        resumed.advance()
    one, other = whole.engine.state(), resumed.engine.state()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert whole.curve == resumed.curve


def test_heads_can_come_from_a_file(tiny, prepared, tmp_path):
    types = fym.head_types(tiny, prepared, SETTINGS)
    turned = types.model_copy(update={"spatial": [[not head for head in row] for row in types.spatial]})
    turned.save(tmp_path / "heads.json")
    chosen = settings(head_rule="file", head_file=str(tmp_path / "heads.json"))
    assert fym.head_types(tiny, prepared, chosen) == turned
    for wrong in ({"head_rule": "file"}, {"head_file": "heads.json"}):
        with pytest.raises(ValidationError, match="give both, or neither"):
            settings(**wrong)


def test_head_types_are_those_of_one_model(tiny, prepared, tmp_path):
    types = fym.head_types(tiny, prepared, SETTINGS)
    assert types.model == tiny.revision != ""
    types.model_copy(update={"model": "0" * 16}).save(tmp_path / "heads.json")
    with pytest.raises(ValueError, match=f"head types of model 0000000000000000, this one is {tiny.revision}"):
        fym.head_types(tiny, prepared, settings(head_rule="file", head_file=str(tmp_path / "heads.json")))


def test_another_seed_is_another_training(wan, fresh, prepared):
    """Seed 0 is what there was before there were seeds."""
    types, found = fym.head_types(wan, prepared, SETTINGS), []
    for seed, backbone in ((0, wan), (1, fresh)):
        stage = fym.begin(backbone, "temporal", prepared, types, settings(seed=seed), {})
        found.append((stage.batch(3), masked_lora.state(backbone.transformer, "temporal")))
    (one, weights), (two, others) = found
    assert not torch.equal(one[1], two[1]) and not torch.equal(one[2], two[2])
    assert any(not torch.equal(weights[key], others[key]) for key in weights)
    latents, noise, *_ = task("temporal", wan, prepared, settings(sparse="off")).batch(3)
    assert torch.equal(noise, torch.randn(latents.shape, generator=torch.Generator().manual_seed(7)))


def test_a_draw_follows_from_its_number(wan, prepared):
    one, same, other = (task("temporal", wan, prepared).batch(draw) for draw in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(one[:3], same[:3], strict=True))
    assert not torch.equal(one[1], other[1])


def test_the_loss_is_zero_for_the_true_velocity(wan, prepared, monkeypatch):
    chosen = task("temporal", wan, prepared)
    latents, noise, sigma, text, positions, anchor = chosen.batch(0)
    monkeypatch.setattr(chosen.module, "velocity", lambda *_: (noise - latents, noise - latents))
    loss, logs = chosen.module(latents, noise, sigma, text, positions, anchor)
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert logs["loss_motion"] == pytest.approx(0, abs=1e-5)


def test_sixty_steps_on_a_moving_square_lower_the_loss_of_the_whole_clip_too(wan, prepared):
    """Trained on sparse frames, validated on all of them at stock positions."""
    chosen = settings(temporal={"steps": 60, "learning_rate": 3e-3, "validate_every": 60})
    types = fym.head_types(wan, prepared, chosen)
    masked_lora.add(wan.transformer, "temporal", types.group("temporal"), rank=4, alpha=4)
    stage = task("temporal", wan, prepared, chosen)
    before = stage.validate()
    run = Tuning(stage, TorchEngine(stage.module, stage.schedule, wan.device))
    while not run.done:
        run.advance()
    losses = [point.loss for point in run.curve]
    assert sum(losses[-15:]) < sum(losses[:15])
    assert run.curve[-1].validation < before - 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparse": "pixel"}, "every 5-th of the clip's 17 frames are too few to move; sparse pixel needs 21 frames"),
        ({"motion_loss": "vmc", "sparse": "off"}, "motion_loss vmc compares .*, of 2 latents there is one difference"),
    ],
)
def test_what_the_temporal_stage_cannot_do_is_refused_before_the_spatial_one_is_trained(
    tiny, prepared, changes, message
):
    short = replace(prepared, thinned=prepared.thinned[:, :1], latents=prepared.latents[:, :2])
    with pytest.raises(ValueError, match=message):
        fym.head_types(tiny, short, settings(stride=5, **changes))


@pytest.mark.parametrize(("spatial", "missing"), [(True, "temporal"), (False, "spatial")])
def test_heads_of_one_kind_alone_are_refused_unless_both_adapters_are_on_all(
    tiny, prepared, tmp_path, spatial, missing
):
    types = fym.head_types(tiny, prepared, SETTINGS)
    types.model_copy(update={"spatial": [[spatial for _ in row] for row in types.spatial]}).save(
        tmp_path / "heads.json"
    )
    chosen = {"head_rule": "file", "head_file": str(tmp_path / "heads.json")}
    with pytest.raises(ValueError, match=f"finds no {missing} head"):
        fym.head_types(tiny, prepared, settings(**chosen))
    assert fym.head_types(tiny, prepared, settings(decouple=False, **chosen)).layers == types.layers


def test_a_backbone_can_be_tuned_on_again_and_keeps_nothing_of_the_last_time(wan, fresh, prepared):
    """Another reference's adapter, of a transfer, and strict norms, which are hooks, were on it."""
    strict, types = settings(isolate_qk_norm=True), fym.head_types(fresh, prepared, SETTINGS)
    fym.begin(wan, "spatial", prepared, types, strict, {})
    wan.adapter = {"spatial": {}, "temporal": {}}
    found = []
    for backbone in (wan, fresh):
        stage = fym.begin(backbone, "spatial", prepared, types, SETTINGS, {})
        assert list(backbone.transformer.peft_config) == ["spatial"] and backbone.adapter is None
        assert not any(norm._forward_hooks for block in backbone.transformer.blocks for norm in [block.attn1.norm_q])
        found.append(stage.validate())
    assert found[0] == found[1]


def test_the_anchor_of_debias_is_drawn(wan, prepared):
    stage = task("temporal", wan, prepared, settings(motion_loss="debias"))
    assert len({stage.batch(draw)[-1] for draw in range(20)}) > 1
    predicted, velocity = torch.randn(2, 1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    error = predicted - velocity
    for anchor in range(3):
        wanted = (math.sqrt(2) * error - error[:, :, anchor : anchor + 1]).square().mean()
        assert motion_loss(predicted, velocity, "debias", anchor).item() == pytest.approx(wanted.item())


def test_debias_forgives_what_all_frames_have_in_common():
    """An error that is the same in all frames counts by (sqrt(2) - 1)^2, one of its own in each frame by 3 - 2 sqrt(2) / F."""
    generator = torch.Generator().manual_seed(0)
    constant = torch.randn(1, 16, 1, 32, 32, generator=generator).expand(-1, -1, 8, -1, -1)
    own = torch.randn(1, 16, 8, 32, 32, generator=generator)
    for error, share in ((constant, (math.sqrt(2) - 1) ** 2), (own, 3 - 2 * math.sqrt(2) / 8)):
        found = motion_loss(error, torch.zeros_like(error), "debias", 3).item()
        assert found / error.square().mean().item() == pytest.approx(share, rel=0.02)


@given(st.integers(0, 10_000), st.integers(-3, 3), st.integers(-3, 3))
def test_the_signed_motion_loss_is_between_0_and_2(seed, size, other_size):
    generator = torch.Generator().manual_seed(seed)
    one, other = (torch.randn(2, 4, 3, 2, 2, generator=generator) * 10.0**power for power in (size, other_size))
    found = motion_loss(one, other, "signed")
    assert ((found >= -1e-6) & (found <= 2 + 1e-6)).all()


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_strict_norms_are_trained_alike_under_every_checkpoint_policy(wan, fresh, prepared, policy):
    chosen = settings(isolate_qk_norm=True, spatial={"steps": 2, "warmup": 0})
    types, found = fym.head_types(wan, prepared, chosen), []
    for backbone, name in ((wan, "none"), (fresh, policy)):
        backbone.checkpoint_policy = name
        stage = fym.begin(backbone, "spatial", prepared, types, chosen, {})
        run = Tuning(stage, TorchEngine(stage.module, stage.schedule, backbone.device))
        while not run.done:
            run.advance()
        found.append(masked_lora.state(backbone.transformer, "spatial"))
    assert any(value.any() for key, value in found[0].items() if "lora_B" in key)
    assert all(torch.allclose(found[1][key], value, atol=1e-6) for key, value in found[0].items())


def test_strict_norms_are_used_in_training(wan, prepared):
    types = fym.head_types(wan, prepared, SETTINGS)
    for strict in (False, True):
        name = f"temporal_{strict}"
        masked_lora.add(wan.transformer, name, types.group("temporal"), rank=4, alpha=4, seed=1)
        stage = task("temporal", wan, prepared, settings(isolate_qk_norm=strict, temporal={"steps": 3, "warmup": 0}))
        run = Tuning(stage, TorchEngine(stage.module, stage.schedule, wan.device))
        while not run.done:
            run.advance()
    loose, tight = (masked_lora.state(wan.transformer, f"temporal_{strict}") for strict in (False, True))
    assert not all(torch.allclose(loose[key], tight[key], atol=1e-7) for key in loose)


def test_attention_is_most_of_what_sparse_frames_save():
    """FLOPs of a forward of Wan 1.3B at 480x832, without weights: 81 frames against 17."""
    from diffusers import WanTransformer3DModel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        transformer = WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30)
    counts = {}
    for frames in (21, 5, 1):
        with FlopCounterMode(display=False) as counter:
            transformer(
                torch.empty(1, 16, frames, 60, 104, device="meta"),
                torch.empty(1, device="meta"),
                torch.empty(1, 512, 4096, device="meta"),
            )
        counts[frames] = counter.get_total_flops() / 1e12
    assert counts[21] == pytest.approx(283.0, rel=0.01)
    assert counts[5] == pytest.approx(31.6, rel=0.01)
    assert counts[1] == pytest.approx(4.65, rel=0.02)
    assert counts[21] / counts[5] >= 8.5


# what the transformer sees, and what of it is trained


class Seen(NamedTuple):
    """Of a call of the transformer."""

    latents: torch.Tensor
    timestep: torch.Tensor
    text: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]
    output: torch.Tensor


@contextmanager
def watched(transformer):
    """Everything that goes into the transformer and comes out of it."""
    calls, tables = [], []
    rope = transformer.blocks[0].register_forward_pre_hook(lambda _, inputs: tables.append(inputs[3]))

    def keep(_module, inputs, kwargs, output):
        calls.append(Seen(*inputs, tables[-1], output[0]))

    whole = transformer.register_forward_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        rope.remove()
        whole.remove()


def test_the_transformer_sees_frames_at_their_noise_level_and_place(wan, prepared):
    stage = task("temporal", wan, prepared)
    latents, noise, sigma, text, positions, _ = stage.batch(4)
    assert positions != [0, 1, 2]
    with watched(wan.transformer) as calls:
        predicted, velocity = stage.module.velocity(latents, noise, sigma, text, positions)
    (seen,) = calls
    s = sigma.view(-1, 1, 1, 1, 1)
    assert torch.equal(seen.latents, (1 - s) * latents + s * noise)
    assert torch.equal(seen.timestep, 1000 * sigma)
    assert torch.equal(seen.text, text)
    assert torch.equal(predicted, seen.output) and torch.equal(velocity, noise - latents)
    stock = wan.transformer.rope(prepared.latents.unsqueeze(0))
    for found, whole in zip(seen.rotary, stock, strict=True):
        places = whole.unflatten(1, (prepared.latents.shape[1], -1))[:, [int(place) for place in positions]]
        assert torch.equal(found, places.flatten(1, 2))


@pytest.mark.parametrize("name", ["spatial", "temporal"])
def test_validation_sees_all_of_the_clip_at_fixed_noise_levels_as_inference_does(wan, prepared, name):
    stage = task(name, wan, prepared)
    with watched(wan.transformer) as calls:
        losses = [stage.validate() for _ in range(2)]
    assert losses[0] == losses[1]
    sigmas = [float(call.timestep[0]) / 1000 for call in calls]
    assert sigmas == pytest.approx(VALIDATION_SIGMAS * 2) and len(set(VALIDATION_SIGMAS)) > 2
    clean = prepared.latents if name == "temporal" else prepared.frames[0].unsqueeze(1)
    stock = wan.transformer.rope(clean.unsqueeze(0))
    noises = []
    for call, sigma in zip(calls, sigmas, strict=True):
        assert call.latents.shape[1:] == clean.shape
        assert all(torch.equal(*tables) for tables in zip(call.rotary, stock, strict=True))
        noises.append((call.latents[0] - (1 - sigma) * clean) / sigma)
        assert torch.allclose(noises[-1], noises[0], atol=1e-4)
    wanted = [(call.output - (noises[0] - clean)).square().mean() for call in calls[:4]]
    if name == "temporal":
        assert losses[0] == pytest.approx(float(torch.stack(wanted).mean()), rel=1e-3)


@pytest.mark.parametrize("decouple", [True, False])
@pytest.mark.parametrize("name", ["spatial", "temporal"])
def test_each_stage_trains_its_own_heads_of_the_chosen_projections_alone(wan, prepared, name, decouple):
    chosen = settings(decouple=decouple, targets=("to_q", "to_v"))
    types = fym.head_types(wan, prepared, chosen)
    stage = fym.begin(wan, name, prepared, types, chosen, {})
    loss, _ = stage.module(*stage.batch(0))
    loss.backward()
    trained = {path for path, weight in wan.transformer.named_parameters() if weight.requires_grad}
    heads = types.group(name if decouple else "all")
    places = [layer for layer, row in enumerate(heads) if row.any()]
    assert {tuple(path.split(".")[1:4]) for path in trained} == {
        (str(layer), "attn1", target) for layer in places for target in ("to_q", "to_v")
    }
    for layer in places:
        value = wan.transformer.blocks[layer].attn1.to_v.lora_B[name].weight
        moved = value.grad.unflatten(0, (wan.transformer.config.num_attention_heads, -1)).flatten(1).any(1)
        assert torch.equal(moved, heads[layer])


def test_the_temporal_stage_is_trained_with_the_spatial_adapter_at_work(wan, fresh, prepared):
    types = fym.head_types(wan, prepared, SETTINGS)
    fym.begin(fresh, "spatial", prepared, types, SETTINGS, {})
    done = {name: torch.randn_like(value) for name, value in masked_lora.state(fresh.transformer, "spatial").items()}
    plain = task("temporal", wan, prepared).validate()
    begun = fym.begin(wan, "temporal", prepared, types, SETTINGS, {"spatial": done}).validate()
    masked_lora.clear(wan.transformer)
    masked_lora.attach(wan.transformer, "spatial", done)
    masked_lora.use(wan.transformer, {"spatial": 1.0})
    assert begun == pytest.approx(task("temporal", wan, prepared).validate(), rel=1e-5)  # its own is nothing yet
    assert abs(begun - plain) > 1e-3


@pytest.mark.parametrize("policy", ["none", "full"])
def test_the_backward_pass_recomputes_what_the_backbone_says(wan, prepared, policy):
    wan.checkpoint_policy = policy
    stage = fym.begin(wan, "spatial", prepared, fym.head_types(wan, prepared, SETTINGS), SETTINGS, {})
    passes = []
    wan.transformer.blocks[-1].attn1.register_forward_pre_hook(lambda *_: passes.append(1))
    stage.module.train()
    loss, _ = stage.module(*stage.batch(0))
    loss.backward()
    assert len(passes) == {"none": 1, "full": 2}[policy]


def test_adapters_are_fp32_on_a_bf16_base(folder, prepared):
    backbone = Backbone.load(str(folder), parts=("transformer", "text"), dtype=torch.bfloat16)
    stage = fym.begin(backbone, "spatial", prepared, fym.head_types(backbone, prepared, SETTINGS), SETTINGS, {})
    assert {weight.dtype for weight in stage.module.parameters() if weight.requires_grad} == {torch.float32}
    loss, _ = stage.module(*stage.batch(0))
    assert loss.dtype == torch.float32


def test_draws_show_every_frame_under_ever_new_noise(wan, prepared):
    spatial, temporal = task("spatial", wan, prepared), task("temporal", wan, prepared)
    batches = [spatial.batch(draw) for draw in range(12)]
    shown = torch.cat([latents[:, :, 0] for latents, *_ in batches])
    assert all(any(torch.equal(frame, one) for one in shown) for frame in prepared.frames)
    for noises in (
        torch.cat([noise for _, noise, *_ in batches]),
        torch.cat([temporal.batch(draw)[1] for draw in range(6)]),
    ):
        assert len(noises.flatten(1)[:, :3].unique(dim=0)) == len(noises)
    assert len(torch.cat([sigma for *_, sigma, _ in batches]).unique()) == sum(len(batch[0]) for batch in batches)


def test_vmc_compares_how_much_each_place_changes_from_frame_to_frame(velocity):
    other = torch.randn(velocity.shape, generator=torch.Generator().manual_seed(1))
    one, two = velocity.diff(dim=2).abs(), other.diff(dim=2).abs()
    agreement = torch.nn.functional.cosine_similarity(one, two, dim=2)
    wanted = (1 - agreement).flatten(1).mean(1)
    assert torch.allclose(motion_loss(velocity, other, "vmc"), wanted, atol=1e-5)
