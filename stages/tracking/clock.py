"""Wall time of a process by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil  # type: ignore[import-untyped]

from stages.tracking.process import process_age


class Clock:
    """Timer from the start of the process on, always in one phase, which an inner phase interrupts.

        with clock("saving"):
            ...

    Cheap enough for every step of a training.
    """

    def __init__(self) -> None:
        began = time.perf_counter() - process_age(psutil.Process())
        self._state: tuple[dict[str, float], str, float] = {}, "start-up", began  # replaced as one: threads read it

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        outer = self._state[1]
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(outer)

    def enter(self, phase: str) -> None:
        """Start a phase, which ends the present one."""
        now = time.perf_counter()
        self._state = self._sums(now), phase, now

    def seconds(self) -> dict[str, float]:
        return self._sums(time.perf_counter())

    def _sums(self, now: float) -> dict[str, float]:
        sums, phase, since = self._state
        return sums | {phase: sums.get(phase, 0.0) + now - since}
