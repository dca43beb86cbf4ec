"""Messages of progress: one logger, on stderr, one line each. Library code does `logging.getLogger("llm")`."""

from __future__ import annotations

import logging
import os
import sys

from llm.common.errors import InputError
from llm.common.sanitize import one_line

LEVELS = ("debug", "info", "warning", "error")


def setup_logging(level: str | None = None) -> None:
    """Send the logger's messages to stderr, from `level` or else LLM_LOG_LEVEL (default: info) upwards.

    At level debug each message shows its time and level. A later call replaces the settings of an earlier one.
    """
    chosen = level or os.environ.get("LLM_LOG_LEVEL") or "info"
    if chosen.lower() not in LEVELS:
        raise InputError(f"LLM_LOG_LEVEL: no such level (expected {', '.join(LEVELS)}, got {chosen}); set one of them")
    logger = logging.getLogger("llm")
    logger.setLevel(chosen.upper())
    logger.propagate = False  # some libraries give the root logger a handler of its own
    handler = StderrHandler()
    if chosen.lower() == "debug":
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.handlers = [handler]


class StderrHandler(logging.Handler):
    """Writes above a progress bar, if there is one, and only on rank 0."""

    def emit(self, record: logging.LogRecord) -> None:
        distributed = sys.modules.get("llm.common.distributed")  # not imported here, as it loads torch
        if distributed is not None and distributed.rank() > 0:
            return
        from tqdm import tqdm  # late: few commands show a message

        tqdm.write(one_line(self.format(record)), file=sys.stderr)
