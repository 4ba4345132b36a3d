"""jobs/plan.py."""

import csv
import json
import os
import re
import shutil
from itertools import pairwise
from pathlib import Path
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import plan, references
from pipelines.storage import Storage
from schemas import ErrorCode, ManifestRow, PlanSettings, RowError, UsageError
from support import jobs
from support.clips import BAD, clip


@pytest.fixture
def settings(model, clips, prompts, tmp_path):
    def make(**changes):
        values = {
            "references": str(clips), "prompts": str(prompts), "output": str(tmp_path / "manifest"), "model": model,
            "preset": "nano", "height": 64, "width": 64, "frames": 9, "steps": 3, "methods": ("fastvmt", "none"),
        }  # fmt: skip
        return PlanSettings(**(values | changes))

    return make


def planned(settings, say=lambda line: None):
    plan.run(settings, say)
    return [ManifestRow.model_validate(row) for row in pq.read_table(settings.output).to_pylist()]


def refused(settings):
    lines = []
    with pytest.raises(UsageError) as caught:
        plan.run(settings, lines.append)
    return str(caught.value), lines


def test_every_clip_with_every_method_prompt_and_seed(settings, clips):
    rows = planned(settings(seeds=(0, 7)))
    assert len(rows) == len({row.sample_id for row in rows}) == 2 * 2 * 2 * 2
    assert {row.prompt for row in rows} == {"a red ball", "a yellow star at night"}
    assert {row.seed for row in rows} == {0, 7}
    assert {row.reference_uri for row in rows} == {str(clips / "line.mp4"), str(clips / "pan.mp4")}
    changes = sum(a.reference_uri != b.reference_uri for a, b in pairwise(rows))
    assert changes == 1  # rows of one reference lie together
    assert json.loads(rows[0].method_settings)["objective"]["block"] == 5


def test_the_same_plan_twice_is_the_same_manifest(settings):
    assert planned(settings()) == planned(settings())


def test_the_command_prints_counts_and_an_estimate(model, clips, prompts, tmp_path, small):
    code, text = jobs.here(
        "plan", "--references", clips, "--prompts", prompts, "--methods", "fastvmt,ditflow", "--seeds", "0,1",
        "--output", tmp_path / "m", *small,
    )  # fmt: skip
    assert code == 0, text
    assert "16 rows = 2 references x 2 prompts x 2 seeds x 2 methods (fastvmt, ditflow)" in text
    assert "under 1 s of one GPU at 400 TFLOP/s" in text
    assert "guidance gradients" in text


@pytest.mark.parametrize("kind", ["glob", "file", "csv", "jsonl", "parquet"])
def test_clips_are_listed_in_many_ways(settings, clips, tmp_path, kind):
    table = tmp_path / f"references.{kind}"
    line = {"uri": str(clips / "line.mp4"), "start_frame": 1, "category": "camera", "licence": "CC0"}
    if kind == "csv":
        table.write_text(",".join(line) + "\n" + ",".join(map(str, line.values())) + "\n")
    elif kind == "jsonl":
        table.write_text(json.dumps(line) + "\n")
    elif kind == "parquet":
        table = (
            tmp_path / "start_frame=5" / "references.parquet"
        )  # what folders are called says nothing of a file's rows
        table.parent.mkdir()
        pq.write_table(pa.Table.from_pylist([line]), table)
    else:
        table = clips / ("li*.mp4" if kind == "glob" else "line.mp4")
    rows = planned(settings(references=str(table)))
    assert {row.reference_uri for row in rows} == {str(clips / "line.mp4")}
    if kind in ("csv", "jsonl", "parquet"):
        assert {(row.start_frame, row.category, row.licence) for row in rows} == {(1, "camera", "CC0")}


def test_paths_in_a_table_count_from_its_folder(settings, clips, tmp_path):
    shutil.copy(clips / "line.mp4", tmp_path / "here.mp4")
    (tmp_path / "references.csv").write_text("uri\nhere.mp4\n")
    assert planned(settings(references=str(tmp_path / "references.csv")))[0].reference_uri == str(tmp_path / "here.mp4")


