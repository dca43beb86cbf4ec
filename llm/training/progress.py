"""Progress and speed of a training: a bar in a terminal, else a line now and then."""

from __future__ import annotations

import logging
import os
import sys
import time
from types import TracebackType

from tqdm import tqdm

from llm.common import distributed

LINE_INTERVAL = 60.0  # seconds between two lines where there is no terminal

logger = logging.getLogger("llm")


class Progress:
    """The progress of a training, and its speed since the last log."""

    def __init__(self, title: str, step: int, max_steps: int) -> None:
        self.title, self.first, self.step, self.max_steps = title, step, step, max_steps
        self.lines = not sys.stderr.isatty()
        beside = "TQDM_DISABLE" in os.environ  # a baseline that trains beside another training: one bar is enough
        disable = self.lines or beside or distributed.rank() > 0
        self.bar = tqdm(total=max_steps, initial=step, desc=title, unit="step", mininterval=0.5, disable=disable)
        self.started = self.told = time.perf_counter()
        self.speed = ""
        if self.lines:
            logger.info("%s: begins at step %d of %d", title, step, max_steps)
        self.restart_clock()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        if self.lines and kind is None:
            seconds = time.perf_counter() - self.started
            logger.info("%s: ended at step %d of %d after %.0f s", self.title, self.step, self.max_steps, seconds)

    def restart_clock(self) -> None:
        self._since, self._tokens = time.perf_counter(), 0

    def advance(self, tokens: int, loss: float) -> None:
        """Count a step; tell of it where the last line is some time ago."""
        self.step += 1
        self._tokens += tokens
        self._loss = loss
        self.bar.update()
        now = time.perf_counter()
        if self.lines and now - self.told >= LINE_INTERVAL:
            self.told = now
            left = (now - self.started) / (self.step - self.first) * (self.max_steps - self.step)
            place = f"step {self.step} of {self.max_steps}, loss {loss:.4f}{self.speed}"
            logger.info("%s: %s, about %.0f s left", self.title, place, left)

    def tokens_per_s(self) -> float:
        """Return the speed since the last call, and show it beside the loss."""
        speed = self._tokens / (time.perf_counter() - self._since)
        self.restart_clock()
        self.speed = f", {speed:,.0f} tokens/s"
        self.bar.set_postfix_str(f"loss {self._loss:.4f}{self.speed}", refresh=False)
        return speed
