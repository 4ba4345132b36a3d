"""MotionTransfer as a notebook uses it, on a tiny random Wan."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from safetensors.torch import save_file

import vmt_core
from support import tiny as models
from vmt_core import METHODS, Artifact, Backbone, MotionTransfer, Sampling
from vmt_core.adapters import masked_lora
from vmt_core.backbone.sampler import noise
from vmt_core.world import render, sample

SAMPLING = Sampling(steps=4, shift=3.0, guidance_scale=4.0)
SMALL = {"objective": {"block": 1}, "guidance": {"span": 0.5}}


def method(name, **changes):
    return METHODS[name](**(({} if name == "none" else SMALL) | changes))


def clip(seed=0, motion="line"):
    return render(sample(seed, motion=motion, frames=9, height=48, width=64))


@pytest.fixture(params=["none", "fastvmt", "ditflow"])
def name(request):
    return request.param


class WanSchedule(FlowMatchEulerDiscreteScheduler):
    """Wan's own sigmas, linear and then shifted; left alone, diffusers shifts the last one twice."""

    def set_timesteps(self, steps, device=None, **kwargs):
        super().set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1], device=device)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_plain_sampling_is_bit_equal_to_diffusers(tiny, folder, scale):
    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.scheduler = WanSchedule(shift=3.0)
    pipeline.set_progress_bar_config(disable=True)
    shape = (16, 3, 6, 8)
    theirs = pipeline(
        prompt="a red ball",
        negative_prompt="blurred",
        height=48,
        width=64,
        num_frames=9,
        num_inference_steps=4,
        guidance_scale=scale,
        latents=noise(5, shape)[0].unsqueeze(0),
        output_type="latent",
        return_dict=False,
    )[0]
    transfer = MotionTransfer(tiny, METHODS["none"](), Sampling(4, 3.0, scale))
    artifact = Artifact(torch.zeros(shape), tiny.caption(""))
    ours = transfer.denoise([artifact], [tiny.caption("a red ball")], [tiny.caption("blurred")], [5]).latents
    assert torch.equal(ours, theirs)


def test_in_bf16_latents_stay_in_fp32_where_diffusers_rounds_them(tiny_bf16, tiny, folder):
    """So ours are not theirs bit for bit, and nearer to what fp32 gives."""
    pipeline = WanPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    pipeline.vae.to(torch.float32)
    pipeline.scheduler = WanSchedule(shift=3.0)
    pipeline.set_progress_bar_config(disable=True)
    shape = (16, 3, 6, 8)
    theirs = pipeline(
        prompt="a red ball", height=48, width=64, num_frames=9, num_inference_steps=4, guidance_scale=1.0,
        latents=noise(5, shape)[0].unsqueeze(0), output_type="latent", return_dict=False,
    )[0]  # fmt: skip
    ours, exact = (
        MotionTransfer(backbone, METHODS["none"](), Sampling(4, 3.0, 1.0))
        .denoise(
            [Artifact(torch.zeros(shape), backbone.caption(""))],
            [backbone.caption("a red ball")],
            [backbone.caption("")],
            [5],
        )
        .latents
        for backbone in (tiny_bf16, tiny)
    )
    assert ours.dtype == torch.float32 and not torch.equal(ours, theirs.float())
    assert (ours - exact).square().mean() < (theirs.float() - exact).square().mean()


@torch.no_grad()
def test_captions_are_those_of_diffusers(tiny, folder):
    pipeline = WanPipeline.from_pretrained(folder)
    text = "A red ball,  on a <b>blue</b> floor &amp; more…"
    theirs, _ = pipeline.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=512)
    assert torch.equal(tiny.pad([tiny.caption(text)]), theirs)


