"""Attention motion flow: the displacement that was put in comes out, and the loss is least where the motion is the same."""

import itertools

import pytest
import torch

from vmt_core.backbone.geometry import Geometry, Tap
from vmt_core.motion import amf
from vmt_core.motion.amf import FullAMF, WindowedAMF

HEADS, DIM = 2, 16
GRIDS = [(6, 7), (7, 5), (9, 13), (8, 8)]  # odd, non-square, with tile remainders
SHARP = {"block": 0, "temperature": 100.0}


def texture(geometry, seed=0, margin=6):
    """Random unit features on a canvas larger than the frame: (rows + 2 margin, cols + 2 margin, heads, dim)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (geometry.rows + 2 * margin, geometry.cols + 2 * margin, HEADS, DIM)
    return torch.nn.functional.normalize(torch.randn(shape, generator=generator), dim=-1)


def moving(geometry, shift, seed=0, margin=6):
    """q = k of a texture that moves by `shift` tokens a frame: (F, N, heads, dim); constant where the canvas ends."""
    canvas = texture(geometry, seed, margin)
    frames = []
    for frame in range(geometry.frames):
        row, col = (max(-margin, min(margin, frame * step)) for step in shift)
        window = canvas[margin - row : margin - row + geometry.rows, margin - col : margin - col + geometry.cols]
        frames.append(window.flatten(0, 1))
    return torch.stack(frames)


def features(query, key=None):
    return {Tap(0, "qk"): (query, query if key is None else key)}


def inside(geometry, shift):
    """Tokens whose match lies in the frame."""
    target = geometry.positions() + torch.as_tensor(shift)
    return ((target >= 0) & (target < torch.tensor([geometry.rows, geometry.cols]))).all(-1)


def noisy(geometry, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (geometry.frames, geometry.per_frame, HEADS, DIM)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


# ---- what comes out is what was put in


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shift", [(0, 0), (1, 0), (0, -2), (1, 2), (-1, 1)])
def test_windowed_flow_is_the_shift_borders_included(grid, shift):
    geometry = Geometry(3, *grid)
    motion = WindowedAMF(**SHARP, span=2, window=21).encode(features(moving(geometry, shift)), geometry)
    for pair, distance in enumerate([1, 1, 2]):
        expected = torch.tensor([distance * step for step in shift])
        tokens = inside(geometry, expected)
        assert torch.allclose(motion["flow"][pair][tokens], expected.float().expand(int(tokens.sum()), 2), atol=0.05)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shift", [(0, 0), (1, 0), (0, -2), (-1, 1)])
def test_full_flow_is_the_shift_in_both_directions_of_time(grid, shift):
    geometry = Geometry(3, *grid)
    motion = FullAMF(**SHARP, moving_only=False).encode(features(moving(geometry, shift)), geometry)
    pairs = [(i, (i + d) % 3) for d in (1, 2) for i in range(3)]
    for flow, (source, target) in zip(motion["flow"], pairs, strict=True):
        expected = torch.tensor([(target - source) * step for step in shift])
        tokens = inside(geometry, expected)
        assert torch.allclose(flow[tokens], expected.float().expand(int(tokens.sum()), 2), atol=0.05)


@pytest.mark.parametrize("pixels", [5, 9, 17, 33, 81])
def test_every_length_works(pixels):
    geometry = Geometry((pixels - 1) // 4 + 1, 6, 5)
    clip = features(moving(geometry, (0, 1)))
    for objective in (WindowedAMF(**SHARP), FullAMF(**SHARP)):
        motion = objective.encode(clip, geometry)
        assert objective.loss(clip, motion, geometry) < 1e-9


@pytest.mark.parametrize("objective", [WindowedAMF(**SHARP), FullAMF(**SHARP)])
def test_a_single_latent_frame_has_no_motion_and_is_refused(objective):
    geometry = Geometry(1, 4, 4)
    with pytest.raises(ValueError, match="at least 2 latent frames"):
        objective.encode(features(moving(geometry, (0, 0))), geometry)


# ---- the loss


@pytest.mark.parametrize(
    "objective", [WindowedAMF(block=0), FullAMF(block=0), WindowedAMF(block=0, window=5, tile=(2, 3))]
)
@pytest.mark.parametrize("shift", [(0, 0), (1, -1)])
def test_a_clip_against_itself_has_no_loss_and_no_gradient(objective, shift):
    geometry = Geometry(4, 7, 6)
    query = moving(geometry, shift).requires_grad_()
    motion = objective.encode(features(query.detach()), geometry)
    loss = objective.loss(features(query), motion, geometry)
    (gradient,) = torch.autograd.grad(loss, query)
    assert loss == 0
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("objective", [WindowedAMF(**SHARP), FullAMF(**SHARP)])
def test_the_same_motion_of_another_texture_scores_lower_than_another_motion(objective):
    geometry = Geometry(4, 8, 9)
    motion = objective.encode(features(moving(geometry, (0, 1), seed=0)), geometry)
    same = objective.loss(features(moving(geometry, (0, 1), seed=1)), motion, geometry)
    others = [
        objective.loss(features(moving(geometry, shift, seed=1)), motion, geometry)
        for shift in [(0, -1), (1, 0), (0, 0)]
    ]
    assert same < 0.5 * min(others)  # tokens whose match left the frame differ by texture


@pytest.mark.parametrize("objective", [WindowedAMF(block=0, window=3, tile=(2, 2), drift="absolute"), FullAMF(block=0)])
def test_the_gradient_is_that_of_finite_differences(objective):
    geometry = Geometry(3, 3, 4)
    motion = objective.encode(features(*noisy(geometry, 0)), geometry)
    query, key = noisy(geometry, 1)
    key.requires_grad_()
    (gradient,) = torch.autograd.grad(objective.loss(features(query, key), motion, geometry), key)
    direction = torch.randn(key.shape, generator=torch.Generator().manual_seed(2))
    step = 1e-2

    def at(sign):
        return objective.loss(features(query, key.detach() + sign * step * direction), motion, geometry)

    assert torch.allclose((at(1) - at(-1)) / (2 * step), (gradient * direction).sum(), rtol=1e-2)


@pytest.mark.parametrize("objective", [WindowedAMF(block=0, window=3), FullAMF(block=0)])
def test_large_logits_are_recomputed_to_the_same_loss_and_gradient(objective, monkeypatch):
    geometry = Geometry(3, 4, 4)
    motion = objective.encode(features(*noisy(geometry, 0)), geometry)

    def run():
        query, key = (x.requires_grad_() for x in noisy(geometry, 1))
        loss = objective.loss(features(query, key), motion, geometry)
        return loss, *torch.autograd.grad(loss, (query, key))

    kept = run()
    monkeypatch.setattr(amf, "_KEPT_LOGITS", 0)
    assert all(torch.equal(a, b) for a, b in zip(kept, run(), strict=True))


# ---- against the formulas, token by token and head by head


def naive_flow(query, key, i, j, temperature, window=None):
    """Displacements by loops: query, key (F, rows, cols, heads, dim); window: token -> allowed tokens."""
    _, rows, cols, heads, dim = query.shape
    places = list(itertools.product(range(rows), range(cols)))
    flow = torch.zeros(rows * cols, 2)
    for p, (r, c) in enumerate(places):
        allowed = places if window is None else window[p]
        logits = torch.tensor(
            [
                temperature * sum(float(query[i, r, c, h] @ key[j, y, x, h]) for h in range(heads)) / heads / dim**0.5
                for y, x in allowed
            ]
        )
        weights = logits.softmax(0)
        flow[p] = (weights[:, None] * torch.tensor(allowed).float()).sum(0) - torch.tensor([r, c]).float()
    return flow


def naive_window(geometry, side, centre):
    """Tokens of the window around a centre that is moved so that the window lies in the frame."""
    spans = []
    for place, size in zip(centre, (geometry.rows, geometry.cols), strict=True):
        radius = side // 2
        if side >= size:
            spans.append(range(size))
            continue
        middle = min(max(int(place), radius), size - 1 - radius)
        spans.append(range(middle - radius, middle + radius + 1))
    return list(itertools.product(*spans))


def test_full_flow_mixes_neither_tokens_nor_heads():
    geometry = Geometry(2, 3, 4)
    query, key = noisy(geometry, 3)
    motion = FullAMF(block=0, temperature=1.5).encode(features(query, key), geometry)
    grid = [x.unflatten(1, (3, 4)) for x in (query, key)]
    assert torch.allclose(motion["flow"][0], naive_flow(*grid, 0, 1, 1.5), atol=1e-5)
    assert torch.allclose(motion["flow"][1], naive_flow(*grid, 1, 0, 1.5), atol=1e-5)


@pytest.mark.parametrize("tile", [(2, 3), (3, 4), (1, 1)])
def test_windowed_flow_is_that_of_the_loops(tile):
    geometry = Geometry(2, 5, 7)
    query, key = noisy(geometry, 4)
    objective = WindowedAMF(block=0, temperature=1.5, window=3, tile=tile, span=1)
    motion = objective.encode(features(query, key), geometry)
    grid = [x.unflatten(1, (5, 7)) for x in (query, key)]
    windows = []
    for r, c in itertools.product(range(5), range(7)):
        start = [place // side * side for place, side in zip((r, c), tile, strict=True)]
        stop = [min(s + side, size) for s, side, size in zip(start, tile, (5, 7), strict=True)]
        centre = [s + (e - s) // 2 for s, e in zip(start, stop, strict=True)]
        logits = {
            (y, x): float((grid[0][0, centre[0], centre[1]] * grid[1][1, y, x]).sum())
            for y, x in itertools.product(range(5), range(7))
        }
        best = max(logits, key=logits.get)
        windows.append(naive_window(geometry, 3, [r + best[0] - centre[0], c + best[1] - centre[1]]))
    assert torch.allclose(motion["flow"][0], naive_flow(*grid, 0, 1, 1.5, windows), atol=1e-5)


def test_every_window_is_whole_and_inside_the_frame():
    geometry = Geometry(2, 6, 9)
    centres = torch.cartesian_prod(torch.arange(-4, 10), torch.arange(-4, 13))[None]
    masks = amf._window(geometry, 5, centres)[0]
    assert (masks.sum(-1) == 25).all()
    for mask, centre in zip(masks, centres[0], strict=True):
        found = {(int(i) // 9, int(i) % 9) for i in mask.nonzero()}
        assert found == set(naive_window(geometry, 5, centre.tolist()))


@pytest.mark.parametrize("side", [5, 21])
def test_a_window_as_large_as_the_frame_is_the_frame(side):
    geometry = Geometry(2, 5, 4)
    assert amf._window(geometry, side, torch.tensor([[[0, 3]]])).all()


def test_the_drift_is_the_change_of_the_windows_mean_key():
    geometry = Geometry(4, 5, 6)
    query, key = noisy(geometry, 5)
    objective = WindowedAMF(block=0, window=3, tile=(2, 3), span=3)
    motion = objective.encode(features(query, key), geometry)
    flat = key.flatten(2)
    centres, _ = amf._tiles(geometry, (2, 3), flat.device)
    pairs = [(i, i + d) for d in (1, 2, 3) for i in range(4 - d)]
    shift = dict(zip(pairs, motion["shift"], strict=True))
    rows = []
    for d in (1, 2):
        for i in range(4 - d - 1):
            means = []
            for j in (i + d, i + d + 1):
                places = geometry.positions()[centres] + shift[i, j]
                windows = [naive_window(geometry, 3, place.tolist()) for place in places]
                means.append(torch.stack([flat[j, [y * 6 + x for y, x in w]].mean(0) for w in windows]))
            rows.append((means[1] - means[0]).square().mean(-1))
    assert torch.allclose(motion["drift"], torch.stack(rows), atol=1e-6)


def test_only_tokens_that_move_in_the_reference_count_for_ditflow():
    geometry = Geometry(2, 4, 4)
    still = moving(geometry, (0, 0))
    objective = FullAMF(**SHARP)
    motion = objective.encode(features(still), geometry)
    assert not motion["valid"].any()
    assert objective.loss(features(moving(geometry, (0, 1))), motion, geometry) == 0


def test_a_window_without_a_centre_is_refused():
    with pytest.raises(ValueError, match="window=4 has no centre; use 3 or 5"):
        WindowedAMF(window=4)
