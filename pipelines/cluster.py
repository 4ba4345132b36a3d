"""A Ray to run on: a local one of the right size, or a running cluster that is checked for what the pools need."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group

from schemas import RaySettings, StageSettings, UsageError

#: Logical CPUs that Ray Data itself wants at once beside the pools: read, repartition, write, and the filter of what is done.
ENGINE_CPUS = 4
#: Ray of one machine: no warnings about things that are as they should be, no worker before there is work (one for each logical CPU, of
#: which there are more than real ones), and one process, not 32, that reads the footers of a table's files.
_LOCAL = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_worker_maximum_startup_concurrency": "16",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
}
_LABELS = {"CPU": "CPUs", "GPU": "GPUs", "memory": "GiB of memory"}


class RunFailed(Exception):
    """The run cannot go on; what is committed stays, and the same command goes on from there."""


def needs(pools: Sequence[StageSettings]) -> dict[str, float]:
    """Logical resources (CPU, GPU, bytes of memory) that the pools at their least and the engine take at once."""
    total = {"CPU": float(ENGINE_CPUS), "GPU": 0.0, "memory": 0.0}
    for pool in pools:
        total["CPU"] += pool.actors * pool.cpus
        total["GPU"] += pool.actors * pool.gpus
        total["memory"] += pool.actors * (pool.memory_gib or 0) * 2**30
    return total


def pool(stage: StageSettings, most: int | None = None) -> dict[str, Any]:
    """What `map_batches` is told of a stage's actors; no more of them than `most`."""
    least, largest = (min(number, most or number) for number in (stage.actors, stage.max_actors or stage.actors))
    size = {"size": least} if least == largest else {"min_size": least, "max_size": largest}
    return {
        "compute": ActorPoolStrategy(**size, max_tasks_in_flight_per_actor=2),
        "num_cpus": stage.cpus,
        "num_gpus": stage.gpus,
        "memory": stage.memory_gib * 2**30 if stage.memory_gib else None,
    }


def reason(error: BaseException) -> str:
    """The line of an engine's error that says what happened: the first cause, not how the engine met it."""
    first = str(error).split("The above exception was the direct cause", 1)[0]
    lines = [text.strip() for text in first.splitlines() if text.strip()]
    line = lines[-1] if lines else ""
    if isinstance(error, RayTaskError):  # its last line names the type of the cause
        return line
    return f"{type(error).__name__}: {line}"


def address_of(settings: RaySettings) -> str | None:
    """Of the cluster to use; None: one of this machine, of its own."""
    return settings.address or os.environ.get("RAY_ADDRESS")


def unreserved(settings: RaySettings, device: str, pools: Mapping[str, StageSettings]) -> str | None:
    """What is to be said where actors are to compute on GPUs that Ray does not reserve for them; None where it does.

    Ray hides no GPU from actors without one: on every node they all would take the first.

    Raises:
        UsageError: so on a cluster, whose nodes may have several GPUs, others' work on them, or none.
    """
    bare = [name for name, pool in pools.items() if not pool.gpus]
    if device != "cuda" or not bare:
        return None
    text = (
        f"--device cuda, but {' and '.join(f'{name}.gpus=0' for name in bare)}: Ray reserves no GPU for these actors, so they all "
        f"take the first one of their node; --{bare[0]}.gpus 0.25 gives each a quarter, and cuda without --device"
    )
    if address_of(settings):
        raise UsageError(text)
    return f"note: {text}"


def cpus(settings: RaySettings) -> float:
    """CPUs that are really there. A Ray of this machine's own is told of more, because the engine wants its share."""
    offered = float(ray.cluster_resources().get("CPU", 1))
    return offered if address_of(settings) else min(offered, os.cpu_count() or 1)


