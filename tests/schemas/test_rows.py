"""The rows that flow."""

import re
from typing import get_args

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from schemas import AdapterRow, ErrorCode, ManifestRow, Reference, ResultRow, sample_id
from schemas.rows import NOT_DECISIVE, adapter_id

TEXT = st.text(max_size=40)
VALUES = st.fixed_dictionaries(
    {
        "reference_uri": TEXT,
        "reference_digest": TEXT,
        "start_frame": st.integers(0, 1000),
        "end_frame": st.none() | st.integers(0, 1000),
        "fps": st.floats(1, 240),
        "height": st.integers(1, 100).map(lambda n: 16 * n),
        "width": st.integers(1, 100).map(lambda n: 16 * n),
        "frames": st.integers(1, 30).map(lambda n: 4 * n + 1),
        "prompt": TEXT,
        "negative_prompt": TEXT,
        "method": st.sampled_from(["fastvmt", "none"]),
        "method_settings": st.sampled_from(["{}", '{"start":{}}']),
        "seed": st.integers(0, 2**32 - 1),
        "steps": st.integers(1, 1000),
        "shift": st.floats(0.1, 20),
        "guidance_scale": st.floats(0, 20),
        "dtype": st.sampled_from(["bfloat16", "float32"]),
        "model": TEXT,
        "model_revision": TEXT,
        "video_version": st.integers(1, 9),
        "caption": st.none() | TEXT,
        "category": st.none() | TEXT,
        "licence": st.none() | TEXT,
    }
)


def plain(**changes):
    values = {
        "reference_uri": "a.mp4", "reference_digest": "d", "start_frame": 0, "fps": 12.0, "height": 64, "width": 64,
        "frames": 5, "prompt": "a red ball", "method": "none", "seed": 0, "steps": 2, "shift": 3.0,
        "guidance_scale": 1.0, "model": "wan-nano", "model_revision": "r", "video_version": 1,
    }  # fmt: skip
    return values | changes


@given(VALUES)
def test_a_planned_row_is_valid_and_its_id_is_a_digest(values):
    row = ManifestRow.planned(**values)
    assert row.sample_id == sample_id(row.model_dump())
    assert re.fullmatch("[0-9a-f]{32}", row.sample_id)


@given(VALUES, VALUES)
def test_the_id_changes_if_and_only_if_something_decisive_changes(one, other):
    decisive = {name for name in one if one[name] != other[name]} - NOT_DECISIVE
    assert (sample_id(one) != sample_id(other)) == bool(decisive)


@given(VALUES, st.data())
def test_every_single_decisive_column_changes_the_id(values, data):
    name = data.draw(st.sampled_from(sorted(set(values) - NOT_DECISIVE)))
    assert sample_id(values) != sample_id(values | {name: "something else"})


@given(VALUES, TEXT)
def test_where_things_lie_and_what_they_are_called_does_not_change_the_id(values, text):
    names = ["sample_id", "reference_uri", "model", "caption", "category", "licence"]
    assert sample_id(values | dict.fromkeys(names, text)) == sample_id(values)


@given(VALUES)
def test_the_id_does_not_depend_on_the_order_of_columns(values):
    assert sample_id(dict(reversed(values.items()))) == sample_id(values)


@pytest.mark.parametrize("name", [name for name, field in ManifestRow.model_fields.items() if not field.is_required()])
def test_a_missing_column_counts_with_its_default(name):
    """A manifest from before a column was added keeps its ids."""
    without = {key: value for key, value in plain().items() if key != name}
    assert sample_id(without) == sample_id(without | {name: ManifestRow.model_fields[name].default})


def test_the_id_is_that_of_the_values_not_of_how_they_were_written():
    assert ManifestRow.planned(**plain(fps=12, shift=3)) == ManifestRow.planned(**plain(fps=12.0, shift=3.0))


def test_the_id_of_a_row_never_changes():
    """All that was made so far is found by it: a change of this digest makes every video anew."""
    assert sample_id(plain()) == "08630892975efd4fb93ba3fe2f953fb4"


@pytest.mark.parametrize("prompt", ["🎈 ball", "\ud800", "a\nb", "x" * 10_000, ""])
def test_any_text_has_an_id(prompt):
    assert sample_id(plain(prompt=prompt)) != sample_id(plain())


@pytest.mark.parametrize("name", ["prompt", "reference_uri", "caption"])
def test_text_that_no_file_can_hold_is_refused(name):
    with pytest.raises(ValidationError, match=f"{name}: .* is no valid Unicode"):
        ManifestRow.planned(**plain(**{name: "half a \ud800 pair"}))


ADAPTER = {
    "method": "follow_your_motion", "tuning": "{}", "reference_uri": "a.mp4", "reference_digest": "d", "start_frame": 0, "fps": 12.0,
    "height": 64, "width": 64, "frames": 9, "caption": "a ball", "model": "m", "model_revision": "r", "tuning_version": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(AdapterRow.model_fields) - {"adapter_id"}))
