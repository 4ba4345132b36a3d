"""Motion agreement: cases done by hand, and invariants on clips of known motion."""

import base64
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vmt_core.metrics.motion import (
    aligned,
    at_rest,
    flow_tracks,
    followed,
    jerk,
    matched,
    moving,
    moving_share,
    of_world,
    packed,
    start_points,
    trajectory_correlation,
)
from vmt_core.world import Scene, grid_points, masks, render, sample, tracks
from vmt_core.world.spec import Background, Camera, Line, Object, Still

SIDE = 128


def pan(dx, dy, colour="navy", frames=9, pattern="dotted"):
    """A camera that pans by (dx, dy) of the side: everything moves by the opposite."""
    scene = Scene(
        category="camera", motion="pan", bodies=(Object(shape="star", colour="red", size=0.15, path=Still(at=(0, 0))),),
        background=Background(pattern=pattern, colour=colour, period=0.23), camera=Camera(kind="pan", shift=(dx, dy)),
        frames=frames, height=SIDE, width=SIDE,
    )  # fmt: skip
    return scene, render(scene)


def straight(*steps, points=4):
    """Tracks that all make the same steps."""
    path = torch.cat([torch.zeros(1, 2), torch.tensor(steps, dtype=torch.float32).cumsum(0)])
    positions = path[:, None] + 10 * torch.arange(points)[None, :, None]
    return positions, torch.ones(positions.shape[:2], dtype=torch.bool)


RIGHT, LEFT, DOWN, STAY = (2.0, 0.0), (-2.0, 0.0), (0.0, 2.0), (0.0, 0.0)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([RIGHT] * 4, [RIGHT] * 4, 1.0),
        ([RIGHT] * 4, [(5.0, 0.0)] * 4, 1.0),  # how fast does not count
        ([RIGHT] * 4, [LEFT] * 4, -1.0),
        ([RIGHT] * 4, [DOWN] * 4, 0.0),
        ([RIGHT] * 4, [(1.0, 1.0)] * 4, math.sqrt(0.5)),
        ([RIGHT] * 4, [STAY] * 4, 0.0),
        ([RIGHT] * 4, [RIGHT, RIGHT, LEFT, STAY], (1 + 1 - 1 + 0) / 4),
        ([RIGHT, RIGHT, STAY, STAY], [RIGHT, DOWN, STAY, STAY], 0.5),  # both stand: no step to compare
    ],
)
def test_agreement_by_hand(first, second, expected):
    one, two = straight(*first), straight(*second)
    assert aligned(one, two, 256, over=1) == pytest.approx(expected, abs=1e-6)
    assert aligned(two, one, 256, over=1) == pytest.approx(expected, abs=1e-6)


def test_a_step_is_the_way_over_several_frames():
    """Jitter of half a pixel about a slow way is most of its single steps, and little of its ways over four."""
    jitter = [(0.5 + (-1) ** at, 0.0) for at in range(16)]
    slow, even = straight(*jitter), straight(*[(0.5, 0.0)] * 16)
    assert aligned(slow, even, 256) == pytest.approx(1.0)
    assert aligned(slow, even, 256, over=1) < 0.2
    hidden = slow[0], slow[1].clone()
    hidden[1][8] = False
    assert aligned(hidden, even, 256) == pytest.approx(1.0)  # of the ways that are seen all along
    short = straight(*[RIGHT] * 2)
    assert aligned(short, short, 256) == 1.0 and matched(short, short, 256) == 1.0


def circle(turns=1.0, phase=0.0, steps=16, points=4):
    """Tracks of a rigid body that goes round in a circle of 20 pixels, `turns` times in a clip, from `phase` (radians) on."""
    angle = phase + 2 * math.pi * turns * torch.arange(steps + 1) / steps
    path = 20 * torch.stack([angle.cos(), angle.sin()], -1)
    positions = path[:, None] + 50 * torch.arange(points)[None, :, None]
    return positions, torch.ones(positions.shape[:2], dtype=torch.bool)


