"""Tables of methods, on rows made up by hand."""

import csv
import io
import json
from functools import partial

import numpy as np
import pytest

from pipelines import formats, plots, tables
from support.rows import metric_row as row


def only(lines, label, category=tables.ALL):
    (found,) = [line for line in lines if (line.label, line.category) == (label, category)]
    return found


def test_means_differences_and_wins_by_hand():
    rows = [row("none", n, motion=value, seconds=1.0) for n, value in enumerate([0.0, 0.1, 0.2, 0.3])]
    rows += [row("fastvmt", n, motion=value, seconds=3.0) for n, value in enumerate([0.5, 0.1, 0.1, 0.9])]
    fast = only(tables.compare(rows, "none"), "fastvmt")
    cell = fast.cells["motion"]
    assert cell.mean == pytest.approx(0.4)
    assert cell.difference == pytest.approx((0.5 + 0 - 0.1 + 0.6) / 4)
    assert cell.wins == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert cell.difference_low < cell.difference < cell.difference_high
    assert fast.cells["seconds"].wins == 0  # less is better
    assert "aesthetic_quality" not in fast.cells
    base = only(tables.compare(rows, "none"), "none")
    assert base.cells["motion"].difference is None


def test_pairs_are_the_same_reference_prompt_and_seed_only():
    rows = [
        row("none", 0, motion=0.0),
        row("none", 1, motion=0.0),
        row("fastvmt", 1, motion=1.0),
        row("fastvmt", 2, motion=5.0),
    ]
    cell = only(tables.compare(rows, "none"), "fastvmt").cells["motion"]
    assert (cell.count, cell.pairs, cell.difference) == (2, 1, 1.0)


def test_a_constant_margin_has_an_interval_of_no_width_and_noise_one_around_zero():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=60)
    rows = [row("none", n, motion=float(value)) for n, value in enumerate(noise)]
    rows += [row("a", n, motion=float(value) + 0.3) for n, value in enumerate(noise)]
    rows += [row("b", n, motion=float(value)) for n, value in enumerate(rng.permutation(noise))]
    lines = tables.compare(rows, "none")
    a, b = (only(lines, name).cells["motion"] for name in "ab")
    assert (a.difference_low, a.difference_high) == pytest.approx((0.3, 0.3))
    assert b.difference_low < 0 < b.difference_high


def test_many_videos_of_a_reference_make_no_interval_narrower():
    """Prompts and seeds of one clip are alike."""
    values = np.random.default_rng(0).normal(size=12)
    one, five = (
        only(
            tables.compare(
                [
                    row(method, n, pair=f"{n} {prompt}", motion=scale * float(value))
                    for method, scale in (("none", 1.0), ("fastvmt", 2.0))
                    for n, value in enumerate(values)
                    for prompt in range(prompts)
                ],
                "none",
            ),
            "fastvmt",
        ).cells["motion"]
        for prompts in (1, 5)
    )
    assert (five.count, five.references, five.pairs) == (60, 12, 60)
    assert (one.low, one.high) == pytest.approx((five.low, five.high))
    assert (one.difference_low, one.difference_high) == pytest.approx((five.difference_low, five.difference_high))


def test_failed_rows_are_counted_and_not_measured():
    rows = [row("none", 0, motion=0.5), row("none", 1, status="failed", error_code="crashed")]
    line = only(tables.compare(rows, "none"), "none")
    assert (line.made, line.failed, line.cells["motion"].count) == (1, 1, 1)


def test_a_mean_of_few_of_the_videos_says_so_and_is_not_the_best():
    """A method that breaks nine of ten videos does not win by the tenth."""
    rows = [row("none", n, motion=0.1) for n in range(10)] + [row("good", n, motion=0.6) for n in range(10)]
    rows += [row("bad", n, motion=0.9 if n == 0 else None) for n in range(10)]
    lines = tables.compare(rows, "none")
    assert "| bad | 10 | 0.900 (+0.800 [+0.800, +0.800]; 1 of 10 videos) |" in formats.to_markdown(lines)
    assert "| good | 10 | 0.600 (+0.500 [+0.500, +0.500]) |" in formats.to_markdown(lines)
    assert r"\textbf{0.600}" in formats.to_latex(lines) and r"0.900\textsuperscript{1/10}" in formats.to_latex(lines)
    assert plots.intervals(lines, "motion").count("(1 of 10 videos)") == 1
    assert [line["motion_count"] for line in csv.DictReader(io.StringIO(formats.to_csv(lines)))][:3] == [
        "10",
        "1",
        "10",
    ]


