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


@pytest.mark.parametrize("tile", [(1, 1), (3, 4), (2, 5)])
@pytest.mark.parametrize("shift", [(0, 0), (0, 4), (-3, 2)])
def test_a_window_smaller_than_the_move_follows_its_tile_to_the_border(tile, shift):
    geometry = Geometry(2, 9, 13)
    motion = WindowedAMF(**SHARP, span=1, window=3, tile=tile).encode(features(moving(geometry, shift)), geometry)
    index, centres = naive_tiles(geometry, tile)
    stays = inside(geometry, shift)
    followed = torch.tensor([bool(stays[row * 13 + col]) for row, col in centres])[index]
    assert torch.equal(motion["valid"][0][followed], stays[followed])
    found = motion["flow"][0][followed & stays]
    assert torch.allclose(found, torch.tensor(shift).float().expand_as(found), atol=0.05)


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
@pytest.mark.parametrize("shift", [(0, 1), (1, 0), (-1, 1)])
def test_the_same_motion_of_another_texture_scores_lower_than_another_motion(objective, shift):
    geometry = Geometry(3, 9, 11)
    motion = objective.encode(features(moving(geometry, shift, seed=0)), geometry)
    same = objective.loss(features(moving(geometry, shift, seed=1)), motion, geometry)
    others = [
        objective.loss(features(moving(geometry, other, seed=1)), motion, geometry)
        for other in [(0, -1), (-1, 0), (1, -1), (0, 0)]
    ]
    assert same < 0.6 * min(others)  # not nothing: see below


@pytest.mark.parametrize(
    ("objective", "pairs"),
    [
        (WindowedAMF(**SHARP, span=2, window_weight=0), [(0, 1), (1, 2), (0, 2)]),
        (FullAMF(**SHARP), [(0, 1), (1, 2), (2, 0), (0, 2), (1, 0), (2, 1)]),
    ],
)
def test_texture_matters_only_where_the_match_leaves_the_frame(objective, pairs):
    geometry, shift = Geometry(3, 9, 11), torch.tensor([-1, 1])
    motion = objective.encode(features(moving(geometry, shift.tolist(), seed=0)), geometry)
    stays = torch.stack([inside(geometry, (j - i) * shift) for i, j in pairs])
    motion["valid"] = motion["valid"] & stays
    assert motion["valid"].sum() > 0.8 * stays.sum()
    assert objective.loss(features(moving(geometry, shift.tolist(), seed=1)), motion, geometry) < 1e-3


@pytest.mark.parametrize("objective", [FullAMF(block=0), FullAMF(block=0, reference="hard")])
def test_a_loss_over_all_ordered_pairs_is_the_same_for_both_clips_backwards(objective):
    geometry = Geometry(4, 5, 6)
    reference, made = noisy(geometry, 0), noisy(geometry, 1)
    there, back = (
        objective.loss(features(*two), objective.encode(features(*one), geometry), geometry)
        for one, two in ((reference, made), ([x.flip(0) for x in reference], [x.flip(0) for x in made]))
    )
    assert there > 0
    assert torch.allclose(there, back, rtol=1e-5)


def test_near_pairs_see_which_way_time_runs():
    geometry = Geometry(3, 9, 11)
    objective = WindowedAMF(**SHARP, window_weight=0)
    clip = moving(geometry, (0, 1))
    motion = objective.encode(features(clip), geometry)
    assert objective.loss(features(clip.flip(0)), motion, geometry) > 1  # a step of one token the wrong way: two off


@pytest.mark.parametrize("objective", [WindowedAMF(block=0, window=3, tile=(2, 2), drift="absolute"), FullAMF(block=0)])
def test_the_gradient_is_that_of_finite_differences(objective):
    geometry = Geometry(3, 3, 4)
    motion = objective.encode(features(*noisy(geometry, 0)), geometry)
    start = torch.stack(noisy(geometry, 1)).requires_grad_()
    (gradient,) = torch.autograd.grad(objective.loss(features(*start), motion, geometry), start)
    step = 1e-2
    for side in (0, 1):  # along q, along k
        direction = torch.zeros_like(start)
        direction[side] = torch.randn(start.shape[1:], generator=torch.Generator().manual_seed(2))
        up, down = (
            objective.loss(features(*(start.detach() + sign * step * direction)), motion, geometry) for sign in (1, -1)
        )
        assert torch.allclose((up - down) / (2 * step), (gradient * direction).sum(), rtol=1e-2)


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