@pytest.mark.parametrize("phase", [0.0, math.pi / 3, math.pi / 2, 2.0, math.pi])
def test_circles_agree_as_the_cosine_of_their_phase(phase):
    """Steps of a circle are chords, turned by the phase; once the other way round, directions are alike as often as opposite."""
    assert aligned(circle(), circle(phase=phase), 256, over=1) == pytest.approx(math.cos(phase), abs=1e-5)
    assert aligned(circle(), circle(turns=-1, phase=phase), 256, over=1) == pytest.approx(0, abs=1e-5)
    assert matched(circle(), circle(phase=phase), 256, over=1) == pytest.approx(math.cos(phase), abs=1e-5)


def test_nothing_that_moves_is_undefined_and_hidden_steps_do_not_count():
    assert math.isnan(aligned(straight(*[STAY] * 4), straight(*[STAY] * 4), 256, over=1))
    one, two = straight(*[RIGHT] * 4), straight(RIGHT, RIGHT, LEFT, LEFT)
    two[1][3:] = False
    assert aligned(one, two, 256, over=1) == 1.0


def test_what_is_lost_is_no_agreement_and_its_share_is_told():
    moves, lost = straight(*[RIGHT] * 16), straight(*[RIGHT] * 16)
    assert followed(moves, lost, 256) == 1
    points = moves[1].shape[1]
    lost[1][1:, 1:] = False  # all tracks but one end at once
    assert aligned(moves, lost, 256) == pytest.approx(1)
    assert followed(moves, lost, 256) == pytest.approx(1 / points)
    lost[1][1:] = False
    assert aligned(moves, lost, 256) == 0 and followed(moves, lost, 256) == 0
    jumps = straight(*[STAY, STAY, STAY, (2.0, 0.0)] * 4)  # moves over four frames, and stands in most single ones
    assert aligned(jumps, lost, 256) == 0 and followed(jumps, lost, 256) == 0
    still = straight(*[STAY] * 16)
    assert math.isnan(followed(still, still, 256))


def test_standing_scales_with_the_width():
    slow = straight(*[(0.4, 0.0)] * 4)
    assert moving(slow, 256, over=1).all()
    assert not moving(slow, 512, over=1).any()


def test_points_that_move_in_one_clip_only_count_as_unrelated():
    one, two = straight(*[RIGHT] * 4), straight(*[RIGHT] * 4)
    two[0][:, 2:] = two[0][:1, 2:]
    assert aligned(one, two, 256, over=1) == pytest.approx(0.5)


@pytest.mark.parametrize(("shift", "expected"), [((0.3, 0.0), 1), ((-0.3, 0.0), -1), ((0.0, 0.3), 0)])
def test_optical_flow_finds_the_motion_of_real_clips(shift, expected):
    """Two clips of different looks: agreement follows the motion."""
    points = grid_points(SIDE, SIDE)
    scene, _ = pan(0.3, 0.0)
    _, other = pan(*shift, colour="brown", pattern="checkered")
    found = aligned(of_world(tracks(scene, points)), flow_tracks(other, points), SIDE)
    assert found == pytest.approx(expected, abs=0.15)


def test_flow_tracks_are_where_the_exact_ones_are():
    points = grid_points(SIDE, SIDE)
    scene, frames = pan(0.25, 0.1)
    exact, (found, visible) = tracks(scene, points), flow_tracks(frames, points)
    both = visible & exact.visible
    error = (found - exact.points).norm(dim=-1)[both]
    assert both.float().mean() > 0.6
    assert error.median() < 0.5
    assert error.mean() < 1.0


def test_a_clip_agrees_with_itself_and_not_with_its_reverse():
    points = grid_points(192, 192)
    frames = render(sample(21, category="single", motion="line"))
    there = flow_tracks(frames, points)
    assert aligned(there, there, 192) == pytest.approx(1, abs=1e-5)
    assert aligned(there, flow_tracks(frames.flip(0), points), 192) < 0.1


def test_flipping_a_clip_flips_the_sign_of_horizontal_motion():
    points = grid_points(SIDE, SIDE)
    _, frames = pan(0.3, 0.0)
    assert aligned(flow_tracks(frames, points), flow_tracks(frames.flip(-1), points), SIDE) < -0.8