@pytest.mark.parametrize(("backbone", "tolerance"), [("tiny_bf16", 0.0), ("tiny", 1e-4)])
@pytest.mark.parametrize(
    ("name", "preset"), [("none", "default"), ("fastvmt", "default"), ("ditflow", "default"), ("fastvmt", "paper")]
)
def test_a_row_is_the_same_alone_and_in_a_batch(request, backbone, tolerance, name, preset):
    """Bit for bit in bf16; in fp32 the matrix products of this CPU depend on the batch in their last bits."""
    backbone = request.getfixturevalue(backbone)
    transfer = MotionTransfer(backbone, method(name, preset=preset), SAMPLING)
    artifacts = [transfer.prepare(clip(seed)) for seed in range(4)]
    texts = [backbone.caption(text) for text in ("a", "a red ball", "a star at night", "")]
    negative = [backbone.caption("")] * 4
    batch = transfer.denoise(artifacts, texts, negative, [1, 2, 3, 4])
    for index in range(4):
        alone = transfer.denoise([artifacts[index]], [texts[index]], negative[:1], [index + 1])
        assert (alone.latents[0] - batch.latents[index]).abs().max() <= tolerance


def test_latents_come_out_the_same_twice(tiny, name):
    transfer = MotionTransfer(tiny, method(name), SAMPLING)
    artifact = transfer.prepare(clip())
    rows = [artifact] * 2, [tiny.caption("a")] * 2, [tiny.caption("")] * 2, [3, 4]
    first = transfer.denoise(*rows).latents
    assert torch.equal(first, transfer.denoise(*rows).latents)
    assert not torch.equal(first[0], first[1])
    assert first.dtype == torch.float32