def test_clips_manifest_and_prompts_on_s3(settings, clips, prompts, bucket):
    storage = Storage()
    for name in ("line.mp4", "pan.mp4"):
        storage.put(clips / name, f"s3://{bucket}/clips/{name}")
    storage.put(prompts, f"s3://{bucket}/prompts.txt")
    plan.run(
        settings(references=f"s3://{bucket}/clips", prompts=f"s3://{bucket}/prompts.txt", output=f"s3://{bucket}/m"),
        lambda line: None,
    )
    (name,) = storage.find(f"s3://{bucket}/m")
    filesystem, path = storage.arrow(name)
    rows = pq.read_table(path, filesystem=filesystem).to_pylist()
    assert {row["reference_uri"] for row in rows} == {f"s3://{bucket}/clips/line.mp4", f"s3://{bucket}/clips/pan.mp4"}


def test_bad_clips_are_listed_and_left_out_only_when_asked(settings, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    clip(folder / "good.mp4", frames=9)
    for code, write in BAD.items():
        write(folder / f"{code}.mp4")
    message, lines = refused(settings(references=str(folder)))
    assert f"{len(BAD)} of {len(BAD) + 1} clips cannot be used" in message
    assert "--skip-bad" in message
    found = {code for code in BAD for line in lines if f"{code}: " in line and f"{code}.mp4" in line}
    assert found == BAD.keys()
    rows = planned(settings(references=str(folder), skip_bad=True))
    assert {row.reference_uri for row in rows if "good" in row.reference_uri} == {str(folder / "good.mp4")}


def test_what_is_left_out_stands_beside_the_manifest(settings, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    clip(folder / "good.mp4", frames=9)
    (folder / "twin.mp4").write_bytes((folder / "good.mp4").read_bytes())
    for number in range(22):
        (folder / f"{number}.mp4").write_bytes(b"no video")
    lines = refused(settings(references=str(folder)))[1]
    assert "… and 2 more bad clips" in lines
    wanted = settings(references=str(folder), skip_bad=True)
    rows = planned(wanted)
    assert {row.reference_uri for row in rows} == {str(folder / "good.mp4")}
    with open(f"{wanted.output}/_left_out.csv", newline="") as file:
        left = {line["uri"]: line for line in csv.DictReader(file)}
    assert left[str(folder / "twin.mp4")]["code"] == "duplicate"
    assert str(folder / "good.mp4") in left[str(folder / "twin.mp4")]["message"]
    assert len(left) == 23
    assert left[str(folder / "0.mp4")]["code"] == "not_a_video"
    assert pq.read_table(wanted.output).num_rows == len(rows)  # the list is not in a reader's way
    for number in range(22):
        (folder / f"{number}.mp4").unlink()
    (folder / "twin.mp4").unlink()
    planned(wanted)
    assert not Path(f"{wanted.output}/_left_out.csv").exists()


def test_a_clip_that_stands_twice_with_prompts_of_its_own_is_not_left_out(settings, clips, tmp_path):
    lines = [{"uri": str(clips / "line.mp4"), "prompts": prompt} for prompt in ("a fox", "an owl")]
    (tmp_path / "clips.jsonl").write_text("\n".join(map(json.dumps, lines)))
    wanted = settings(references=str(tmp_path / "clips.jsonl"), skip_bad=True, methods=("none",))
    assert {"a fox", "an owl"} < {row.prompt for row in planned(wanted)}
    assert not Path(f"{wanted.output}/_left_out.csv").exists()


def test_names_of_buckets_that_cannot_be_are_bad_clips(settings, clips, tmp_path, bucket):
    lines = [{"uri": str(clips / "line.mp4")}, {"uri": "s3://no bucket/v.mp4"}]
    (tmp_path / "clips.jsonl").write_text("\n".join(map(json.dumps, lines)))
    wanted = settings(references=str(tmp_path / "clips.jsonl"), skip_bad=True)
    assert {row.reference_uri for row in planned(wanted)} == {str(clips / "line.mp4")}
    assert "reference_missing" in Path(f"{wanted.output}/_left_out.csv").read_text()


def test_shorter_clips_give_fewer_frames(settings, tmp_path):
    clip(tmp_path / "short.mp4", frames=7)
    assert {row.frames for row in planned(settings(references=str(tmp_path / "short.mp4")))} == {5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("fastmvt",)}, "'fastmvt' is not one of"),
        ({"methods": ("none", "none")}, "each once"),
        ({"seeds": (1, 1)}, "--seeds: 1 stands twice"),
        ({"seeds": ()}, "--seeds: give at least one"),
        (
            {"sweep": {"fastvmt": {"guidance.inner": []}}},
            r"sweep: fastvmt: guidance.inner: \[\] must be one value or more",
        ),
        ({"sweep": {"fastvmt": {"guidance.inner": [5, 5]}}}, r"guidance.inner: \[5, 5\] must be .* each once"),
        (
            {"sweep": {"fastvmt": {"guidance.inner": [5, "5"]}}},
            "sweep: fastvmt: some of its values mean the same settings",
        ),
        (
            {"sweep": {"fastvmt": {"guidance.inner": [5]}}, "method_settings": {"fastvmt": {"guidance": None}}},
            "sweep: guidance.inner: guidance is None in method_settings, no group of settings",
        ),
        (
            {"methods": ("none", "follow_your_motion")},
            "line.mp4 and 1 more: no caption, which follow_your_motion is tuned with",
        ),
        (
            {"limits": {"max_prompt_chars": 12}},
            "a prompt of 22 characters, limits.max_prompt_chars is 12: a yellow star",
        ),
        ({"prompts": "/"}, "--prompts /: is a folder"),
        ({"output": "/etc/hostname"}, "--output /etc/hostname: is a file"),
        ({"preset": "default"}, "fastvmt reads block 14, but the model has blocks 0..7"),
        ({"references": "/nowhere"}, "no video there"),
        ({"references": "/nowhere.csv"}, "/nowhere.csv: no such file"),
        ({"references": "/nowhere.parquet"}, "/nowhere.parquet: no such file"),
        ({"negative_prompt": "x" * 2001}, "--negative-prompt: has 2,001 characters, limits.max_prompt_chars is 2,000"),
        ({"prompts": "list.csv"}, "--prompts list.csv: is a table; prompts are a text file"),
        ({"output": "/etc/hostname/m"}, "--output /etc/hostname/m: cannot be written"),
        ({"prompts": "/nowhere.txt"}, "no such file"),
        ({"model": "/nowhere"}, "no such folder"),
        ({"method_settings": {"ditflow": {}}}, "'ditflow' is not among --methods"),
        ({"method_settings": {"fastvmt": {"guidance": {"inner": 0}}}}, "guidance.inner|inner"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_line(settings, changes, message):
    text, _ = refused(settings(**changes))
    assert re.search(message, text), text


@pytest.mark.parametrize(
    "changes",
    [
        {"negative_prompt": "x" * 2001},
        {"limits": {"max_prompt_chars": 12}},
        {"methods": ("follow_your_motion",)},
        {"method_settings": {"fastvmt": {"guidance": {"inner": 0}}}},
        {"output": "in the way"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_is_wrong_with_settings_is_said_before_clips_are_opened(settings, changes, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "open_all", Mock(side_effect=AssertionError("opened")))
    if "output" in changes:
        changes = {"output": str(tmp_path / "taken")}
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken" / "other.parquet").write_text("x")
    refused(settings(**changes))


def test_a_clip_is_opened_once_for_all_its_ranges(settings, clips, tmp_path, monkeypatch):
    lines = [{"uri": str(clips / "line.mp4"), "start_frame": start} for start in range(3)]
    (tmp_path / "clips.jsonl").write_text("\n".join(map(json.dumps, lines)))
    fetch, fetched = Storage.fetch, []
    monkeypatch.setattr(
        Storage, "fetch", lambda self, uri, *args, **named: fetched.append(uri) or fetch(self, uri, *args, **named)
    )
    rows = planned(settings(references=str(tmp_path / "clips.jsonl"), methods=("none",), frames=5))
    assert {row.start_frame for row in rows} == {0, 1, 2}
    assert fetched == [str(clips / "line.mp4")]


def test_ranges_that_are_too_short_say_which(settings, clips, tmp_path):
    line = {"uri": str(clips / "line.mp4"), "start_frame": 6, "fps": 6}
    (tmp_path / "clips.jsonl").write_text(json.dumps(line))
    _, lines = refused(settings(references=str(tmp_path / "clips.jsonl")))
    assert re.search(r"line.mp4: its frames 6 to \d+, of \d+ at 12 fps, are too few for 5 at 6 fps", lines[0]), lines


def test_names_that_are_no_unicode_are_bad_clips(settings, clips, tmp_path):
    folder = os.fsencode(tmp_path / "odd")
    os.mkdir(folder)
    shutil.copy(clips / "line.mp4", os.path.join(folder, b"\xff.mp4"))
    shutil.copy(clips / "pan.mp4", os.path.join(folder, b"good.mp4"))
    shutil.copy(clips / "pan.mp4", os.path.join(folder, b"._good.mp4"))  # as macOS leaves some
    wanted, lines = settings(references=str(tmp_path / "odd"), skip_bad=True), []
    plan.run(wanted, lines.append)
    assert any("its name is no valid Unicode; rename it" in line for line in lines)
    assert {row["reference_uri"] for row in pq.read_table(wanted.output).to_pylist()} == {
        str(tmp_path / "odd" / "good.mp4")
    }


@pytest.mark.parametrize("name", ["clip [x].mp4", "br[1]/clip.mp4"])
def test_a_place_with_brackets_is_taken_as_it_is_where_it_is_there(settings, clips, tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    shutil.copy(clips / "line.mp4", tmp_path / name)
    place = tmp_path / name if name.startswith("clip") else (tmp_path / name).parent
    assert {row.reference_uri for row in planned(settings(references=str(place)))} == {str(tmp_path / name)}


def test_tables_may_say_more_and_give_prompts_as_lists(settings, clips, tmp_path):
    uri = clips / "line.mp4"
    (tmp_path / "clips.CSV").write_text(f"uri,note\n{uri},mine\n")
    assert planned(settings(references=str(tmp_path / "clips.CSV")))
    line = {"uri": str(uri), "prompts": ["a fox\u2028in snow", "an owl"]}
    (tmp_path / "clips.jsonl").write_text(json.dumps(line, ensure_ascii=False))
    rows = planned(settings(references=str(tmp_path / "clips.jsonl"), prompts=None, methods=("none",)))
    assert {row.prompt for row in rows} == {"a fox in snow", "an owl"}
    (tmp_path / "clips.csv").write_text(f"uri;caption\n{uri};a ball\n")
    message = refused(settings(references=str(tmp_path / "clips.csv")))[0]
    assert message.endswith("clips.csv: has no column uri, only uri;caption; commas must separate them")


def test_empty_prompts_of_a_list_are_left_out(settings, tmp_path):
    (tmp_path / "list.json").write_text('[{"prompt_en": "a fox"}, {"prompt_en": " "}]')
    assert {row.prompt for row in planned(settings(prompts=str(tmp_path / "list.json")))} == {"a fox"}


def test_it_says_what_it_replaces_and_which_clips_are_short(settings):
    said = []
    planned(settings(seeds=(0, 1)), said.append)
    planned(settings(seeds=(0, 1, 2)), said.append)
    assert not any(line.startswith("replaces") for line in said)
    said.clear()
    planned(settings(frames=17), said.append)
    assert "replaces a manifest of 24 other rows" in said
    assert "note: clips too short for 17 frames give fewer: 8 of 9" in said


def test_repeated_prompts_and_repeated_clips_are_refused(settings, clips, tmp_path):
    (tmp_path / "p.txt").write_text("a\nb\na\n")
    assert "'a' stands 2 times" in refused(settings(prompts=str(tmp_path / "p.txt")))[0]
    folder = tmp_path / "twice"
    folder.mkdir()
    for name in ("one.mp4", "two.mp4"):
        shutil.copy(clips / "line.mp4", folder / name)
    text = refused(settings(references=str(folder)))[0]
    assert "one.mp4" in text
    assert "two.mp4" in text


def test_a_parquet_table_may_say_more_but_not_nearly_the_same(settings, clips, tmp_path):
    uris = [str(clips / "line.mp4"), str(clips / "pan.mp4")]
    table = {
        "uri": uris,
        "caption": ["a ball", "a floor"],
        "motion_caption": ["rolls", "slides"],
        "tracks": [[1.0], [2.0]],
    }
    pq.write_table(pa.table(table), tmp_path / "more.parquet")
    rows = planned(settings(references=str(tmp_path / "more.parquet"), methods=("none",)))
    assert {row.caption for row in rows} == {"a ball", "a floor"}
    pq.write_table(pa.table({"uri": uris, "captoin": ["a ball", "a floor"]}), tmp_path / "typo.parquet")
    message, _ = refused(settings(references=str(tmp_path / "typo.parquet")))
    assert message.endswith("typo.parquet: column 'captoin': did you mean 'caption'?")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uri,captoin\na.mp4,a ball\n", "column 'captoin': did you mean 'caption'?"),
        ("uri,caption\na.mp4,a ball, red\n", "row 1: more cells than the header has"),
    ],
)
def test_a_csv_that_is_not_quite_one_is_named(settings, tmp_path, text, message):
    (tmp_path / "clips.csv").write_text(text)
    assert message in refused(settings(references=str(tmp_path / "clips.csv")))[0]


def test_a_folder_of_clips_stays_one_when_a_manifest_is_written_into_it(settings, clips, tmp_path):
    shutil.copytree(clips, tmp_path / "clips")
    own = settings(references=str(tmp_path / "clips"), output=str(tmp_path / "clips"))
    assert [plan.run(own, lambda line: None)["rows"] for _ in range(2)] == [8, 8]


def test_a_folder_of_parquet_files_is_one_table(settings, clips, tmp_path):
    for name in ("line", "pan"):
        folder = tmp_path / "data" / f"category={name}"
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"uri": [str(clips / f"{name}.mp4")]}), folder / "part-0.parquet")
    rows = planned(settings(references=str(tmp_path / "data"), methods=("none",)))
    assert {(row.reference_uri.rsplit("/", 1)[1], row.category) for row in rows} == {
        ("line.mp4", "line"),
        ("pan.mp4", "pan"),
    }


def test_a_folder_that_holds_other_tables_is_left_as_it_is(settings, tmp_path):
    other = tmp_path / "out" / "results" / "status=ok" / "rows.parquet"
    other.parent.mkdir(parents=True)
    pq.write_table(pa.table({"sample_id": ["a"]}), other)
    message, _ = refused(settings(output=str(tmp_path / "out")))
    assert f"holds {other}, which is no manifest; take a folder of its own" in message
    assert other.exists() and len(list((tmp_path / "out").rglob("*.parquet"))) == 1


def test_a_shorter_plan_replaces_a_longer_one(settings, monkeypatch):
    monkeypatch.setattr(plan.manifest.write, "__kwdefaults__", {"rows_per_file": 3})
    assert len(planned(settings(seeds=(0, 1)))) == 16
    assert len(planned(settings(methods=("none",)))) == 4


def test_a_storage_that_does_not_answer_makes_no_clip_bad(clips, prompts, tmp_path, small, monkeypatch):
    def unavailable(*_):
        raise RowError(ErrorCode.STORAGE_UNAVAILABLE, "503 after 5 attempts")

    monkeypatch.setattr(references, "_open", unavailable)
    code, text = jobs.here(
        "plan", "--references", clips, "--prompts", prompts, "--output", tmp_path / "out", "--skip-bad", *small
    )
    assert code == 1
    assert "503 after 5 attempts" in text and "bad clip" not in text
    assert not (tmp_path / "out").exists()
