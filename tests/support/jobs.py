"""Runs the jobs as users do, and reads what they leave."""

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines import manifest, models
from pipelines.storage import Storage
from schemas import ManifestRow, ResultRow
from vmt_core.methods import VIDEO_VERSION

ROOT = Path(__file__).parents[2]


def start(job, *args, env=None):
    """Starts `python jobs/<job>.py …` in a process group of its own; its output is one pipe."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | (env or {}),
        start_new_session=True,
    )


def run(job, *args, env=None, timeout=600):
    """Runs a job to its end; returns (exit code, what it printed)."""
    process = start(job, *args, env=env)
    try:
        text, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        raise AssertionError(f"{job} did not end in {timeout} s:\n{process.communicate()[0]}") from None
    return process.returncode, text


def here(job, *args):
    """Runs a job that starts no Ray in this process, which spares the imports; returns (exit code, what it printed)."""
    printed, on_sigterm = io.StringIO(), signal.getsignal(signal.SIGTERM)
    script = ROOT / "jobs" / f"{job}.py"
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(SystemExit) as ended,
    ):
        patch.setattr(sys, "argv", [str(script), *map(str, args)])
        runpy.run_path(str(script), run_name="__main__")
    signal.signal(signal.SIGTERM, on_sigterm)
    return ended.value.code, printed.getvalue()


def kill(process):
    """SIGKILL of the driver and of every process it started, as when a machine goes away."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def row(prompt, *, seed=0, model="wan-nano", **values):
    """A manifest row for the fake stages, which never look at the clip."""
    defaults = {
        "reference_uri": "/nowhere.mp4",
        "reference_digest": "0" * 64,
        "start_frame": 0,
        "fps": 12.0,
        "height": 64,
        "width": 64,
        "frames": 5,
        "prompt": prompt,
        "method": "none",
        "seed": seed,
        "steps": 2,
        "shift": 3.0,
        "guidance_scale": 1.0,
        "model": model,
        "model_revision": models.revision(model, Storage()),
        "video_version": VIDEO_VERSION,
    }
    return ManifestRow.planned(**(defaults | values))


def write_manifest(folder, rows):
    """Writes rows as a manifest and returns its place."""
    manifest.write(Storage(), str(folder), rows)
    return str(folder)


def results(output):
    """Every result row, from local disk or S3, in no order; a row that stands twice stands twice here."""
    storage = Storage()
    found = []
    for uri in storage.find(f"{output}/results"):
        filesystem, path = storage.arrow(uri)
        partitions = dict(part.split("=", 1) for part in uri.split("/") if "=" in part)
        found += [values | partitions for values in pq.ParquetFile(path, filesystem=filesystem).read().to_pylist()]
    return [ResultRow.model_validate(values) for values in found]


def videos(output):
    """Names of the objects below OUT/videos, without `.mp4`."""
    return sorted(uri.rsplit("/", 1)[1].removesuffix(".mp4") for uri in Storage().find(f"{output}/videos"))
