"""Connection of a training to its surroundings: logging, timing, stopping and saving."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeVar

from llm.common import distributed

T = TypeVar("T")


class Hooks(Protocol):
    """The calls of `fit` to whoever runs it. `state_dir` None: nothing is saved."""

    @property
    def state_dir(self) -> Path | None: ...  # training states, to resume from
    @property
    def stable_dir(self) -> Path | None: ...  # with schedule wsd, states from before the decay
    def log(self, metrics: Mapping[str, float], step: int, /) -> None: ...
    def phase(self, name: str, /) -> contextlib.AbstractContextManager[object]: ...  # timed parts of the work
    def should_stop(self) -> bool: ...


class NoHooks:
    """Hooks that do nothing."""

    state_dir: Path | None = None
    stable_dir: Path | None = None

    def log(self, metrics: Mapping[str, float], step: int, /) -> None:
        pass

    def phase(self, name: str, /) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def should_stop(self) -> bool:
        return False


NO_HOOKS = NoHooks()


class StoppedError(Exception):
    """A stop in the middle of an evaluation, which has changed nothing."""


def stoppable(items: Iterable[T], should_stop: Callable[[], bool]) -> Iterator[T]:
    """Yield the items, and raise `StoppedError` once `should_stop()` is true on any rank.

    The ranks ask before each round of one item per rank, so they stop at the same item.
    """
    rounds = iter(items)
    while items_of_round := list(islice(rounds, distributed.world_size())):
        if distributed.any_rank(should_stop()):
            raise StoppedError
        yield from items_of_round
