"""Identity of a run: its repository, its process, and the pipeline invocation that it belongs to."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from pathlib import Path
from typing import NamedTuple

import psutil  # type: ignore[import-untyped]


def repository() -> Path:
    """Return the user's repository: DVC names it in DVC_ROOT, also to stages of a temporary experiment copy."""
    return Path(os.environ.get("DVC_ROOT") or Path.cwd())


def runs_folder() -> Path:
    return repository() / ".work" / "runs"


class Process(NamedTuple):
    """Identity of a process that outlives it: ids are used again, so the start counts too."""

    pid: int
    started: int  # seconds
    host: str

    @classmethod
    def from_psutil(cls, process: psutil.Process) -> Process:
        return cls(process.pid, int(process.create_time()), socket.gethostname())

    def is_gone(self) -> bool:
        """Return True if the process has ended; False also for one of another machine."""
        if self.host != socket.gethostname():
            return False
        try:
            process = psutil.Process(self.pid)
            return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - self.started) > 2
        except psutil.NoSuchProcess:
            return True


def process_age(process: psutil.Process) -> float:
    """Return the seconds since the process was started."""
    created: float = process.create_time()
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return time.time() - created
    return time.clock_gettime(time.CLOCK_BOOTTIME) - (created - psutil.boot_time())  # which is rounded in both


def invocation() -> Process:
    """Return the `dvc` process that started this stage, else this process."""
    own = psutil.Process()
    for ancestor in own.parents():
        try:
            words = ancestor.cmdline()[:3]  # dvc repro; python .venv/bin/dvc repro; python -m dvc repro
        except psutil.Error:
            continue
        if any(Path(word).name == "dvc" for word in words):
            return Process.from_psutil(ancestor)
    return Process.from_psutil(own)


def pipeline_name(process: Process) -> str:
    """Return the folder name of an invocation: sorted by time, unique on a server that machines share."""
    place = hashlib.md5(f"{process} {repository().resolve()}".encode()).hexdigest()[:8]
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(process.started))}-{place}"
