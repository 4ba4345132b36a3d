"""What training needs next, made by other processes while the device works."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from multiprocessing.pool import AsyncResult
from typing import Any, Generic, TypeVar

import torch
from torch import multiprocessing

Made = TypeVar("Made")


class Helpers:
    """Some processes that end with this one, or none.

    Tensors come back through shared memory (`/dev/shm`; containers may need more of it than they get by default).
    """

    def __init__(self, processes: int = 0) -> None:
        self.processes = processes
        self._pool: Any = None

    def submit(self, function: Callable[[int], Made], number: int) -> AsyncResult[Made]:
        if self._pool is None:
            self._pool = multiprocessing.get_context("spawn").Pool(self.processes, torch.set_num_threads, (1,))
        result: AsyncResult[Made] = self._pool.apply_async(function, (number,))
        return result


class Ahead(Generic[Made]):
    """A function of a number that is mostly asked for one number after the other: helpers make the next ones meanwhile.

    Args:
        function: can be pickled.
    """

    def __init__(self, function: Callable[[int], Made], helpers: Helpers) -> None:
        self.function, self.helpers = function, helpers
        self._waiting: deque[AsyncResult[Made]] = deque()
        self._next = 0  # the number of the first that waits

    def __call__(self, number: int) -> Made:
        if not self.helpers.processes:
            return self.function(number)
        if number != self._next:
            self._waiting.clear()
        while len(self._waiting) <= self.helpers.processes:
            self._waiting.append(self.helpers.submit(self.function, number + len(self._waiting)))
        self._next = number + 1
        return self._waiting.popleft().get()