def test_an_adapters_id_follows_from_what_decides_its_training_and_nothing_else(name):
    values = AdapterRow.planned(**ADAPTER).model_dump()
    decisive = name in set(ADAPTER) - {"reference_uri", "model"} | {"end_frame"}
    assert (adapter_id(values | {name: "other"}) != adapter_id(values)) == decisive


def test_the_id_of_an_adapter_never_changes():
    """Hours of training are found by it."""
    assert AdapterRow.planned(**ADAPTER).adapter_id == "187c54a5e473cc4be66118aca93d34fd"


@pytest.mark.parametrize("name", ["reference_uri", "caption", "category"])
def test_an_adapters_text_can_be_stored_too(name):
    with pytest.raises(ValidationError, match=f"{name}: .* is no valid Unicode"):
        AdapterRow.planned(**ADAPTER | {name: "half a \ud800 pair"})


def through_arrow(row):
    table = pa.Table.from_pylist([row.model_dump()], schema=row.arrow_schema())
    return type(row).model_validate(table.to_pylist()[0])


@given(VALUES)
def test_a_manifest_row_survives_arrow(values):
    row = ManifestRow.planned(**values)
    assert through_arrow(row) == row


NUMBERS = {"video_bytes": st.integers(0, 2**40), "seconds_encode": st.floats(0, 1e6), "evaluations": st.integers(0, 99)}


@given(
    st.sampled_from(ErrorCode),
    st.sampled_from(["encode", "transfer", "finish"]),
    TEXT.filter(bool),
    st.fixed_dictionaries({}, optional=NUMBERS),
)
def test_a_result_row_survives_arrow(code, stage, message, numbers):
    values = ManifestRow.planned(**plain()).model_dump()
    why = {"error_code": code, "error_message": message, "stage": stage}
    for row in (
        ResultRow(**values, status="failed", attempts=3, **why, **numbers),
        ResultRow(**values, status="ok", video_uri=message, notes=message, **numbers),
    ):
        assert through_arrow(row) == row


@given(TEXT, st.integers(0, 99), st.none() | st.integers(100, 200), st.none() | st.floats(1, 60), st.none() | TEXT)
def test_a_reference_survives_arrow(uri, start, end, fps, text):
    row = Reference(uri=uri, start_frame=start, end_frame=end, fps=fps, caption=text, category=text, licence=text)
    assert through_arrow(row) == row


@pytest.mark.parametrize("cls", [Reference, ManifestRow, ResultRow])
def test_a_column_may_be_empty_if_and_only_if_the_row_may_lack_the_value(cls):
    for field in cls.arrow_schema():
        assert field.nullable == (type(None) in get_args(cls.model_fields[field.name].annotation))


@pytest.mark.parametrize("cls", [Reference, ManifestRow, ResultRow])
def test_unknown_columns_are_named(cls):
    with pytest.raises(ValidationError, match=r"colour\n *Extra inputs"):
        cls(colour="red")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 8}, "frames=8 is not 4k[+]1; use 5 or 9"),
        ({"frames": 4097}, "frames"),
        ({"width": 16_400}, "width"),
        ({"height": 50}, "multiple of 16"),
        ({"fps": 0.0}, "fps"),
        ({"seed": -1}, "seed"),
        ({"method": "../x"}, "method"),
        ({"dtype": "float16"}, "dtype"),
    ],
)
def test_wrong_values_are_named(changes, message):
    with pytest.raises(ValidationError, match=message):
        ManifestRow.planned(**plain(**changes))


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", "", "0" * 31, "G" * 32, "0" * 32 + "\n", "../" + "0" * 29])
def test_an_id_can_never_be_a_path(name):
    with pytest.raises(ValidationError, match="sample_id"):
        ManifestRow(sample_id=name, **plain())


def test_rows_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        ManifestRow.planned(**plain()).seed = 1


@pytest.mark.parametrize("end", [{"status": "failed"}, {"status": "failed", "error_code": "crashed"}, {"status": "ok"}])
def test_a_result_row_says_why_it_failed_or_where_its_video_is(end):
    with pytest.raises(ValidationError, match="needs"):
        ResultRow(**ManifestRow.planned(**plain()).model_dump(), **end)


@pytest.mark.parametrize("fps", [0, -1, float("inf"), float("nan")])
def test_a_reference_is_sampled_at_a_rate_that_can_be(fps):
    with pytest.raises(ValidationError, match="fps"):
        Reference(uri="a.mp4", fps=fps)


def test_an_empty_frame_range_is_refused():
    with pytest.raises(ValidationError, match="end_frame=5 is not after start_frame=5"):
        Reference(uri="a.mp4", start_frame=5, end_frame=5)
