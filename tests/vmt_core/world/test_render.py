"""Pixels, masks and tracks tell the same story."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import avg_pool2d, grid_sample, max_pool2d

from vmt_core.world import MOTIONS, Scene, centres, grid_points, masks, render, sample, tracks
from vmt_core.world.motion import cameras
from vmt_core.world.shapes import SHAPES, capsule
from vmt_core.world.spec import COLOURS, Background, Camera, Line, Object, Still

KINDS = [(category, motion) for category, motions in MOTIONS.items() for motion in motions]


def scene(*bodies, pattern="plain", camera=None, **values):
    sizes = {"frames": 9, "height": 96, "width": 96} | values
    return Scene(
        category="single", motion="line", bodies=bodies, camera=camera or Camera(), **sizes,
        background=Background(pattern=pattern, colour="navy"),
    )  # fmt: skip


def disc(colour="red", size=0.2, **path):
    return Object(shape="circle", colour=colour, size=size, path=Line(**path) if "start" in path else Still(**path))


@pytest.mark.parametrize("name", [*SHAPES, "capsule"])
def test_a_distance_field_is_exact_outside_and_grows_by_one_per_unit(name):
    axis = torch.linspace(-1.8, 1.8, 721)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    field = capsule(points, 0.9, 0.2) if name == "capsule" else SHAPES[name](points)
    dy, dx = torch.gradient(field, spacing=float(axis[1] - axis[0]))
    assert torch.hypot(dx, dy).median() == pytest.approx(1, abs=1e-3)
    edge = points[(field.abs() < 0.004)]
    outside = field > 0.1
    nearest = torch.cdist(points[outside][::997], edge).amin(-1)
    assert (field[outside][::997] - nearest).abs().max() < 0.01
    assert (field < 0).any()


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_fit_their_circle_and_corners_point_up(name):
    angle = torch.linspace(0, 2 * math.pi, 100)
    around = 1.2 * torch.stack([angle.sin(), angle.cos()], -1)
    assert (SHAPES[name](around) > 0).all()
    if name in ("triangle", "star"):
        assert SHAPES[name](torch.tensor([0.0, -0.97])) < 0 < SHAPES[name](torch.tensor([0.0, 0.97]))


@pytest.mark.parametrize(("category", "motion"), KINDS)
def test_what_a_track_follows_keeps_its_colour(category, motion):
    """Exact tracks: the pixel under a point is the same in every frame where the point is seen."""
    made = sample(27, category=category, motion=motion, frames=9, height=128, width=160)
    frames = render(made).float()
    points = grid_points(128, 160, spacing=5)
    paths = tracks(made, points)
    grid = 2 * paths.points / torch.tensor([160.0, 128.0]) - 1
    seen = grid_sample(frames, grid.unsqueeze(2), align_corners=False, padding_mode="border").squeeze(-1)  # (T, 3, n)
    spread = max_pool2d(frames, 5, 1, 2) + max_pool2d(-frames, 5, 1, 2)
    spread = grid_sample(spread, grid.unsqueeze(2), align_corners=False, padding_mode="border").squeeze(-1).amax(1)
    smooth = 20 if made.background.pattern == "gradient" else 1
    inner = (spread <= smooth).all(0) & paths.visible.all(0)  # nothing of an edge near the point in any frame
    assert inner.sum() > 60
    assert (seen[:, :, inner] - seen[:1, :, inner]).abs().max() <= 1.01
    if category != "camera":
        assert paths.points.diff(dim=0)[:, paths.body < 0].abs().max() < 1e-3


@pytest.mark.parametrize(("category", "motion"), KINDS)
def test_something_moves_in_every_clip_and_crossing_things_hide(category, motion):
    made = sample(4, category=category, motion=motion)
    paths = tracks(made)
    steps = paths.points.diff(dim=0).norm(dim=-1)
    still_turning = motion in ("spin", "roll", "zoom", "scale", "orbit")
    assert steps.amax(1).mean() > (0.5 if still_turning else 1.0)
    assert steps.max() < 40
    if motion == "crossing":
        behind = paths.body == 0
        assert not paths.visible[:, behind].all()
        assert paths.visible[0].all()


def test_masks_and_tracks_agree_about_who_is_where():
    made = sample(7, category="multiple", motion="crossing", height=96, width=96)
    labels = masks(made)
    assert labels.shape == (17, 96, 96)
    paths = tracks(made, grid_points(96, 96, spacing=4))
    for frame in range(17):
        x, y = paths.points[frame, paths.visible[frame]].floor().long().clamp(0, 95).unbind(-1)
        wrong = labels[frame, y, x] != paths.body[paths.visible[frame]]
        assert wrong.float().mean() < 0.05  # points within half a pixel of an edge


def test_a_straight_line_is_where_arithmetic_says():
    made = scene(disc(start=(-0.25, 0.0), end=(0.25, 0.1)))
    expected = torch.stack([torch.linspace(24, 72, 9), torch.linspace(48, 57.6, 9)], -1)
    torch.testing.assert_close(centres(made)[:, 0], expected)
    labels = masks(made)
    for frame in (0, 4, 8):
        y, x = (labels[frame] == 0).nonzero().float().add(0.5).mean(0)
        assert (x - expected[frame, 0]).abs() < 0.3
        assert (y - expected[frame, 1]).abs() < 0.3
    area = (labels[0] == 0).sum().item()
    assert area == pytest.approx(math.pi * (0.2 * 96) ** 2, rel=0.02)
    assert render(made)[0, :, 48, 24].tolist() == list(COLOURS["red"])


def test_the_last_body_is_in_front():
    made = scene(disc("red", at=(0.0, 0.0)), disc("white", at=(0.1, 0.0)))
    assert render(made)[0, :, 48, 52].tolist() == list(COLOURS["white"])
    assert masks(made)[0, 48, 52] == 1


def test_edges_are_smooth():
    image = render(scene(disc(at=(0.0, 0.0))))[0, 0]
    values = image.unique()
    assert len(values) > 8
    assert (image.float().diff(dim=1).abs() < 210).all()


@pytest.mark.parametrize(
    ("camera", "moves"),
    [
        (Camera(kind="pan", shift=(0.25, 0.0)), lambda x, y: (x - 24, y)),
        (Camera(kind="zoom", factor=2.0), lambda x, y: (48 + 2 * (x - 48), 48 + 2 * (y - 48))),
        (Camera(kind="roll", turn=math.pi / 2), lambda x, y: (48 - (y - 48), 48 + (x - 48))),
    ],
)
def test_cameras_move_the_scene_by_the_book(camera, moves):
    made = scene(disc(at=(0.0, 0.0)), camera=camera, pattern="checkered")
    points = torch.tensor([[40.0, 44.0], [50.0, 60.0], [8.0, 20.0]])
    paths = tracks(made, points).points
    for place, last in zip(points.tolist(), paths[-1].tolist(), strict=True):
        assert last == pytest.approx(moves(*place), abs=1e-3)
    matrices = cameras(made)
    assert torch.equal(matrices[4], torch.eye(3, dtype=torch.float64))  # the middle of the clip


def test_when_the_camera_orbits_only_the_background_slides():
    made = sample(3, category="camera", motion="orbit")
    paths = tracks(made)
    on_body = paths.body >= 0
    assert paths.points[:, on_body].diff(dim=0).abs().max() == 0
    assert paths.points[:, ~on_body].diff(dim=0).norm(dim=-1).mean() > 1


@given(seed=st.integers(0, 10**6), top=st.integers(0, 60), left=st.integers(0, 80))
def test_a_crop_is_a_piece_of_the_whole(seed, top, left):
    made = sample(seed, frames=3, height=96, width=112)
    whole = render(made)
    piece = render(made, (top, left, top + 32, left + 32))
    assert (piece.int() - whole[:, :, top : top + 32, left : left + 32].int()).abs().max() <= 1


@given(seed=st.integers(0, 10**6))
def test_any_size_shows_the_same(seed):
    small = sample(seed, frames=2, height=64, width=96)
    large = small.model_copy(update={"height": 128, "width": 192})
    difference = (avg_pool2d(render(large).float(), 2) - render(small).float()).abs()
    assert difference.mean() < 2
    torch.testing.assert_close(centres(large), 2 * centres(small))


@given(seed=st.integers(0, 10**6))
def test_a_scene_survives_as_json_and_gives_the_same_pixels(seed):
    made = sample(seed, frames=2, height=32, width=32)
    again = Scene.model_validate_json(made.model_dump_json())
    assert again == made
    assert torch.equal(render(again), render(made))


def test_bodies_must_differ_in_colour():
    with pytest.raises(ValueError, match="different colours, not red, red"):
        scene(disc(at=(0.0, 0.0)), disc(at=(0.1, 0.0)))


def test_points_of_a_later_frame_have_the_paths_of_what_is_there():
    scene = sample(4, category="single", motion="arc")
    whole = tracks(scene)
    later = tracks(scene, whole.points[8], frame=8)
    same = (later.body == whole.body) & whole.visible[8]
    assert same.float().mean() > 0.9 and (whole.body[same] >= 0).any()
    torch.testing.assert_close(later.points[:, same], whole.points[:, same], atol=1e-3, rtol=0)
    assert later.visible[8].all()
