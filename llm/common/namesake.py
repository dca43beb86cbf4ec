"""Detection of the other package of the registry that is named `llm` too."""

from __future__ import annotations

import logging
from pathlib import Path

from llm.common.errors import InputError

PACKAGE = Path(__file__).resolve().parents[1]
NAME = PACKAGE.name
WAY_OUT = f"use an environment of its own, or `pip uninstall {NAME}` and install this project again"

logger = logging.getLogger("llm")


def check_namesake() -> None:
    """Warn of another installed package of this name; raise `InputError` where its files lie among ours."""
    import importlib.metadata

    try:
        other = importlib.metadata.distribution(NAME)
    except importlib.metadata.PackageNotFoundError:
        return
    subject = f"{NAME} {other.version}, another package of the same name,"
    if Path(str(other.locate_file(NAME))).resolve() == PACKAGE:
        raise InputError(f"{PACKAGE}: {subject} is installed over this project's files; {WAY_OUT}")
    logger.warning(f"{subject} is installed too, and Python may take it for this project's; {WAY_OUT}")