def test_categories_have_lines_of_their_own():
    rows = [row("none", 0, motion=0.0), row("none", 1, motion=1.0, category="camera")]
    lines = tables.compare(rows, "none")
    assert [only(lines, "none", category).cells["motion"].mean for category in (tables.ALL, "camera", "single")] == [
        0.5,
        1.0,
        0.0,
    ]


def test_variants_of_a_method_are_told_apart_by_what_differs():
    settings = [json.dumps({"adapter": {"spatial_scale": scale, "temporal_scale": 1.0}}) for scale in (0.0, 1.0)]
    rows = [row("none", 0), row("tuned", 0, settings=settings[0]), row("tuned", 0, settings=settings[1])]
    assert [line.label for line in tables.compare(rows, "none") if line.category == tables.ALL] == [
        "none", "tuned adapter.spatial_scale=0.0", "tuned adapter.spatial_scale=1.0",
    ]  # fmt: skip
    rows = [row("none", 0, run="/a"), row("none", 0, run="/b")]
    assert {line.label for line in tables.compare(rows, "none")} == {"none (a)", "none (b)"}
    rows = [row("none", 0, run="/x/run"), row("none", 0, run="/y/run")]
    assert {line.label for line in tables.compare(rows, "none")} == {"none (x/run)", "none (y/run)"}


def test_other_sampling_is_another_line_and_another_pair():
    rows = [
        row(method, n, pair=f"{steps} {n}", sampling=json.dumps({"steps": steps}), motion=steps + (method == "fastvmt"))
        for method in ("none", "fastvmt")
        for steps in (10, 20)
        for n in range(3)
    ]
    lines = [line for line in tables.compare(rows, "none") if line.category == tables.ALL]
    assert [line.label for line in lines] == ["none steps=10", "none steps=20", "fastvmt steps=10", "fastvmt steps=20"]
    assert [line.cells["motion"].difference for line in lines] == [None, None, 1, 1]


def test_other_weights_are_another_line():
    rows = [
        row("none", n, sampling=json.dumps({"model_revision": 40 * kind}), motion=0.0) for n in (1, 2) for kind in "ab"
    ]
    labels = {line.label for line in tables.compare(rows, "none")}
    assert labels == {f'none model_revision="{12 * kind}"' for kind in "ab"}


def test_a_run_is_compared_with_its_own_baseline_else_with_anothers():
    rows = [row("none", n, run=run, motion=value) for run, value in (("/a", 0.0), ("/b", 10.0)) for n in range(3)]
    rows += [row("fastvmt", n, run=run, motion=value) for run, value in (("/a", 1.0), ("/b", 11.0)) for n in range(3)]
    rows += [row("ditflow", n, run="/c", motion=12.0) for n in range(3)]
    lines = tables.compare(rows, "none")
    assert [only(lines, f"fastvmt ({run})").cells["motion"].difference for run in "ab"] == [1, 1]
    assert only(lines, "ditflow").cells["motion"].difference in (2, 12)


def test_differences_are_to_one_choice_of_settings():
    plain, other = json.dumps({"strength": 1.0}), json.dumps({"strength": 0.5})
    rows = [row("none", n, settings=plain, motion=0.1) for n in range(9)]
    rows += [row("none", n, settings=other, motion=0.5) for n in range(9)]
    rows += [row("fastvmt", n, settings="{}", motion=0.6) for n in range(9)]

    def differences(baseline):
        lines = [line for line in tables.compare(rows, baseline) if line.category == tables.ALL]
        return {line.label: line.cells["motion"].difference for line in lines}

    near = partial(pytest.approx, abs=1e-9)
    assert differences("none") == {"none strength=0.5": None, "none strength=1.0": near(-0.4), "fastvmt": near(0.1)}
    assert differences("none strength=1.0") == {
        "none strength=1.0": None,
        "none strength=0.5": near(0.4),
        "fastvmt": near(0.5),
    }


