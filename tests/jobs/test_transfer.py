"""jobs/transfer.py on a model that really runs."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.storage import Storage, sha256
from schemas import LimitSettings, sample_id
from support import jobs
from support.clips import BAD, clip
from support.fault_proxy import FaultProxy, Rule
from vmt_core import METHODS, Backbone, MotionTransfer, Sampling, video

FAST = ["--progress-s", 2]


@pytest.fixture(scope="module")
def made(clips, model, small, tmp_path_factory):
    """(manifest, output, what the run printed) of 2 clips x 2 seeds x 3 methods."""
    folder = tmp_path_factory.mktemp("transfer")
    source = folder / "seed=7" / "manifest"  # what folders are called says nothing of rows
    (folder / "prompts.txt").write_text("a yellow star at night\n")
    code, text = jobs.here(
        "plan", "--references", clips, "--prompts", folder / "prompts.txt", "--methods", "fastvmt,ditflow,none", "--seeds", "0,1",
        "--negative-prompt", "blurred", "--output", source, *small,
    )  # fmt: skip
    assert code == 0, text
    code, text = jobs.run(
        "transfer", "--manifest", source, "--model", model, "--output", folder / "one", "--transfer.batch-rows", 4, *FAST
    )  # fmt: skip
    assert code == 0, text
    return source, folder / "one", text


def test_a_row_is_the_video_that_the_core_makes_of_it(made, model, tmp_path):
    rows = {(row.method, row.seed): row for row in jobs.results(made[1]) if row.reference_uri.endswith("line.mp4")}
    backbone = Backbone.load(model, dtype=getattr(torch, rows["none", 0].dtype))

    def seen(uri):
        return video.read(uri, height=64, width=64, frames=9, fps=12).float()

    for method in ("fastvmt", "ditflow", "none"):
        row = rows[method, 1]
        core = MotionTransfer(
            backbone,
            METHODS[method](**json.loads(row.method_settings)),
            Sampling(row.steps, row.shift, row.guidance_scale),
        )
        (frames,) = core.transfer(core.prepare(seen(row.reference_uri).byte()), [row.prompt], [1], "blurred")
        video.write(tmp_path / "core.mp4", frames, row.fps)
        wanted = seen(tmp_path / "core.mp4")
        assert (seen(row.video_uri) - wanted).abs().mean() < 0.5
        assert (seen(rows[method, 0].video_uri) - wanted).abs().mean() > 5  # the other seed


def test_a_manifest_becomes_videos_that_are_accounted_for(made, model, monkeypatch):
    source, output, text = made
    assert "12 selected = 12 ok + 0 failed + 0 left" in text
    one = {row.sample_id: row for row in jobs.results(output)}
    assert len(one) == 12 and {row.seed for row in one.values()} == {0, 1}
    for row in one.values():
        assert row.video_sha256 == sha256(row.video_uri)
        assert row.video_bytes == Path(row.video_uri).stat().st_size
        info = video.probe(row.video_uri, LimitSettings())
        assert (info.frames, info.width, info.height, info.fps) == (9, 64, 64, 12)
        with av.open(row.video_uri) as container:
            assert container.metadata["sample_id"] == row.sample_id
            assert container.metadata["comment"] == "AI-generated"
        assert Path(row.reference_video_uri).is_file()
        assert row.denoiser_calls == 6
        assert row.evaluations == {"fastvmt": 8, "ditflow": 10, "none": 0}[row.method]
        assert min(row.seconds_encode, row.seconds_transfer, row.seconds_finish) >= 0
        assert json.loads(row.versions)["torch"]
    assert len(list((output / "references").glob("*.mp4"))) == 2

    summary = json.loads((output / "run/summary.json").read_text())
    assert (summary["selected"], summary["ok"], summary["failed"], summary["left"]) == (12, 12, 0, 0)
    assert summary["denoiser_calls"] == 72
    assert set(summary["seconds_by_stage"]) == {"encode", "transfer", "finish"}
    page = (output / "run/report.html").read_text()
    assert "a yellow star at night" in page
    assert json.loads((output / "run/settings.json").read_text())["transfer"]["batch_rows"] == 4

    monkeypatch.setattr("pipelines.ledger._MANY", 1)  # files of a method
    code, text = jobs.here("transfer", "--manifest", source, "--model", model, "--output", output)
    assert code == 0
    assert "nothing was left to make" in text
    assert "gathering" in text and len(list(output.glob("results/status=ok/method=*/*.parquet"))) == 3
    assert {row.sample_id: row for row in jobs.results(output)} == one
    some = ["--manifest", source, "--model", model, "--output", output, "--samples"]
    code, text = jobs.here("transfer", *some, ",".join([*one][:2]))
    assert code == 0
    assert "2 selected = 2 ok" in text
    code, text = jobs.here("transfer", *some, f"{next(iter(one))},{'0' * 32}")
    assert code == 2
    assert f"has no rows with the ids {'0' * 32}" in text


@pytest.fixture
def bad_rows(model, tmp_path, bucket, s3_server):
    """error code -> a row that fails with it; and good rows beside them."""

    def made(prompt, path, **changes):
        known = {"reference_uri": str(path), "reference_digest": sha256(path) if Path(path).is_file() else "0" * 64}
        return jobs.row(prompt, model=model, **(known | changes))

    rows = {}
    for code, write in BAD.items():
        write(tmp_path / f"{code}.mp4")
        rows[code] = made(code, tmp_path / f"{code}.mp4", frames=17 if code == "truncated" else 5)
    good = clip(tmp_path / "good.mp4")
    long = clip(tmp_path / "long.mp4", frames=45)
    large = clip(tmp_path / "large.mp4", frames=5, size=(160, 160))
    heavy = tmp_path / "heavy.mp4"
    heavy.write_bytes(good.read_bytes() + bytes(2**20))
    changed = clip(tmp_path / "changed.mp4", seed=5)
    Storage().put(good, f"s3://{bucket}/forbidden.mp4")
    rows |= {
        "reference_missing": made("missing", tmp_path / "nowhere.mp4"),
        "too_many_frames": made("long", long),
        "too_many_pixels": made("large", large),
        "reference_too_large": made("heavy", heavy),
        "reference_changed": made("changed", changed, reference_digest="1" * 64),
        "scheme_forbidden": made("scheme", "https://example.com/clip.mp4"),
        "reference_forbidden": made("403", f"s3://{bucket}/forbidden.mp4"),
        "prompt_empty": made("  ", good),
        "prompt_too_long": made("x" * 10_000, good),
    }
    more = {"reference_missing": made("404", f"s3://{bucket}/nowhere.mp4")}
    fine = [
        made("fine", good),
        made("🎈 line\nbreak", good),
        made("on s3", f"s3://{bucket}/fine.mp4", reference_digest=sha256(good)),
    ]
    Storage().put(good, f"s3://{bucket}/fine.mp4")
    return rows, more, fine


def test_each_bad_input_is_one_failed_row_with_its_own_code(bad_rows, model, tmp_path, s3_server):
    rows, more, fine = bad_rows
    source = jobs.write_manifest(tmp_path / "manifest", [*rows.values(), *more.values(), *fine])
    with FaultProxy(s3_server, [Rule(key="forbidden", status=403, code="AccessDenied")]) as proxy:
        code, text = jobs.run(
            "transfer", "--manifest", source, "--model", model, "--output", tmp_path / "out", *FAST,
            "--limits.max-frames", 40, "--limits.max-pixels", 150 * 150, "--limits.max-reference-mib", 1,
            "--storage.endpoint-url", proxy.url,
        )  # fmt: skip
    assert code == 3, text
    assert (
        f"{len(rows) + len(more) + len(fine)} selected = {len(fine)} ok + {len(rows) + len(more)} failed + 0 left"
        in text
    )
    found = {row.sample_id: row for row in jobs.results(tmp_path / "out")}
    assert len(found) == len(rows) + len(more) + len(fine)
    for wanted, row in [*rows.items(), *more.items()]:
        result = found[row.sample_id]
        assert result.error_code == wanted, result.error_message
        assert result.stage == "encode"
        assert "\n" not in result.error_message
        assert "vmt-" not in result.error_message  # names the clip, not a temporary copy of it
    assert all(found[row.sample_id].status == "ok" for row in fine)
    page = (tmp_path / "out/run/report.html").read_text()
    assert all(code in page for code in rows)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda table: pa.concat_tables([table, table.slice(0, 1)]), "stands twice"),
        (lambda table: table.drop_columns(["prompt"]), "column 'prompt' (string) is missing"),
        (lambda table: table.append_column("colour", pa.array(["red"] * len(table))), "column 'colour' is not known"),
        (
            lambda table: with_column(table, "seed", pa.array(["0"] * len(table))),
            "column 'seed' is string, it must be int64",
        ),
        (lambda table: with_column(table, "sample_id", pa.array(["../../x"] * len(table))), "sample_id"),
        (
            lambda table: with_column(table, "prompt", pa.array(["another"] * len(table))),
            "is not the digest of the row",
        ),
        (lambda table: with_id(table, adapter_id="0" * 32), "but none needs none; plan again"),
        (lambda table: with_id(table, method="follow_your_motion"), "but follow_your_motion needs one; plan again"),
        (lambda table: table.slice(0, 0), "has no rows"),
    ],
)
def test_an_unfit_manifest_is_refused_before_the_run(model, tmp_path, spoil, message):
    source = jobs.write_manifest(tmp_path / "manifest", [jobs.row("a", model=model), jobs.row("b", model=model)])
    file = Path(source) / "part-00000.parquet"
    pq.write_table(spoil(pq.read_table(file)), file)
    refused(["--manifest", source, "--model", model, "--output", tmp_path / "out"], message)
    assert not (tmp_path / "out" / "results").exists()


def with_id(table, **changes):
    """The rows with other values and the ids that belong to them."""
    rows = [line | changes for line in table.to_pylist()]
    return pa.Table.from_pylist([line | {"sample_id": sample_id(line)} for line in rows], schema=table.schema)


def with_column(table, name, values):
    return table.set_column(table.column_names.index(name), name, values)


def refused(args, message):
    """Wrong usage is found before Ray starts."""
    code, text = jobs.here("transfer", *args)
    assert code == 2, text
    assert message in text
    assert "Traceback" not in text


def test_wrong_models_outputs_and_manifests_are_refused_before_the_run(model, tmp_path):
    source = jobs.write_manifest(tmp_path / "manifest", [jobs.row("a", model=model)])
    refused(["--manifest", source, "--output", tmp_path / "out"], f"give --model {model}, or plan again")
    refused(["--manifest", source, "--model", "/nowhere", "--output", tmp_path / "out"], "no such folder")
    refused(["--manifest", tmp_path / "none", "--model", model, "--output", tmp_path / "out"], "no Parquet file there")
    refused(
        ["--manifest", tmp_path / "none", "--model", model, "--output", tmp_path / "out"], "note: transfer.gpus=0: "
    )
    (tmp_path / "file").write_text("in the way")
    refused(["--manifest", source, "--model", model, "--output", tmp_path / "file"], "cannot be written")


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture
def cluster():
    """Environment of a client of a head node with one (logical) GPU, which ends with the test, and nothing else with it."""
    bin, port, dashboard, agent = Path(sys.executable).parent, free_port(), free_port(), free_port()
    env = os.environ | {"PATH": f"{bin}:{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled"}
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # Ray's sockets need a short path
    head = subprocess.Popen(
        [bin / "ray", "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=10", "--num-gpus=1",
         f"--dashboard-agent-listen-port={agent}", "--disable-usage-stats", f"--temp-dir={folder}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env, start_new_session=True,
    )  # fmt: skip
    yield env | {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    jobs.kill(head)
    shutil.rmtree(folder, ignore_errors=True)


def test_as_a_submitted_job_on_a_running_cluster_the_same_videos_come_out_of_other_batches_and_actors(
    made, model, tmp_path, cluster
):
    """`ray job submit --working-dir . -- python jobs/transfer.py …`, three stages on one GPU, three actors."""
    command = [
        "ray", "job", "submit", "--working-dir", ".", "--", "python", "jobs/transfer.py", "--manifest", made[0], "--model", model,
        "--output", tmp_path / "out", "--limit", "10", "--device", "cpu", "--transfer.batch-rows", "1", "--transfer.actors", "3",
        "--encode.gpus", "0.25", "--transfer.gpus", "0.2", "--finish.gpus", "0.15",
    ]  # fmt: skip
    command = [*map(str, command)]
    for _ in range(20):
        done = subprocess.run(command, cwd=jobs.ROOT, env=cluster, capture_output=True, text=True, timeout=600)
        if done.returncode == 0 or not re.search("No available agent|Failed to connect|refused", done.stderr):
            break
        time.sleep(2)  # the head node is starting
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 selected = 10 ok + 0 failed + 2 left" in done.stdout
    one, other = (
        {row.sample_id: row.video_sha256 for row in jobs.results(output)} for output in (made[1], tmp_path / "out")
    )
    assert len(other) == len(jobs.videos(tmp_path / "out")) == 10
    assert other.items() <= one.items()