def naive_tiles(geometry, tile):
    """The tile of each token, and the centre (row, col) of each tile."""
    grid = (geometry.rows, geometry.cols)
    names, centres = [], {}
    for place in itertools.product(*map(range, grid)):
        start = tuple(x - x % side for x, side in zip(place, tile, strict=True))
        stop = [min(s + side, size) for s, side, size in zip(start, tile, grid, strict=True)]
        centres[start] = [s + (e - s) // 2 for s, e in zip(start, stop, strict=True)]
        names.append(start)
    order = list(centres)
    return [order.index(name) for name in names], list(centres.values())


def token_windows(geometry, objective, shift):
    """The window of each token, from the shift of each tile."""
    index, _ = naive_tiles(geometry, objective.tile)
    places = geometry.positions()
    return [
        naive_window(geometry, objective.window, (place + shift[tile]).tolist())
        for place, tile in zip(places, index, strict=True)
    ]


def naive_drift(objective, key, geometry, shift):
    """|kbar(i, j+1) - kbar(i, j)|^2 / d for each step and tile; `shift`: (i, j) -> (tiles, 2)."""
    _, centres = naive_tiles(geometry, objective.tile)

    def mean_keys(i, j):
        windows = [
            naive_window(geometry, objective.window, (torch.tensor(centre) + move).tolist())
            for centre, move in zip(centres, shift[i, j], strict=True)
        ]
        flat = key[j].flatten(1)
        return torch.stack([flat[[row * geometry.cols + col for row, col in window]].mean(0) for window in windows])

    steps = [(i, i + d) for d in range(1, objective.span) for i in range(geometry.frames - d - 1)]
    return torch.stack([(mean_keys(i, j + 1) - mean_keys(i, j)).square().mean(-1) for i, j in steps])


def near_pairs(geometry, span):
    return [(i, i + d) for d in range(1, span + 1) for i in range(geometry.frames - d)]


def on_grid(geometry, *tensors):
    return [x.unflatten(1, (geometry.rows, geometry.cols)) for x in tensors]


@pytest.mark.parametrize("hard", [False, True])
def test_full_flow_mixes_neither_tokens_nor_heads(hard):
    geometry = Geometry(2, 3, 4)
    query, key = noisy(geometry, 3)
    objective = FullAMF(block=0, temperature=1.5, reference="hard" if hard else "soft")
    motion = objective.encode(features(query, key), geometry)
    grid = on_grid(geometry, query, key)
    for flow, (i, j) in zip(motion["flow"], [(0, 1), (1, 0)], strict=True):
        assert torch.allclose(flow, naive_flow(*grid, i, j, 1e6 if hard else 1.5), atol=1e-5)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("tile", [(2, 3), (3, 4), (1, 1)])
def test_windowed_flow_is_that_of_the_loops(tile, hard):
    geometry = Geometry(2, 5, 7)
    query, key = noisy(geometry, 4)
    objective = WindowedAMF(block=0, temperature=1.5, window=3, tile=tile, span=1, reference="hard" if hard else "soft")
    motion = objective.encode(features(query, key), geometry)
    grid = on_grid(geometry, query, key)
    _, centres = naive_tiles(geometry, tile)
    places = list(itertools.product(range(5), range(7)))
    for (row, col), found in zip(centres, motion["shift"][0].tolist(), strict=True):
        logits = [float((grid[0][0, row, col] * grid[1][1, y, x]).sum()) for y, x in places]
        best = places[logits.index(max(logits))]
        assert found == [best[0] - row, best[1] - col]
    windows = token_windows(geometry, objective, motion["shift"][0])
    assert torch.allclose(motion["flow"][0], naive_flow(*grid, 0, 1, 1e6 if hard else 1.5, windows), atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"window_weight": 0.0},
        {"window_weight": 0.7},
        {"window_weight": 0.7, "drift": "absolute"},
        {"span": 2, "reference": "hard", "drift": "absolute"},
    ],
)
def test_the_windowed_loss_is_its_formula(settings):
    geometry = Geometry(4, 4, 5)
    objective = WindowedAMF(**({"block": 0, "window": 3, "tile": (2, 3), "span": 3} | settings))
    motion = objective.encode(features(*noisy(geometry, 6)), geometry)
    query, key = noisy(geometry, 7)
    pairs = near_pairs(geometry, objective.span)
    index, _ = naive_tiles(geometry, objective.tile)
    total = weights = 0.0
    for n, (i, j) in enumerate(pairs):
        shift = motion["shift"][n]
        flow = naive_flow(*on_grid(geometry, query, key), i, j, 2.0, token_windows(geometry, objective, shift))
        target = geometry.positions() + shift[index]
        valid = ((target >= 0) & (target < torch.tensor([4, 5]))).all(-1)
        weight = 1 - 0.2 * (j - i - 1) / objective.span
        total += weight * (motion["flow"][n] - flow)[valid].square().sum(-1).mean()
        weights += weight
    wanted = total / weights
    if objective.window_weight:
        drift = naive_drift(objective, key, geometry, dict(zip(pairs, motion["shift"], strict=True)))
        floor = motion["drift"] if objective.drift == "excess" else 0
        wanted = wanted + objective.window_weight * (drift - floor).clamp(min=0).mean()
    assert torch.allclose(objective.loss(features(query, key), motion, geometry), wanted, rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"moving_only": False}, {"reference": "hard", "temperature": 1.0}])
