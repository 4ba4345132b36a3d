"""Whatever dies, every row ends exactly once, and the run says how."""

import os
import signal
import time
from collections import Counter

import pytest

from support import jobs
from support.fault_proxy import FaultProxy, Rule

FAKE = ["--stages", "support.fake_stages", "--progress-s", 1]


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "denoised.log"
    path.touch()
    return path


@pytest.fixture
def env(log):
    return {"VMT_TEST_LOG": str(log)}


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    """A folder for manifest and output, on disk or on S3."""
    return str(tmp_path) if request.param == "local" else f"s3://{request.getfixturevalue('bucket')}/team"


def wait_until(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.1)


def denoised(log):
    """(sample_id, process, rows of its batch) of every row that a denoiser saw."""
    return [line.split() for line in log.read_text().splitlines()]


def endings(output):
    return {row.prompt: row.error_code and row.error_code.value for row in jobs.results(output)}


def test_after_kill_9_of_the_driver_only_the_missing_rows_are_made(place, log, env):
    rows = [jobs.row(f"ok {i}", seed=i) for i in range(16)]
    source = jobs.write_manifest(f"{place}/manifest", rows)
    args = ["--manifest", source, "--output", f"{place}/out", "--transfer.batch-rows", 2, *FAKE]
    kills = (4, 14) if place.startswith("s3") else (8,)  # rows denoised: 25, 90 and 50 %
    for seen in kills:
        process = jobs.start("transfer", *args, env=env | {"VMT_TEST_SECONDS": "1"})
        wait_until(lambda seen=seen: len(denoised(log)) >= seen)
        jobs.kill(process)
    code, text = jobs.run("transfer", *args, env=env)
    assert code == 0, text
    assert "16 selected = 16 ok + 0 failed + 0 left" in text
    ids = sorted(row.sample_id for row in rows)
    assert sorted(row.sample_id for row in jobs.results(f"{place}/out")) == ids  # each once
    assert jobs.videos(f"{place}/out") == ids  # and no orphan
    again = len(denoised(log)) - len(rows)
    assert again <= len(kills) * 2, f"{again} rows were denoised again, over one batch of one actor for each kill"


def test_rows_that_crash_their_worker_hang_or_run_out_of_memory_do_not_harm_their_neighbours(tmp_path, log, env):
    prompts = ["ok 1", "crash 1", "ok 2", "flaky 1", "oom 1", "always oom 1", "raise 1", "nan 1", "hang 1", "ok 3"]
    source = jobs.write_manifest(tmp_path / "manifest", [jobs.row(prompt) for prompt in prompts])
    args = ["--manifest", source, "--output", tmp_path / "out", *FAKE, "--limits.row-seconds", 6]
    code, text = jobs.run("transfer", *args, env=env)
    assert code == 3, text
    assert "10 selected = 5 ok + 5 failed + 0 left" in text
    assert endings(tmp_path / "out") == dict.fromkeys(("ok 1", "ok 2", "ok 3", "flaky 1", "oom 1")) | {
        "crash 1": "crashed",
        "always oom 1": "out_of_memory",
        "raise 1": "internal",
        "nan 1": "non_finite",
        "hang 1": "timed_out",
    }
    found = {row.prompt: row for row in jobs.results(tmp_path / "out")}
    assert found["crash 1"].attempts == 3  # in a batch, alone, and the one that was refused
    assert Counter(row for row, _, _ in denoised(log))[found["crash 1"].sample_id] == 2
    assert "with less memory" in found["oom 1"].notes
    assert "ZeroDivisionError" in found["raise 1"].error_message
    assert "limits.row_seconds=6" in found["hang 1"].error_message
    assert all(row.stage == "transfer" for row in found.values() if row.status == "failed")

    code, text = jobs.here("transfer", *args)
    assert code == 3  # failed is done: nothing is made again …
    assert "10 done before, 0 to make now" in text
    before = len(denoised(log))
    code, text = jobs.run("transfer", *args, "--retry-failed", "--limit", 2, env=env)
    assert "forgetting 5 failed rows" in text  # … unless that is asked for
    assert "10 selected = 5 ok + 2 failed + 3 left" in text
    assert {row for row, _, _ in denoised(log)[before:]} <= {found[p].sample_id for p in ("crash 1", "always oom 1")}


