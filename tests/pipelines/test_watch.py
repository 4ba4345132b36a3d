"""The driver's eyes on Ray Data, which is not there: the tracker is made up."""

import threading
import time
from unittest.mock import Mock

import pytest
from ray.exceptions import RaySystemError

from pipelines import watch
from pipelines.cluster import RunFailed
from schemas import StageSettings


class Tracker:
    """What `tracker.snapshot.remote()` gives, without Ray."""

    def __init__(self, stalled_s):
        self.snapshot, self.now = self, {"stalled_s": stalled_s}

    def remote(self):
        return self.now


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch):
    monkeypatch.setattr(watch.ray, "get", lambda value: value)
    monkeypatch.setattr(watch.ray, "cluster_resources", lambda: {"CPU": 100.0})


def watched(work, stalled_s=0.0):
    told = []
    watch.watched(work, Tracker(stalled_s), [StageSettings()], tell=told.append, progress_s=0.01, stall_s=5)
    return told


def test_work_that_ends_is_told_of_at_the_end():
    assert watched(lambda: time.sleep(0.1))[-1] == {"stalled_s": 0.0}


def test_a_failure_of_the_work_is_the_runs_with_its_reason():
    def work():
        raise OSError("the disk is full")

    with pytest.raises(RunFailed, match="OSError: the disk is full; the same command goes on from there"):
        watched(work)


@pytest.mark.timeout(60)
def test_work_that_no_longer_moves_is_given_up_with_what_is_lacking():
    for_ever = threading.Event()
    with pytest.raises(RunFailed, match="no row began or ended for 6 s: the actors did not start"):
        watched(for_ever.wait, stalled_s=6.0)
    for_ever.set()


@pytest.mark.timeout(60)
def test_a_ray_that_is_gone_ends_the_run(monkeypatch):
    for_ever = threading.Event()
    monkeypatch.setattr(watch.ray, "get", Mock(side_effect=RaySystemError("the head node died")))
    with pytest.raises(RunFailed, match=r"RaySystemError: .*the head node died; the same command goes on from there"):
        watched(for_ever.wait)
    for_ever.set()
