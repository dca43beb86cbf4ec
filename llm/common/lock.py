"""A lock file that one process holds at a time."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def locked(path: Path, timeout: float = 0.0) -> Iterator[int | None]:
    """Hold a lock file; yield None, or after `timeout` seconds the id of the process that still holds it.

    POSIX record locks end with their process, however it ends. Its child processes do not inherit them.
    """
    acquired = _acquire(path, timeout)
    if isinstance(acquired, int):
        yield acquired
    else:
        with acquired:
            yield None


def _acquire(path: Path, timeout: float) -> TextIO | int:
    deadline = time.monotonic() + timeout
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="ascii")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read()
            file.close()
            if time.monotonic() >= deadline and holder:
                return int(holder)
            time.sleep(0.1)
            continue
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            return file
        file.close()  # its folder was removed by the holder before the lock was free
