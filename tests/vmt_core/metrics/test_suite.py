"""All metrics of a video together, and the leak of a background."""

import math

import pytest
import torch
from safetensors.torch import save_file

from vmt_core.metrics import encoders, leak
from vmt_core.metrics.suite import CORE, MODELS, NON_COMMERCIAL, Reference, Suite, Video
from vmt_core.world import appearance, render, sample


@pytest.fixture(scope="module")
def scene():
    return sample(4, category="single", motion="line", frames=9, height=128, width=128)


def test_a_video_that_is_its_reference_agrees_with_it(scene):
    frames = render(scene)
    values, reasons = Suite().measure(Video(frames, Reference(frames, scene), appearance(scene)))
    assert set(values) == set(CORE)
    assert set(reasons) == set(MODELS | NON_COMMERCIAL)
    assert values["motion_matched"] > 0.9
    assert values["background_leak"] == pytest.approx(1.0)
    assert values["moving_reference"] == pytest.approx(0.08, abs=0.04)  # of 121 points, exactly
    assert all("no " in reason for reason in reasons.values())


def test_exact_motion_of_a_pan_is_found_by_flow():
    scene = sample(19, category="camera", motion="pan", frames=17, height=128, width=128)
    values, _ = Suite().measure(Video(render(scene), Reference(render(scene), scene), ""))
    assert values["motion"] > 0.9


def test_without_exact_tracks_the_reference_is_tracked_as_well(scene):
    frames = render(scene)
    values, _ = Suite().measure(Video(frames, Reference(frames), ""))
    assert values["motion"] == pytest.approx(1.0)


def test_what_is_undefined_or_raises_is_absent_with_the_reason(scene):
    still = render(scene)[:1].expand(9, -1, -1, -1).contiguous()
    values, reasons = Suite().measure(Video(still, Reference(still), ""))
    assert "motion" not in values
    assert "nothing moves" in reasons["motion"]
    values, reasons = Suite().measure(Video(still[:2], Reference(still[:2]), ""))
    assert "needs at least 3" in reasons["smoothness"]
    assert values["background_leak"] == pytest.approx(1.0)


def test_each_metric_of_a_model_is_that_of_its_own_features(scene, clip_folder, dino_folder, tmp_path):
    save_file({"weight": torch.randn(1, 24), "bias": torch.ones(1)}, tmp_path / "head.safetensors")
    clip, dino = encoders.Clip(clip_folder), encoders.Dino(dino_folder)
    head = encoders.AestheticHead(tmp_path / "head.safetensors")
    frames = torch.randint(0, 256, (5, 3, 48, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    video = Video(frames, Reference(frames), "red circle")
    values, reasons = Suite(clip=clip, dino=dino, aesthetic_clip=clip, aesthetic_head=head).measure(video)
    assert not reasons.keys() & MODELS.keys()
    plain, vbench = clip.images(frames), clip.images(frames, antialias=False)
    assert {name: values[name] for name in MODELS} == {
        "text_similarity": encoders.text_similarity(plain, clip.text("red circle")),
        "temporal_consistency": encoders.temporal_consistency(plain),
        "subject_consistency": encoders.vbench_consistency(dino.images(frames)),
        "background_consistency": encoders.vbench_consistency(vbench),
        "aesthetic_quality": head.score(vbench),
    }
    assert len({round(values[name], 6) for name in MODELS}) == len(MODELS)


class Raises:
    def __init__(self, error):
        self.error = error

    def images(self, frames, **_):
        raise self.error


def test_a_metric_that_fails_does_not_take_the_others_along(scene):
    frames = render(scene)
    values, reasons = Suite(clip=Raises(ValueError("too dark"))).measure(Video(frames, Reference(frames, scene), ""))
    assert set(values) == set(CORE)
    assert reasons["text_similarity"] == "ValueError: too dark"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: unspecified")]
)
def test_what_says_nothing_of_the_video_is_not_kept_as_its_result(scene, error):
    frames = render(scene)
    with pytest.raises(type(error)):
        Suite(clip=Raises(error)).measure(Video(frames, Reference(frames, scene), ""))


# leak


def test_ssim_of_known_images():
    one = torch.full((1, 32, 32), 100.0)
    assert leak.ssim(one, one).mean().item() == pytest.approx(1)
    c = (0.01 * 255) ** 2
    assert leak.ssim(one, one + 50).mean().item() == pytest.approx(
        (2 * 100 * 150 + c) / (100**2 + 150**2 + c), abs=1e-4
    )
    noise = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(0)) * 255
    other = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(1)) * 255
    assert abs(leak.ssim(noise, other).mean().item()) < 0.1


def test_another_background_leaks_less_than_the_same_and_moving_things_do_not_count(scene):
    reference = render(scene)
    recoloured = scene.model_copy(
        update={
            "bodies": (
                scene.bodies[0].model_copy(update={"colour": "white" if scene.bodies[0].colour != "white" else "red"}),
            )
        }
    )
    other = sample(24, category="single", motion="line", frames=9, height=128, width=128)
    assert leak.background_leak(reference, render(recoloured)) == pytest.approx(1.0, abs=1e-3)
    assert leak.background_leak(reference, render(other)) < 0.9


def test_where_everything_moves_there_is_no_background():
    panned = render(sample(1, category="camera", motion="shake", frames=9, height=64, width=64))
    assert math.isnan(leak.background_leak(panned, panned))