def test_the_full_loss_is_its_formula(settings):
    geometry = Geometry(3, 2, 3)
    objective = FullAMF(block=0, **settings)
    reference = noisy(geometry, 8)
    motion = objective.encode(features(*reference), geometry)
    query, key = noisy(geometry, 9)
    errors = []
    for i, j in itertools.permutations(range(3), 2):
        match = naive_flow(*on_grid(geometry, *reference), i, j, 1e6)
        soft = naive_flow(*on_grid(geometry, *reference), i, j, objective.temperature)
        flow = naive_flow(*on_grid(geometry, query, key), i, j, objective.temperature)
        counts = match.abs().sum(-1) > 0.5 if objective.moving_only else torch.ones(len(match), dtype=torch.bool)
        errors.append(((match if objective.reference == "hard" else soft) - flow)[counts].square())
    assert torch.allclose(objective.loss(features(query, key), motion, geometry), torch.cat(errors).mean(), rtol=1e-4)


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
    shift = dict(zip(near_pairs(geometry, 3), motion["shift"], strict=True))
    assert torch.allclose(motion["drift"], naive_drift(objective, key, geometry, shift), atol=1e-6)


@pytest.mark.parametrize("objective", [WindowedAMF(block=0), FullAMF(block=0)])
def test_features_in_bf16_give_a_motion_and_a_loss_in_fp32(objective):
    geometry = Geometry(3, 4, 4)
    clip = features(*(x.bfloat16().requires_grad_() for x in noisy(geometry, 0)))
    motion = objective.encode(clip, geometry)
    assert motion["flow"].dtype == torch.float32
    assert not any(value.requires_grad for value in motion.values())
    assert objective.loss(clip, motion, geometry).dtype == torch.float32
    assert objective.loss(clip, motion, geometry) == 0


def test_only_tokens_that_move_in_the_reference_count_for_ditflow():
    geometry = Geometry(2, 4, 4)
    still = moving(geometry, (0, 0))
    objective = FullAMF(**SHARP)
    motion = objective.encode(features(still), geometry)
    assert not motion["valid"].any()
    assert objective.loss(features(moving(geometry, (0, 1))), motion, geometry) == 0


@pytest.mark.parametrize("objective", [WindowedAMF(block=0), FullAMF(block=0)])
def test_a_still_reference_gives_a_moving_clip_a_finite_gradient(objective):
    geometry = Geometry(3, 5, 5)
    motion = objective.encode(features(moving(geometry, (0, 0))), geometry)
    made = moving(geometry, (1, 1), seed=1).requires_grad_()
    loss = objective.loss(features(made), motion, geometry)
    (gradient,) = torch.autograd.grad(loss, made)
    assert loss.isfinite() and gradient.isfinite().all()


def test_a_window_without_a_centre_is_refused():
    with pytest.raises(ValueError, match="window=4 has no centre; use 3 or 5"):
        WindowedAMF(window=4)
