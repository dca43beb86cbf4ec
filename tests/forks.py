"""Child processes that have all that this one has imported: they start at once."""

from __future__ import annotations

import gc
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple, NoReturn, TextIO

import torch


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


class Fork:
    """A child process that runs a function, with the interface of `subprocess.Popen`."""

    def __init__(self, function: Callable[[], object], **variables: str) -> None:
        """Start it with these variables in its environment beside ours."""
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if not self.pid:
            _run(function, out_end, err_end, variables)
        os.close(out_end)
        os.close(err_end)
        self.stdout: TextIO = os.fdopen(out, encoding="utf-8")
        self.stderr: TextIO = os.fdopen(err, encoding="utf-8")
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the status if it has ended: 0, 1, or the negative number of a signal."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = 60) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        if self.returncode is None:
            self.kill()
            raise TimeoutError(f"process {self.pid} did not end in {timeout} s")
        return self.returncode

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        """Wait for the end; return all that was printed, on stdout and on stderr."""
        said = ["", ""]

        def read(index: int, file: TextIO) -> None:
            with file:
                said[index] = file.read()

        readers = [threading.Thread(target=read, args=given) for given in enumerate((self.stdout, self.stderr))]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join()
        return said[0], said[1]


def module(name: str, *arguments: str) -> Callable[[], object]:
    """Return what `python -m name arguments` runs, for a child process."""

    def run() -> None:
        sys.argv[1:] = arguments
        if not hasattr(sys.modules.get(name), "__path__"):
            sys.modules.pop(name, None)  # as if it were not imported yet
        runpy.run_module(name, run_name="__main__", alter_sys=True)

    return run


def run_forked(function: Callable[[], object], **variables: str) -> Ended:
    """Run the function in a child process to its end."""
    child = Fork(function, **variables)
    out, err = child.communicate()
    return Ended(child.wait(), out, err)


def _run(function: Callable[[], object], out: int, err: int, variables: dict[str, str]) -> NoReturn:
    """Run the function as a program of its own: standard files, environment, signals and exit status."""
    status = 1
    try:
        gc.freeze()  # objects of the parent are its own to finalize
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, file in enumerate((nothing, out, err)):
            os.dup2(file, number)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        sys.stdin, sys.stdout = os.fdopen(0, encoding="utf-8"), os.fdopen(1, "w", encoding="utf-8")
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", buffering=1)
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL if each == signal.SIGTERM else signal.default_int_handler)
        os.environ.update(variables)
        torch.set_num_threads(1)  # those of the parent are not here
        status = _status(function)
        sys.stdout.flush()
    finally:
        os._exit(status)


def _status(function: Callable[[], object]) -> int:
    try:
        function()
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