PATTERNS = pytest.mark.parametrize("pattern", ["plain", "striped", "dotted", "checkered", "gradient"])


def before(pattern, seed=39):
    """One object that moves along a line, before a background that stands still."""
    scene = sample(seed, category="single", motion="line")
    ground = scene.background.model_copy(update={"pattern": pattern, "period": 1.4 if pattern == "gradient" else 0.3})
    return scene.model_copy(update={"background": ground})


@PATTERNS
def test_what_stands_still_is_told_from_what_moves(pattern):
    scene = before(pattern)
    first, second = (frame.permute(1, 2, 0).contiguous().numpy() for frame in render(scene)[:2])
    still, body = at_rest(first, second), masks(scene)[0].numpy() >= 0
    assert not still[body].any()
    assert still[~body].mean() > 0.85
    assert at_rest(first, first).all()


def test_nothing_stands_still_where_the_camera_moves():
    _, frames = pan(0.3, 0.2)
    first, second = (frame.permute(1, 2, 0).contiguous().numpy() for frame in frames[:2])
    assert at_rest(first, second).mean() < 0.05


@PATTERNS
def test_a_background_does_not_drift_along(pattern):
    scene = before(pattern)
    points = start_points(scene.height, scene.width)
    exact, found = of_world(tracks(scene, points)), flow_tracks(render(scene), points)
    assert moving_share(found, scene.width) < 1.5 * moving_share(exact, scene.width) + 0.02
    assert aligned(exact, found, scene.width) > 0.65


@pytest.mark.parametrize("agreement", [aligned, matched])
def test_brightness_does_not_matter(agreement):
    points = grid_points(SIDE, SIDE)
    scene, frames = pan(0.2, 0.2)
    exact = of_world(tracks(scene, points))
    dark = (frames.float() * 0.7).to(torch.uint8)
    assert agreement(exact, flow_tracks(dark, points), SIDE) == pytest.approx(
        agreement(exact, flow_tracks(frames, points), SIDE), abs=0.03
    )


def test_a_pan_is_not_the_motion_of_an_object():
    """The object goes where the pan takes everything: they agree on the object, and nowhere else."""
    scene, panned = pan(0.3, 0.0)
    points = start_points(SIDE, SIDE)
    slide = Line(start=(0, 0), end=(-0.3, 0.0))
    alone = scene.model_copy(
        update={"bodies": (scene.bodies[0].model_copy(update={"path": slide}),), "camera": Camera(kind="still")}
    )
    whole, body = of_world(tracks(scene, points)), of_world(tracks(alone, points))
    on_it = masks(scene)[0].flatten()[(points.long() @ torch.tensor([1, SIDE]))] >= 0
    share = float(on_it.float().mean())
    assert moving_share(whole, SIDE) > 0.6 and moving_share(body, SIDE) == pytest.approx(share, abs=0.02)
    assert 0 < aligned(whole, body, SIDE) < 0.3
    assert aligned(whole, flow_tracks(panned, points), SIDE) > 0.85


def test_tracks_to_be_drawn():
    points = start_points(128, 192)
    assert len(points) == 32 * 48
    positions = torch.stack([points, points + torch.tensor([2.0, 1.0])])
    visible = torch.ones(2, len(points), dtype=torch.bool)
    visible[1, :700] = False
    found = torch.frombuffer(bytearray(base64.b64decode(packed((positions, visible), 128, 192))), dtype=torch.uint8)
    found = found.view(-1, 2, 2)
    assert len(found) == 8 * 12
    assert found[0].tolist() == [[round(254 * 10 / 192), round(254 * 10 / 128)], [255, 255]]
    last = found[-1].double() / 254 * torch.tensor([192, 128])
    assert (last[1] - last[0]).tolist() == pytest.approx([2, 1], abs=0.8)