def test_one_forward_for_both_halves_of_cfg_gives_the_latents_of_two(tiny):
    artifact = Artifact(torch.zeros(16, 3, 6, 8), tiny.caption(""))
    two, one = (
        MotionTransfer(tiny, METHODS["none"](), Sampling(4, 3.0, 4.0, cfg))
        .denoise([artifact] * 2, [tiny.caption("a"), tiny.caption("b")], [tiny.caption("")] * 2, [0, 1])
        .latents
        for cfg in ("two_pass", "batched")
    )
    assert torch.allclose(two, one, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_denoiser_calls_are_those_of_the_model(tiny, monkeypatch, scale):
    calls = []
    velocity = type(tiny).velocity
    monkeypatch.setattr(type(tiny), "velocity", lambda *args: calls.append(1) or velocity(*args))
    transfer = MotionTransfer(tiny, method("fastvmt"), Sampling(4, 3.0, scale))
    denoised = transfer.denoise([transfer.prepare(clip())], [tiny.caption("a")], [tiny.caption("")], [0])
    assert denoised.denoiser_calls == len(calls)


def test_videos_come_prompt_by_prompt_each_with_every_seed(tiny_bf16, name):
    transfer = MotionTransfer(tiny_bf16, method(name), SAMPLING)
    artifact = transfer.prepare(clip())
    videos = transfer.transfer(artifact, ["a red ball", "a star"], seeds=[0, 1])
    assert [video.shape for video in videos] == [(9, 3, 48, 64)] * 4
    assert all(video.dtype == torch.uint8 for video in videos)
    assert torch.equal(transfer.transfer(artifact, ["a star"], seeds=[1])[0], videos[3])


@pytest.mark.parametrize("kind", ["fastvmt", "ditflow"])
@pytest.mark.parametrize("nothing", [{"span": 0.0}, {"learning_rate": (0.0, 0.0)}])
def test_guidance_that_does_nothing_is_plain_sampling_bit_for_bit(tiny, kind, nothing):
    transfer = MotionTransfer(tiny, method(kind, guidance={"span": 0.5} | nothing), SAMPLING)
    artifact = transfer.prepare(clip())
    rows = [artifact], [tiny.caption("a red ball")], [tiny.caption("")], [5]
    plain = MotionTransfer(tiny, METHODS["none"](), SAMPLING).denoise(*rows).latents
    assert torch.equal(transfer.denoise(*rows).latents, plain)


@pytest.mark.parametrize("kind", ["fastvmt", "ditflow"])
@pytest.mark.parametrize("frames", [5, 13, 33])
def test_other_lengths_and_odd_grids_are_guided_as_well(tiny, kind, frames):
    transfer = MotionTransfer(tiny, method(kind, guidance={"span": 0.25}), SAMPLING)
    artifact = transfer.prepare(render(sample(2, motion="line", frames=frames, height=80, width=48)))  # tokens 5 x 3
    made = transfer.denoise([artifact], [tiny.caption("a")], [tiny.caption("")], [0])
    assert made.latents.shape == (1, 16, (frames - 1) // 4 + 1, 10, 6)
    assert made.latents.isfinite().all() and made.logs[0].skipped == 0 and min(made.logs[0].losses) > 0


@pytest.mark.parametrize("kind", ["fastvmt", "ditflow"])
def test_guidance_leaves_no_gradient_on_the_model(tiny, kind):
    transfer = MotionTransfer(tiny, method(kind), SAMPLING)
    transfer.denoise([transfer.prepare(clip())], [tiny.caption("a")], [tiny.caption("")], [0])
    assert not tiny.transformer.training
    assert all(weight.grad is None and not weight.requires_grad for weight in tiny.transformer.parameters())


@pytest.mark.parametrize("kind", ["fastvmt", "ditflow"])
def test_guidance_lowers_its_loss(tiny, kind):
    transfer = MotionTransfer(
        tiny, method(kind, guidance={"span": 0.5, "interval": 1, "learning_rate": (0.02, 0.02)}), SAMPLING
    )
    artifact = transfer.prepare(clip())
    caption = tiny.caption("a red ball")
    denoised = transfer.denoise([artifact], [caption], [tiny.caption("")], [0])
    (log,) = denoised.logs
    inner = transfer.method.guidance.inner
    assert log.losses[inner - 1] < log.losses[0]  # within the first guided step
    assert log.losses[-1] < log.losses[0]
    assert log.skipped == 0
    assert log.evaluations == transfer.method.guidance.evaluations(4) == len(log.losses)
    plain = MotionTransfer(tiny, METHODS["none"](), SAMPLING).denoise([artifact], [caption], [tiny.caption("")], [0])
    assert not torch.equal(plain.latents, denoised.latents)


def test_a_reference_at_the_steps_own_noise_level_is_read_anew_at_every_guided_step(tiny, monkeypatch):
    transfer = MotionTransfer(tiny, method("fastvmt", guidance={"level": "step", "span": 0.5}), SAMPLING)
    artifact = transfer.prepare(clip())
    assert artifact.motion == {}
    read = []
    motion = MotionTransfer._motion

    def spy(self, guidance, latents, *, sigma, empty):
        read.append((sigma, latents))
        return motion(self, guidance, latents, sigma=sigma, empty=empty)

    monkeypatch.setattr(MotionTransfer, "_motion", spy)
    (log,) = transfer.denoise([artifact], [tiny.caption("a")], [tiny.caption("")], [5]).logs
    assert [sigma for sigma, _ in read] == transfer.schedule.sigmas[:2].tolist()
    eps = noise(5, artifact.latents.shape, draws=2)[1]  # not the noise that sampling starts from
    for sigma, latents in read:
        assert torch.allclose(latents, (1 - sigma) * artifact.latents + sigma * eps, atol=1e-6)
    assert all(loss > 0 for loss in log.losses)


def test_sdedit_starts_from_the_noised_reference(tiny):
    transfer = MotionTransfer(tiny, METHODS["none"](start={"kind": "sdedit", "strength": 0.01}), Sampling(4, 3.0, 1.0))
    artifact = transfer.prepare(clip())
    latents = transfer.denoise([artifact], [tiny.caption("")], [tiny.caption("")], [0]).latents[0]
    assert (latents - artifact.latents).abs().mean() < 0.1  # hardly any noise was put in
    noisy = MotionTransfer(tiny, METHODS["none"](), Sampling(4, 3.0, 1.0))
    latents = noisy.denoise([artifact], [tiny.caption("")], [tiny.caption("")], [0]).latents[0]
    assert (latents - artifact.latents).abs().mean() > 0.5


def test_a_reference_has_no_influence_on_plain_sampling_from_noise(tiny):
    transfer = MotionTransfer(tiny, METHODS["none"](), SAMPLING)
    artifacts = [transfer.prepare(clip(seed)) for seed in (0, 1)]
    one, other = (transfer.denoise([a], [tiny.caption("a")], [tiny.caption("")], [0]).latents for a in artifacts)
    assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["fastvmt", "ditflow", "none"])
def test_an_artifact_survives_its_file(tiny, tmp_path, kind):
    artifact = MotionTransfer(tiny, method(kind), SAMPLING).prepare(clip())
    artifact.save(tmp_path / "a.safetensors")
    loaded = Artifact.load(tmp_path / "a.safetensors")
    assert loaded.objective == artifact.objective
    assert torch.equal(loaded.latents, artifact.latents)
    assert torch.equal(loaded.empty, artifact.empty)
    assert loaded.motion.keys() == artifact.motion.keys()
    assert all(torch.equal(loaded.motion[key], artifact.motion[key]) for key in loaded.motion)


@pytest.mark.parametrize("kind", ["fastvmt", "ditflow"])
def test_an_artifact_from_its_file_gives_the_same_video(tiny, tmp_path, kind):
    transfer = MotionTransfer(tiny, method(kind), SAMPLING)
    artifact = transfer.prepare(clip())
    artifact.save(tmp_path / "a.safetensors")
    (kept,), (loaded,) = (
        transfer.transfer(one, ["a red ball"], [3]) for one in (artifact, Artifact.load(tmp_path / "a.safetensors"))
    )
    assert torch.equal(kept, loaded)


def test_an_artifact_of_another_objective_is_refused(tiny):
    plain, windowed = (
        MotionTransfer(tiny, METHODS["none"](), SAMPLING),
        MotionTransfer(tiny, method("fastvmt"), SAMPLING),
    )
    other = MotionTransfer(tiny, method("fastvmt", objective={"block": 2}), SAMPLING)
    for artifact in (plain.prepare(clip()), other.prepare(clip())):
        with pytest.raises(ValueError, match=r"an artifact was described for .*, not for .*prepare it with this"):
            windowed.transfer(artifact, ["a"], [0])
    assert len(plain.transfer(windowed.prepare(clip()), ["a"], [0])) == 1  # sampling that is not guided reads no motion


def test_an_artifact_of_another_model_is_refused(tiny, tmp_path):
    """Latents, motion and its drift are in one model's terms, also where the objective is the same, or there is none."""
    other = Backbone.load(str(models.build(tmp_path / "other", seed=1)), dtype=torch.float32)
    for method in (
        METHODS["none"](start={"kind": "sdedit", "strength": 0.5}),
        METHODS["fastvmt"](objective={"block": 1}),
    ):
        frames = render(sample(0, frames=5, height=48, width=64))
        MotionTransfer(other, method).prepare(frames).save(tmp_path / "artifact.safetensors")
        artifact = Artifact.load(tmp_path / "artifact.safetensors")
        assert artifact.model == other.revision != tiny.revision
        with pytest.raises(ValueError, match=f"in terms of model {other.revision}, this is {tiny.revision}"):
            MotionTransfer(tiny, method).transfer(artifact, ["a red ball"], [0])


def test_a_file_that_is_no_artifact_is_named(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="holds no artifact, only weight"):
        Artifact.load(tmp_path / "w.safetensors")


def test_videos_are_the_same_in_batches_of_any_size(tiny):
    transfer = MotionTransfer(tiny, METHODS["none"](), SAMPLING)
    artifact = transfer.prepare(clip())
    one, all_ = (transfer.transfer(artifact, ["a", "b"], [0, 1], batch=batch) for batch in (1, 4))
    assert len(one) == len(all_) == 4
    for alone, together in zip(one, all_, strict=True):
        assert (alone.int() - together.int()).abs().max() <= 1  # products of matrices differ in their last bits


def test_one_artifact_serves_many_prompts_without_reading_the_model_again(tiny, monkeypatch):
    transfer = MotionTransfer(tiny, method("ditflow"), SAMPLING)
    artifact = transfer.prepare(clip())
    monkeypatch.setattr(type(tiny), "encode", None)
    assert len(transfer.transfer(artifact, ["a", "b"], seeds=[0])) == 2


def test_a_method_that_reads_a_block_beyond_the_model_is_refused_with_the_way_out(tiny):
    with pytest.raises(
        ValueError, match=r"fastvmt reads block 14, but this model has blocks 0\.\.2: use preset 'nano'"
    ):
        MotionTransfer(tiny, METHODS["fastvmt"]())


# tuned methods


TUNED = METHODS["follow_your_motion"](preset="nano", adapter={"tuning": {"rank": 2, "alpha": 2}, "spatial_scale": 0.5})


@pytest.fixture(scope="module")
def adapter(folder):
    """Weights of a spatial and a temporal adapter, as if tuned."""
    transformer = Backbone.load(str(folder), parts=("transformer",), dtype=torch.float32).transformer
    chosen = torch.tensor([[True, False]] * 3)
    found = {}
    for stage, heads in (("spatial", chosen), ("temporal", ~chosen)):
        masked_lora.add(transformer, stage, heads, rank=2, alpha=2)
        generator = torch.Generator().manual_seed(len(stage))
        found[stage] = {
            key: value if "lora_A" in key else 0.5 * torch.randn(value.shape, generator=generator)
            for key, value in masked_lora.state(transformer, stage).items()
        }
    return found


def test_an_adapter_that_was_attached_and_not_used_changes_nothing(wan, adapter):
    artifact = Artifact(torch.zeros(16, 3, 6, 8), wan.caption(""))
    arguments = [artifact], [wan.caption("a red ball")], [wan.caption("")], [5]
    plain = MotionTransfer(wan, METHODS["none"](), SAMPLING)
    before = plain.denoise(*arguments).latents
    MotionTransfer(wan, TUNED, SAMPLING, adapter)
    assert torch.equal(plain.denoise(*arguments).latents, before)


def test_a_training_under_way_changes_no_plain_video_and_goes_on(wan):
    artifact = Artifact(torch.zeros(16, 3, 6, 8), wan.caption(""))
    arguments = [artifact], [wan.caption("a red ball")], [wan.caption("")], [5]
    guided = MotionTransfer(wan, method("fastvmt", preset="nano"), SAMPLING)
    before = guided.denoise([guided.prepare(clip())], *arguments[1:]).latents
    heads = torch.ones(3, 2, dtype=torch.bool)
    masked_lora.add(wan.transformer, "spatial", heads, rank=2, alpha=2)
    masked_lora.isolate_norms(wan.transformer)
    for weight in masked_lora.parameters(wan.transformer, "spatial"):
        torch.nn.init.normal_(weight)
    trained = masked_lora.add(wan.transformer, "temporal", heads, rank=2, alpha=2)
    masked_lora.train_only(wan.transformer, "temporal", beside=["spatial"])
    inputs = torch.ones(1, 16, 3, 6, 8), torch.tensor([500.0]), wan.pad(arguments[1])
    tuned = wan.velocity(*inputs)
    assert torch.equal(guided.denoise([guided.prepare(clip())], *arguments[1:]).latents, before)
    assert torch.equal(wan.velocity(*inputs), tuned)
    assert {weight for weight in wan.transformer.parameters() if weight.requires_grad} == set(trained)


def hooks(module):
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


@pytest.mark.parametrize("broken", ["velocity", "features"])
def test_a_run_that_fails_leaves_the_model_as_it_was(wan, adapter, monkeypatch, broken):
    """Tuned with strict norms, which are hooks, and guided; it fails while it samples, or while it is guided."""
    strict = {"tuning": {"rank": 2, "alpha": 2, "isolate_qk_norm": True}}
    both = METHODS["follow_your_motion"](preset="nano", adapter=strict, objective={"block": 1}, guidance={"span": 0.5})
    tuned = MotionTransfer(wan, both, SAMPLING, adapter)
    artifact = tuned.prepare(clip())
    arguments = [artifact], [wan.caption("a red ball")], [wan.caption("")], [5]
    plain = MotionTransfer(wan, METHODS["none"](), SAMPLING)
    before, watched = plain.denoise(*arguments).latents, hooks(wan.transformer)

    def out_of_memory(*_, **__):
        assert hooks(wan.transformer) > watched
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(type(wan), broken, out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            tuned.denoise(*arguments)
    assert hooks(wan.transformer) == watched
    assert torch.equal(plain.denoise(*arguments).latents, before)


def test_each_transfer_on_a_backbone_has_its_own_adapter(wan, adapter):
    doubled = {stage: {name: 2 * value for name, value in weights.items()} for stage, weights in adapter.items()}
    artifact = Artifact(torch.zeros(16, 3, 6, 8), wan.caption(""))
    arguments = [artifact], [wan.caption("a red ball")], [wan.caption("")], [5]
    one = MotionTransfer(wan, TUNED, SAMPLING, adapter)
    first = one.denoise(*arguments).latents
    other = MotionTransfer(wan, TUNED, SAMPLING, doubled)
    assert torch.equal(one.denoise(*arguments).latents, first)
    assert not torch.allclose(other.denoise(*arguments).latents, first, atol=1e-3)


def test_an_adapter_that_fails_halfway_does_not_stand_for_another(wan, adapter, monkeypatch):
    artifact = Artifact(torch.zeros(16, 3, 6, 8), wan.caption(""))
    arguments = [artifact], [wan.caption("a red ball")], [wan.caption("")], [5]
    one = MotionTransfer(wan, TUNED, SAMPLING, adapter)
    first = one.denoise(*arguments).latents
    doubled = {stage: {name: 2 * value for name, value in weights.items()} for stage, weights in adapter.items()}
    broken = doubled | {"temporal": {name: value[:1, :1] for name, value in doubled["temporal"].items()}}
    with pytest.raises(ValueError, match="adapter temporal: "):
        MotionTransfer(wan, TUNED, SAMPLING, broken)
    assert torch.equal(one.denoise(*arguments).latents, first)


@pytest.mark.parametrize("stages", [[], ["temporal"]])
def test_half_an_adapter_is_refused(wan, adapter, stages):
    with pytest.raises(ValueError, match="has the stages spatial, temporal, not"):
        MotionTransfer(wan, TUNED, SAMPLING, {stage: adapter[stage] for stage in stages})


def test_an_artifact_says_whether_the_norms_were_strict(wan, adapter):
    """They change what is read from queries and keys."""
    changes = {"preset": "nano", "objective": {"block": 1}}
    loose, strict = (
        METHODS["follow_your_motion"](adapter={"tuning": {"rank": 2, "alpha": 2, "isolate_qk_norm": flag}}, **changes)
        for flag in (False, True)
    )
    artifact = MotionTransfer(wan, loose, SAMPLING, adapter).prepare(clip())
    with pytest.raises(ValueError, match="described for"):
        MotionTransfer(wan, strict, SAMPLING, adapter).denoise([artifact], [wan.caption("a")], [wan.caption("")], [5])


def test_looks_that_are_left_to_the_prompt_do_not_depend_on_the_spatial_adapter(wan, adapter):
    scaled = METHODS["follow_your_motion"](preset="nano", adapter={"tuning": {"rank": 2, "alpha": 2}})
    assert scaled.adapter.spatial_scale == 0
    artifact = Artifact(torch.zeros(16, 3, 6, 8), wan.caption(""))
    arguments = [artifact], [wan.caption("a red ball")], [wan.caption("")], [5]
    others = adapter | {"spatial": {name: 3 * value for name, value in adapter["spatial"].items()}}
    one, other = (
        MotionTransfer(wan, scaled, SAMPLING, weights).denoise(*arguments).latents for weights in (adapter, others)
    )
    assert torch.equal(one, other)


def test_an_adapted_video_is_that_of_a_plain_pipeline_with_the_exported_files(wan, folder, adapter, tmp_path):
    for stage, weights in adapter.items():
        masked_lora.write(weights, tmp_path / f"{stage}.safetensors", rank=2, alpha=2)
    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.scheduler = WanSchedule(shift=3.0)
    pipeline.set_progress_bar_config(disable=True)
    for stage in adapter:
        pipeline.load_lora_weights(tmp_path, weight_name=f"{stage}.safetensors", adapter_name=stage)
    pipeline.set_adapters(["spatial", "temporal"], [0.5, 1.0])
    shape = (16, 3, 6, 8)
    theirs = pipeline(
        prompt="a red ball", negative_prompt="", height=48, width=64, num_frames=9, num_inference_steps=4, guidance_scale=4.0,
        latents=noise(5, shape)[0].unsqueeze(0), output_type="latent", return_dict=False,
    )[0]  # fmt: skip
    artifact = Artifact(torch.zeros(shape), wan.caption(""))
    arguments = [artifact], [wan.caption("a red ball")], [wan.caption("")], [5]
    plain = MotionTransfer(wan, METHODS["none"](), SAMPLING).denoise(*arguments).latents
    ours = MotionTransfer(wan, TUNED, SAMPLING, adapter).denoise(*arguments).latents
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, plain, atol=1e-2)
    assert torch.equal(
        MotionTransfer(wan, METHODS["none"](), SAMPLING).denoise(*arguments).latents, plain
    )  # all off again


def test_a_method_may_be_tuned_and_guided(wan, adapter):
    both = METHODS["follow_your_motion"](
        preset="nano", adapter={"tuning": {"rank": 2, "alpha": 2}}, objective={"block": 1}, guidance={"span": 0.5}
    )
    transfer = MotionTransfer(wan, both, SAMPLING, adapter)
    artifact = transfer.prepare(clip())
    made = transfer.denoise([artifact], [wan.caption("a red ball")], [wan.caption("")], [0])
    assert made.logs[0].evaluations == 8
    described = MotionTransfer(wan, method("fastvmt", preset="nano"), SAMPLING).prepare(clip())  # by the model as it is
    with pytest.raises(ValueError, match="an artifact was described for"):
        transfer.denoise([described], [wan.caption("a")], [wan.caption("")], [0])
    alone = MotionTransfer(wan, TUNED, SAMPLING, adapter)
    assert alone.denoise([artifact], [wan.caption("a red ball")], [wan.caption("")], [0]).logs[0].evaluations == 0


def test_an_adapter_is_wanted_where_it_is_needed_and_nowhere_else(wan, adapter):
    with pytest.raises(ValueError, match="follow_your_motion needs an adapter that was tuned on the reference"):
        MotionTransfer(wan, TUNED, SAMPLING)
    with pytest.raises(ValueError, match="none has no use for an adapter"):
        MotionTransfer(wan, METHODS["none"](), SAMPLING, adapter)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"shift": 0}, {"guidance_scale": -1}, {"cfg": "both"}])
