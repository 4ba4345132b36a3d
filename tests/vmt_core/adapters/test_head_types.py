"""Classification of heads."""

import json
import math

import pytest
import torch

from vmt_core.adapters.head_types import HeadTypes, band_masks, classify, picture, query_rows, score, spatial_heads
from vmt_core.backbone.geometry import Geometry, Tap

GRID = Geometry(5, 3, 4)  # 5 frames of 12 tokens
TOKENS = 60


def bands(rows=None):
    return band_masks(GRID, torch.arange(TOKENS) if rows is None else rows)


def head(kind):
    """q and k, (tokens, 1, d), of an ideal head: one-hot codes of the frame, of the place, or nothing."""
    tokens = torch.arange(TOKENS)
    code = {"spatial": tokens // 12, "temporal": tokens % 12, "uniform": torch.zeros_like(tokens)}[kind]
    key = torch.nn.functional.one_hot(code, 12).float()
    return (200 * key if kind != "uniform" else 0 * key).unsqueeze(1), key.unsqueeze(1)


@pytest.mark.parametrize(("kind", "wanted"), [("spatial", -0.98), ("temporal", math.log(5)), ("uniform", 0.0)])
def test_scores_of_ideal_heads(kind, wanted):
    assert score(*head(kind), bands()).item() == pytest.approx(wanted, abs=0.02)


@pytest.mark.parametrize("rule", ["median", "paper", "code"])
def test_ideal_heads_are_typed_right_under_every_rule_wherever_they_stand(rule):
    for kinds in (["spatial", "temporal"], ["temporal", "spatial"], ["temporal", "spatial", "spatial", "temporal"]):
        query, key = (torch.cat(parts, 1) for parts in zip(*map(head, kinds), strict=True))
        scores = score(query, key, bands())[None]
        assert spatial_heads(scores, rule)[0].tolist() == [kind == "spatial" for kind in kinds]


@pytest.mark.parametrize(("rule", "spatial"), [("paper", 1), ("code", 3), ("median", 2)])
def test_where_each_rule_draws_the_line(rule, spatial):
    """-ln 1.25 = -0.223 belongs to the spatial heads, ln 1.3 = 0.262 to the temporal ones."""
    scores = torch.tensor([[-0.2232, -0.2231, 0.2623, 0.2624]])
    assert spatial_heads(scores, rule).tolist() == [[place < spatial for place in range(4)]]


def test_some_rows_tell_nearly_what_all_would():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, TOKENS, 6, 8, generator=generator)
    key[:, :3] += 2 * head("temporal")[1][..., :8]
    query[:, :3] += 2 * head("temporal")[1][..., :8]
    rows = query_rows(GRID, 40, generator)
    assert len(rows) == 40 and len(set(rows.tolist())) == 40
    assert [int((rows // 12 == frame).sum()) for frame in range(5)] == [8] * 5
    assert torch.allclose(score(query[rows], key, bands(rows)), score(query, key, bands()), atol=0.05)


def test_the_median_halves_the_heads():
    scores = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    assert int(spatial_heads(scores, "median").sum()) == 12


@pytest.mark.parametrize("rule", ["median", "paper", "code"])
def test_a_models_heads_are_scored_as_by_its_own_attention_maps(tiny, rule):
    """Against q and k that the taps give, all rows of them, in the mean over the rule's noise levels."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, 5, 6, 8, generator=generator)
    text = tiny.pad([tiny.caption("a red circle")])
    types = classify(tiny.transformer, latents, text, rule=rule, queries=10_000, seed=3)
    generator = torch.Generator().manual_seed(3)
    rows = query_rows(GRID, 10_000, generator)
    noise = torch.randn(latents.shape, generator=generator)
    for layer, found in enumerate(types.scores):
        wanted = []
        for sigma in {"code": [0.9998]}.get(rule, [0.9, 0.7, 0.5, 0.3]):
            noisy = (1 - sigma) * latents + sigma * noise
            tap = Tap(layer, "qk")
            query, key = tiny.features(noisy, torch.tensor([1000 * sigma]), text, [tap])[tap]
            wanted.append(score(query.flatten(1, 2)[0][rows], key.flatten(1, 2)[0], bands(rows)))
        assert torch.allclose(torch.tensor(found), torch.stack(wanted).mean(0), atol=1e-5)
    assert torch.equal(torch.tensor(types.spatial), spatial_heads(torch.tensor(types.scores), rule))
    assert not any(hook for module in tiny.transformer.modules() for hook in module._forward_hooks.values())


def test_a_file_comes_back_and_another_models_is_refused(tiny, tmp_path):
    types = HeadTypes(rule="median", scores=[[0.5, -1.0]] * 3, spatial=[[False, True]] * 3)
    types.save(tmp_path / "types.json")
    assert HeadTypes.load(tmp_path / "types.json", layers=3, heads=2) == types
    with pytest.raises(ValueError, match="of 3 layers x 2 heads, the model has 30 x 12"):
        HeadTypes.load(tmp_path / "types.json", layers=30, heads=12)


def test_what_another_file_holds_is_not_told(tmp_path):
    (tmp_path / "types.json").write_text('{"rule": {"AccessKeyId": "AKIA"}, "scores": "sk-secret", "spatial": []}')
    with pytest.raises(ValueError, match="not a file of head types: rule") as caught:
        HeadTypes.load(tmp_path / "types.json", layers=3, heads=2)
    assert "AKIA" not in str(caught.value) and "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("content", ["", "[]", '{"rule": "median"}', "\x00\xff"])
def test_what_is_no_such_file_is_refused(tmp_path, content):
    (tmp_path / "types.json").write_text(content)
    with pytest.raises(ValueError, match="not a file of head types"):
        HeadTypes.load(tmp_path / "types.json", layers=1, heads=1)


def test_ragged_tables_are_refused(tmp_path):
    (tmp_path / "types.json").write_text(
        json.dumps({"rule": "x", "scores": [[1.0], [1.0, 2.0]], "spatial": [[True], [True, False]]})
    )
    with pytest.raises(ValueError, match="tables of the same layers and heads"):
        HeadTypes.load(tmp_path / "types.json", layers=2, heads=1)


def test_groups_part_the_heads():
    types = HeadTypes(rule="median", scores=[[0.5, -1.0], [0.1, 0.2]], spatial=[[False, True], [False, False]])
    assert not (types.group("spatial") & types.group("temporal")).any()
    assert (types.group("spatial") | types.group("temporal")).all()
    assert types.group("all").all()


def test_the_picture_shows_both_kinds():
    types = HeadTypes(rule="median", scores=[[2.0, -1.0]], spatial=[[False, True]])
    image = picture(types, cell=20)
    temporal, spatial = image.getpixel((45, 85)), image.getpixel((65, 85))
    assert temporal[0] > temporal[2] and spatial[2] > spatial[0]
    ((left, *_),) = [picture(HeadTypes(rule="x", scores=[[1.0]], spatial=[[True]]), cell=20).getpixel((45, 85))]
    assert left < 255  # a single kind has no border, and a picture none the less