@given(angle=st.floats(0, 6.28), scale=st.floats(0.5, 3))
def test_correlation_of_paths(angle, scale):
    time = torch.linspace(0, 3, 12)
    path = 20 * torch.stack([time.cos(), time.sin() + 0.3 * time], -1)
    assert trajectory_correlation(path, scale * path + 7) == pytest.approx(1, abs=1e-5)
    assert trajectory_correlation(path, -path) == pytest.approx(-1, abs=1e-5)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    assert trajectory_correlation(path, path @ turn.T) == pytest.approx(math.cos(angle), abs=1e-4)


def test_paths_that_stand_or_are_lost_have_no_correlation():
    path = torch.linspace(0, 30, 12)[:, None].expand(-1, 2)
    assert math.isnan(trajectory_correlation(path, torch.zeros(12, 2)))
    lost = path.clone()
    lost[:7] = float("nan")
    assert math.isnan(trajectory_correlation(path, lost))
    lost = path.clone()
    lost[:3] = float("nan")
    assert trajectory_correlation(path, lost) == pytest.approx(1)


def test_jerk_is_nothing_for_even_motion_and_large_for_jumps():
    time = torch.arange(10.0)
    assert jerk(torch.stack([3 * time, time], -1)) == pytest.approx(0, abs=1e-5)
    assert jerk(torch.stack([3 * time, time**2], -1)) == pytest.approx(0, abs=1e-4)
    jumps = torch.stack([time % 2, 0 * time], -1)
    assert jerk(jumps) == pytest.approx(4)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([RIGHT] * 4, [RIGHT] * 4, 1.0),
        ([RIGHT] * 4, [LEFT] * 4, -1.0),
        ([RIGHT] * 4, [DOWN] * 4, 0.0),
        ([RIGHT] * 4, [RIGHT, RIGHT, LEFT, DOWN], (1 + 1 - 1 + 0) / 4),
        ([RIGHT] * 4, [STAY] * 4, 0.0),
    ],
)
def test_matched_by_hand(first, second, expected):
    one, two = straight(*first), straight(*second)
    assert matched(one, two, 256, over=1) == pytest.approx(expected, abs=1e-6)
    assert matched(two, one, 256, over=1) == pytest.approx(expected, abs=1e-6)


def test_matched_finds_the_same_motions_at_other_places():
    right, down = straight(*[RIGHT] * 4, points=3), straight(*[DOWN] * 4, points=2)
    both = torch.cat([right[0], down[0]], 1), torch.cat([right[1], down[1]], 1)
    turned = torch.cat([down[0], right[0]], 1), torch.cat([down[1], right[1]], 1)
    assert matched(both, turned, 256, over=1) == pytest.approx(1.0)
    assert aligned(both, turned, 256, over=1) < 0.5
    assert matched(both, right, 256, over=1) == pytest.approx(((3 * 1 + 2 * 0) / 5 + 1) / 2)


def test_matched_leaves_out_what_stands_and_what_is_never_seen_together():
    right, still = straight(*[RIGHT] * 4, points=2), straight(*[STAY] * 4, points=50)
    mixed = torch.cat([right[0], still[0]], 1), torch.cat([right[1], still[1]], 1)
    assert matched(mixed, right, 256, over=1) == pytest.approx(1.0)
    assert moving_share(mixed, 256, over=1) == pytest.approx(2 / 52)
    assert math.isnan(matched(still, still, 256, over=1))
    late = straight(*[RIGHT] * 8)
    early = straight(*[RIGHT] * 8)
    late[1][:4], early[1][5:] = False, False
    assert matched(late, early, 256, over=1) == -1.0


@pytest.mark.parametrize("motion", [(0.3, 0.0), (0.2, 0.2)])
def test_matched_of_a_clip_with_itself_and_reversed(motion):
    scene, frames = pan(*motion)
    points = grid_points(SIDE, SIDE)
    there, back = flow_tracks(frames, points), flow_tracks(frames.flip(0), points)
    assert matched(there, there, SIDE) == pytest.approx(1.0, abs=1e-5)
    assert matched(there, of_world(tracks(scene, points)), SIDE) > 0.9
    assert matched(there, back, SIDE) < -0.8
