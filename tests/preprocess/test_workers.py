"""The pool of processes: order, bounded memory, errors and kills."""

from __future__ import annotations

import doctest
import os
import signal
from collections.abc import Iterator

import pytest

from llm.common.errors import InputError
from llm.preprocess import workers as module
from llm.preprocess.workers import Workers


def test_examples() -> None:
    assert doctest.testmod(module).failed == 0


def double(number: int, factor: int) -> int:
    if number < 0:
        raise InputError("negative")
    return factor * number


@pytest.mark.parametrize("count", [1, 2])
def test_few_jobs_are_under_way_at_a_time(count: int) -> None:
    taken = 0

    def jobs() -> Iterator[int]:
        nonlocal taken
        for number in range(100):
            taken += 1
            yield number

    with Workers(count) as workers:
        for done, result in enumerate(workers.in_order(double, jobs(), 2)):
            assert result == 2 * done
            assert taken - done <= 2 * count
        assert taken == 100


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_in_a_worker_is_the_same_error(count: int) -> None:
    with Workers(count) as workers:
        with pytest.raises(InputError, match="negative"):
            list(workers.in_order(double, [1, 2, -3, 4], 2))
        assert list(workers.in_order(double, [5], 3)) == [15]


def end_at(number: int, last: int) -> int:
    if number == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_worker_that_is_killed_is_one_line() -> None:
    with Workers(2) as workers, pytest.raises(InputError, match=r"^runtime.workers: one of the processes was killed"):
        list(workers.in_order(end_at, range(20), 5))