def test_the_order_of_rows_does_not_matter():
    rows = [row(method, n, motion=n * 0.1 + len(method) * 0.01) for method in ("none", "a") for n in range(20)]
    assert tables.compare(rows, "none") == tables.compare(rows[::-1], "none")


def test_every_format_says_the_same():
    rows = [row("none", n, motion=0.1 * n, seconds=1.0) for n in range(4)]
    rows += [row("follow_your_motion", n, motion=0.1 * n + 0.25, seconds=2.0) for n in range(4)]
    lines = tables.compare(rows, "none")
    table = list(csv.DictReader(io.StringIO(formats.to_csv(lines))))
    assert [line["method"] for line in table if line["category"] == "all"] == ["none", "follow_your_motion"]
    assert float(table[1]["motion_difference"]) == pytest.approx(0.25)
    assert table[0]["motion_difference"] == ""
    assert "| follow_your_motion | 4 | 0.40 (+0.25 [+0.25, +0.25])" in formats.to_markdown(lines)
    latex = formats.to_latex(lines)
    assert r"follow\_your\_motion & \textbf{0.40} & 2.000" in latex
    assert r"none & 0.15 & \textbf{1.000}" in latex
    paper = formats.papers_shape(lines)
    assert "*FastVMT, published*" in paper and "0.7471" in paper and "not comparable in absolute terms" in paper


def test_columns_of_the_paper_are_by_flow_only_where_the_papers_models_were_not_given():
    lines = tables.compare([row("none", n, motion_matched=0.25, smoothness=0.5) for n in range(3)], "none")
    paper = formats.papers_shape(lines)
    assert "| none |  | 0.25 |" in paper and paper.splitlines()[2].endswith("| 0.5 |")
    assert "motion_fidelity is motion_matched by optical flow and motion_smoothness is smoothness" in paper
    rows = [row("none", n, motion_matched=0.25, smoothness=0.5, motion_fidelity=0.75) for n in range(3)]
    paper = formats.papers_shape(tables.compare(rows, "none"))
    assert "| none |  | 0.75 |" in paper and "motion_matched" not in paper and "is smoothness by" in paper


def test_nothing_measured_is_an_empty_table():
    assert tables.compare([], "none") == []
    assert formats.to_csv([]).startswith("method,category,made,failed")


def test_what_is_drawn_are_references_with_all_of_their_videos():
    """Five prompts of a clip that all fare alike are no more evidence than one."""
    rng = np.random.default_rng(0)
    clips = rng.normal(size=12)
    once = tables.interval(clips, np.arange(12), 500)
    assert tables.interval(np.repeat(clips, 5), np.repeat(np.arange(12), 5), 500) == pytest.approx(once)
    apart = tables.interval(np.repeat(clips, 5), np.arange(60), 500)
    assert np.diff(apart) < 0.6 * np.diff(once)


def test_references_count_by_their_videos():
    values, references = np.array([0.0, 0.0, 0.0, 1.0]), np.array([7, 7, 7, 9])
    assert tables.interval(values, references, 2000) == (0.0, 1.0)


def test_the_videos_of_a_single_reference_are_drawn_one_by_one():
    low, high = tables.interval(np.array([0.0, 1.0] * 10), np.zeros(20, int), 500)
    assert 0.2 < low < 0.5 < high < 0.8


@pytest.mark.filterwarnings("error")  # of matplotlib, that there is no room
@pytest.mark.parametrize("text", ["$^$", "a | b", "blurry, " * 60, "blurry" * 60])
def test_a_setting_of_any_text_can_be_shown(text):
    rows = [
        row("none", n, sampling=json.dumps({"negative_prompt": prompt}), motion=0.1 * n, seconds=1.0)
        for n in range(2)
        for prompt in (text, "")
    ]
    lines = tables.compare(rows, "none")
    assert plots.intervals(lines, "motion") and plots.against_seconds(lines)
    heads = [
        line.count("|") - line.count(r"\|") for line in formats.to_markdown(lines).splitlines() if line.startswith("|")
    ]
    assert len(set(heads)) == 1
