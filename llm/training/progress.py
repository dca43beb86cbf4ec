"""Progress bar and speed of a training."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from llm.common import distributed


class Progress:
    """The progress bar of a training, and its speed since the last log."""

    def __init__(self, title: str, step: int, max_steps: int) -> None:
        interval = 0.5 if sys.stderr.isatty() else 20.0  # seconds between two updates of the bar
        disable = distributed.rank() > 0
        self.bar = tqdm(total=max_steps, initial=step, desc=title, unit="step", mininterval=interval, disable=disable)
        self.restart_clock()

    def restart_clock(self) -> None:
        self._since, self._tokens = time.perf_counter(), 0

    def advance(self, tokens: int) -> None:
        self._tokens += tokens
        self.bar.update()

    def tokens_per_s(self, loss: float) -> float:
        """Return the speed since the last call, and show it beside the loss."""
        speed = self._tokens / (time.perf_counter() - self._since)
        self.restart_clock()
        self.bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s", refresh=False)
        return speed
