"""Run jobs on a pool of processes, in order and with bounded memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from tqdm import tqdm

from llm.common.errors import InputError

T = TypeVar("T")


class Workers:
    """A pool of processes that start without torch; a single worker is this process itself.

    >>> with Workers(1) as workers:
    ...     list(workers.in_order(pow, [2, 3], 2))
    [4, 9]
    """

    def __init__(self, count: int) -> None:
        self._count = count
        # Not by fork: a fork of a process with threads may hang.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(count, context, _start_worker) if count > 1 else None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def in_order(self, function: Callable[..., T], jobs: Iterable[Any], *shared: Any) -> Iterator[T]:
        """Yield `function(job, *shared)` for each job, in the order of the jobs.

        Two jobs for each process are under way at a time, so memory does not grow with their number. `shared` is sent
        with every job; a worker reads large data from a file.
        """
        if self._pool is None:
            yield from (function(job, *shared) for job in jobs)
            return
        pending: deque[Future[T]] = deque()
        try:
            for job in jobs:
                pending.append(self._pool.submit(function, job, *shared))
                if len(pending) >= 2 * self._count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise InputError(
                "runtime.workers: one of the processes was killed, for want of memory perhaps; try a smaller number"
            ) from None


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers

    def end_with_parent() -> None:  # a parent that was killed cannot say so
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def show_progress(results: Iterator[T], sizes: Sequence[int], title: str) -> Iterator[T]:
    """Yield the results below a progress bar over the bytes of their jobs."""
    with tqdm(total=sum(sizes), desc=title, unit="B", unit_scale=True, disable=None) as bar:
        for size, result in zip(sizes, results, strict=True):
            yield result
            bar.update(size)