@contextlib.contextmanager
def connected(settings: RaySettings, *turns: Sequence[StageSettings]) -> Iterator[None]:
    """Ray while the block runs: the cluster at `address` or RAY_ADDRESS, else a local one with enough logical CPUs.

    Args:
        turns: pools that run at the same time; where there are several turns, one after the other.

    Raises:
        RunFailed: the cluster does not offer what the pools need.
    """
    address = address_of(settings)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    if address:
        ray.init(address=address, **quiet)
    else:
        local = settings.num_cpus or max(os.cpu_count() or 1, *(math.ceil(needs(pools)["CPU"]) for pools in turns))
        for name, value in _LOCAL.items():
            os.environ.setdefault(name, value)
        with _native_stderr_closed():  # Ray's C++ prints there that it will now print less
            ray.init(address="local", num_cpus=local, include_dashboard=False, **quiet)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray put its own in the place
    try:
        for pools in turns:
            with _demanded(pools) if address else contextlib.nullcontext():
                wait_for(pools, settings.wait_s if address else 0)
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _demanded(pools: Sequence[StageSettings]) -> Iterator[None]:
    """A demand for what the pools take at least, while the block runs: an autoscaler adds nodes for demands alone.

    A placement group, because it goes with this driver, however that ends; a request to the autoscaler would stay.
    """
    bundles = [_taken(pool) for pool in pools for _ in range(pool.actors)]
    group = placement_group([*filter(None, bundles), *[{"CPU": 1.0}] * ENGINE_CPUS])
    try:
        yield
    finally:
        remove_placement_group(group)


@contextlib.contextmanager
def _native_stderr_closed() -> Iterator[None]:
    """Drops what native code writes to file descriptor 2; Python's exceptions are not touched."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def quiet_data() -> DataContext:
    """This driver's Ray Data settings, with its bars and its story (which stays in Ray's log files) off the terminal.

    Without the checkpoint of another step of the same driver.
    """
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.checkpoint_config = None
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.ERROR)
    return context


def wait_for(pools: Sequence[StageSettings], seconds: float) -> None:
    """Waits until the cluster has what the pools need, in all and for each actor on one node (an autoscaler may still be adding some).

    Raises:
        RunFailed: what is missing.
    """
    deadline = time.monotonic() + seconds
    while lacking := missing(needs(pools), ray.cluster_resources()) or too_large(pools, ray.nodes()):
        if time.monotonic() >= deadline:
            raise RunFailed(
                f"the cluster lacks {'; '.join(lacking)}. Make the pools of actors smaller (their actors, cpus, gpus, memory_gib; "
                "--help names them), or the cluster larger (ray.num_cpus for a local one)"
            )
        time.sleep(min(2.0, max(0.1, deadline - time.monotonic())))


def too_large(pools: Sequence[StageSettings], nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """What no node has: `a node with 32 CPUs, 1 GPUs for an actor`."""
    there = [node["Resources"] for node in nodes if node["Alive"]]
    lacking = []
    for pool in pools:
        actor = _taken(pool)
        if not any(all(node.get(name, 0) >= amount - 1e-6 for name, amount in actor.items()) for node in there):
            amounts = [f"{amount / _unit(name):g} {_LABELS[name]}" for name, amount in actor.items()]
            lacking.append(f"a node with {', '.join(amounts)} for an actor")
    return list(dict.fromkeys(lacking))


def _taken(pool: StageSettings) -> dict[str, float]:
    """Of one actor."""
    amounts = {"CPU": pool.cpus, "GPU": pool.gpus, "memory": (pool.memory_gib or 0) * 2**30}
    return {name: amount for name, amount in amounts.items() if amount}


def _unit(resource: str) -> int:
    return 2**30 if resource == "memory" else 1


def missing(needed: Mapping[str, float], offered: Mapping[str, float]) -> list[str]:
    """What a cluster lacks: `3 CPUs (needs 6, has 3)`."""
    lacking = []
    for name, label in _LABELS.items():
        want, have = (amounts.get(name, 0) / _unit(name) for amounts in (needed, offered))
        if have < want - 1e-6:
            lacking.append(f"{want - have:g} {label} (needs {want:g}, has {have:.4g})")
    return lacking