def test_sampling_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match="steps >= 1, shift > 0, guidance_scale >= 0, cfg two_pass or batched"):
        Sampling(**wrong)


def test_a_model_is_sampled_as_it_is_made_for(tiny):
    assert MotionTransfer(tiny, METHODS["none"]()).sampling == Sampling(50, 5.0, 5.0)
    nano = Backbone.load("wan-nano", parts=("transformer",))
    assert MotionTransfer(nano, METHODS["none"]()).sampling == Sampling(20, 3.0, 4.0)
    assert (nano.checkpoint_policy, tiny.checkpoint_policy) == ("none", "selective")


@pytest.mark.parametrize("arguments", [("a red ball", [0]), (["a red ball"], 0), (["a red ball"], [0], "", 0)])
def test_prompts_and_seeds_are_lists(tiny, arguments):
    with pytest.raises(ValueError, match="prompts and seeds are lists, batch is at least 1"):
        MotionTransfer(tiny, METHODS["none"](), SAMPLING).transfer(None, *arguments)


def test_a_file_that_holds_no_tensors_is_no_artifact(tmp_path):
    (tmp_path / "a").write_text("no tensors")
    with pytest.raises(ValueError, match="a: is no safetensors file"):
        Artifact.load(tmp_path / "a")


def test_what_a_notebook_finds_in_the_package():
    assert set(dir(vmt_core)) == set(vmt_core.__all__)
    assert all(getattr(vmt_core, name) is not None for name in vmt_core.__all__)
    assert callable(vmt_core.video.read)
