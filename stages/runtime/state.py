"""Folder of a stage's checkpoints, which only the same inputs find again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from llm.common.lock import locked
from stages.tracking.process import repository


@contextmanager
def state_folder(stage: str, fingerprint: str, keep: bool = False) -> Iterator[Path]:
    """Hold the folder of a fingerprint, in the repository even for DVC's temporary experiment copies.

    Experiments of a queue may have the same inputs at the same time: each takes the first folder that is free. A
    failure leaves what the stage saved there. Success removes the folder, unless it is to `keep`.
    """
    name = fingerprint[:16]
    for number in count():
        folder = repository() / ".work" / stage / (name if number == 0 else f"{name}-{number}")
        with locked(folder / "lock") as holder:
            if holder is not None:
                continue
            try:
                yield folder
                if not keep:
                    shutil.rmtree(folder)
            finally:
                if folder.exists() and {path.name for path in folder.iterdir()} <= {"lock", "journals"}:
                    shutil.rmtree(folder)  # nothing was saved
            return