def test_a_killed_actor_is_replaced_a_second_run_is_refused_and_a_stopped_one_says_how_to_go_on(tmp_path, log, env):
    rows = [jobs.row(f"ok {i}") for i in range(8)]
    source = jobs.write_manifest(tmp_path / "manifest", rows)
    args = ["--manifest", source, "--output", tmp_path / "out", *FAKE]
    first = jobs.start("transfer", *args, "--transfer.batch-rows", 1, env=env | {"VMT_TEST_SECONDS": "1"})
    wait_until(lambda: denoised(log))
    os.kill(int(denoised(log)[0][1]), signal.SIGKILL)
    code, text = jobs.here("transfer", *args)
    assert code == 2, text
    assert "is writing here; wait for it, stop it, or use another output" in text
    wait_until(lambda: len({process for _, process, _ in denoised(log)}) == 2)
    first.send_signal(signal.SIGTERM)
    text, _ = first.communicate(timeout=60)
    assert first.returncode == 1, text
    assert "stopped; the same command goes on from here" in text
    assert not (tmp_path / "out" / "run" / "lock.json").exists()
    code, text = jobs.run("transfer", *args, env=env)
    assert code == 0, text
    assert sorted(row.sample_id for row in jobs.results(tmp_path / "out")) == sorted(row.sample_id for row in rows)


def test_a_storage_that_stumbles_costs_time_and_no_row(bucket, s3_server, tmp_path, env):
    """503 bursts, resets and a stalled read, on every kind of object of a run."""
    rows = [jobs.row(f"ok {i}") for i in range(8)]
    source = jobs.write_manifest(f"s3://{bucket}/manifest", rows)
    faults = [
        Rule(method="GET", key=f"/{bucket}/manifest", count=2),
        Rule(method="PUT", key=f"/{bucket}/out/videos", count=4),
        Rule(method="PUT", key=f"/{bucket}/out/videos", fault="reset", nth=(7,)),
        Rule(method="PUT", key=f"/{bucket}/out/results", count=3),
        Rule(method="PUT", key=f"/{bucket}/out/run/checkpoint", count=3),
        Rule(method="GET", key=f"/{bucket}/out/results", fault="stall", count=1),
    ]
    with FaultProxy(s3_server, faults) as proxy:
        code, text = jobs.run(
            "transfer", "--manifest", source, "--output", f"s3://{bucket}/out", *FAKE,
            "--storage.endpoint-url", proxy.url, "--storage.timeout-s", 3, "--transfer.max-actors", 2, env=env,
        )  # fmt: skip
        hit = Counter(fault for _, _, fault in proxy.hits)
    assert code == 0, text
    assert hit["status"] >= 10
    assert hit["reset"] == hit["stall"] == 1
    ids = sorted(row.sample_id for row in rows)
    assert sorted(row.sample_id for row in jobs.results(f"s3://{bucket}/out")) == ids
    assert jobs.videos(f"s3://{bucket}/out") == ids


def test_a_machine_too_small_for_the_pools_says_what_is_missing_and_stops(tmp_path, env):
    source = jobs.write_manifest(tmp_path / "manifest", [jobs.row("ok 1")])
    code, text = jobs.run(
        "transfer", "--manifest", source, "--output", tmp_path / "out", *FAKE, "--ray.num-cpus", 2, env=env
    )
    assert code == 1
    assert "the cluster lacks 5 CPUs (needs 7, has 2)" in text


def test_actors_that_cannot_start_end_the_run_with_the_reason(tmp_path, env):
    source = jobs.write_manifest(tmp_path / "manifest", [jobs.row("ok 1")])
    args = ["--manifest", source, "--output", tmp_path / "out", *FAKE]
    code, text = jobs.run("transfer", *args, env=env | {"VMT_TEST_BROKEN_START": "1"})
    assert code == 1
    assert "weights are gone" in text
