"""Work of Ray Data under the eyes of its driver: it runs in a thread, lines are told, and what no longer moves is stopped."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from pipelines import cluster, progress
from pipelines.cluster import RunFailed
from schemas import StageSettings


def watched(
    work: Callable[[], None],
    tracker: Any,
    pools: Sequence[StageSettings],
    *,
    tell: Callable[[Mapping[str, Any]], None],
    progress_s: float,
    stall_s: float,
) -> None:
    """Returns when the work is done.

    Args:
        work: ends by itself, or with Ray.
        tracker: of the run; the actors of the work report to it.
        pools: what the work's actors take, to say what is lacking.
        tell: is given the tracker's snapshot every `progress_s` seconds, and at the end.

    Raises:
        RunFailed: the engine gave up, or no row began or ended for `stall_s` seconds, beyond the budget of those that run.
    """
    failure: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=guarded, daemon=True, name="ray-data")
    thread.start()
    while thread.is_alive():
        thread.join(progress_s)
        try:
            now = ray.get(tracker.snapshot.remote())
        except RayError as error:  # Ray itself is gone, or the tracker's process
            raise RunFailed(f"{cluster.reason(error)[:500]}; the same command goes on from there") from error
        tell(now)
        if thread.is_alive() and now["stalled_s"] > stall_s:
            raise RunFailed(_stall(now["stalled_s"], pools))
    if failure:
        raise RunFailed(f"{cluster.reason(failure[0])[:500]}; the same command goes on from there") from failure[0]


def _stall(seconds: float, pools: Sequence[StageSettings]) -> str:
    """Why nothing moves, as far as can be told."""
    lacking = cluster.missing(cluster.needs(pools), ray.cluster_resources())
    why = (
        f"the cluster lacks {'; '.join(lacking)}"
        if lacking
        else "the actors did not start or the storage does not answer"
    )
    return f"no row began or ended for {progress.duration(seconds)}: {why}. The same command goes on from here"
