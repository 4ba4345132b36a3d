"""A few processes with a gloo group, for what only several workers can show."""

import os
import socket
import traceback

import torch
from torch import distributed, multiprocessing


def run(function, workers, *arguments):
    """`function(rank, workers, *arguments)` in each worker; what they return, in the order of their ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [
        context.Process(target=_one, args=(function, rank, workers, port, queue, arguments)) for rank in range(workers)
    ]
    for process in processes:
        process.start()
    results = dict(queue.get() for _ in processes)
    for process in processes:
        process.join()
    for rank, (fault, _) in results.items():
        assert fault is None, f"worker {rank}: {fault}"
    return [results[rank][1] for rank in range(workers)]


def _one(function, rank, workers, port, queue, arguments):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    torch.set_num_threads(1)
    try:
        distributed.init_process_group("gloo")
        queue.put((rank, (None, function(rank, workers, *arguments))))
    except Exception:
        queue.put((rank, (traceback.format_exc(), None)))
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
