"""Data-parallel training of a stage: LLM_NPROC or torchrun asks for several ranks."""

from __future__ import annotations

import logging
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llm.common import distributed
from llm.common.errors import InputError
from llm.common.lock import locked
from llm.config import parse_params
from stages.runtime.from_scratch import BASELINE, baseline_folder, is_baseline
from stages.runtime.inputs import read_yaml
from stages.runtime.run import Body, Run, main
from stages.tracking.journal import Journal

EXIT_TIMEOUT = 5.0  # seconds in which a process may end by itself, or report why another one has ended
PEER_LOST = re.compile(r"Connection (closed|reset) by peer|Broken pipe|recvVector|failed to connect", re.IGNORECASE)

logger = logging.getLogger("llm")


def main_training(stage: str, body: Body) -> None:
    """Run `main` for a stage that trains, on the ranks that the environment asks for.

    Rank 0 is the stage. The other ranks run the same body without a lock and with a temporary folder for state and
    journal; the body writes its outputs on rank 0 only. Rank 0 reports an error of all ranks and ends the others.
    """
    if is_baseline():
        main(stage, body, run_baseline)
    elif os.environ.get("RANK", "0") != "0":
        main(stage, distribute(body), run_rank)
    else:
        main(stage, distribute(body))


def distribute(body: Body) -> Body:
    """Return `body` with the process group around it."""

    def distributed_body(run: Run) -> None:
        if "RANK" in os.environ:
            with watched([]):
                distributed.init_distributed()
                body(run)
        elif (n := wanted_processes()) > 1:
            with started_ranks(n - 1) as ranks, watched(ranks):
                distributed.init_distributed()
                body(run)
        else:
            body(run)

    return distributed_body


def run_rank(stage: str, body: Body) -> None:
    """Run `body` on a rank other than 0."""
    with tempfile.TemporaryDirectory() as name:
        try:
            body(Run(stage, parse_params(read_yaml(Path("params.yaml"))), Path(name), Journal(Path(name))))
        except InputError:
            time.sleep(EXIT_TIMEOUT)  # rank 0 reports the same error first
            raise


def run_baseline(stage: str, body: Body) -> None:
    """Run `body` in the process of the from-scratch baseline."""
    params, state_dir = parse_params(read_yaml(Path("params.yaml"))), Path(os.environ[BASELINE])
    folder = baseline_folder(state_dir)
    with locked(folder / "lock", EXIT_TIMEOUT) as holder, watched([]):
        if holder is not None:  # one whose stage was killed ends sooner than that
            raise InputError(f"process {holder} still trains the from-scratch baseline; end it with: kill {holder}")
        body(Run(f"{stage} (from scratch)", params, state_dir, Journal(folder)))


def wanted_processes() -> int:
    text = os.environ.get("LLM_NPROC", "1")
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"LLM_NPROC in the environment: expected a whole number, at least 1, found {text!r}")
    return int(text)


@contextmanager
def started_ranks(n: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start this program `n` times more, as torchrun would; the processes end with this one, however it ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world |= {"WORLD_SIZE": str(n + 1), "LOCAL_WORLD_SIZE": str(n + 1), "LLM_PARENT": str(os.getpid())}
    world |= {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
    processes = []
    try:
        for rank in range(1, n + 1):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, *sys.orig_argv[1:]]
            processes.append(subprocess.Popen(command, env=os.environ | world | own, stdin=subprocess.DEVNULL))
        os.environ.update(world | {"RANK": "0", "LOCAL_RANK": "0"})
        yield processes
        deadline = time.monotonic() + EXIT_TIMEOUT
        for process in processes:  # the work is done: a slow exit is not waited for
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def watched(ranks: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """End this process when one of its `ranks`, or the process that started it, has died: collectives would hang."""
    over = threading.Event()
    parent = int(os.environ.get("LLM_PARENT", os.getpid())) if not ranks else os.getpid()

    def failure() -> str | None:
        for rank, process in enumerate(ranks, 1):
            if process.poll():
                return f"process {rank} of {len(ranks) + 1} ended with status {process.returncode}"
        return None

    def watch() -> None:
        while not over.wait(1.0):
            if parent not in (os.getpid(), os.getppid()):
                os._exit(1)
            if (problem := failure()) and not over.wait(EXIT_TIMEOUT):
                logger.error("%s; its message is above", problem)
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    except RuntimeError as error:
        if not PEER_LOST.search(str(error)):
            raise
        if not ranks:
            raise SystemExit(1) from None  # the lost process reports why
        deadline = time.monotonic() + EXIT_TIMEOUT
        while not (problem := failure()) and time.monotonic() < deadline:
            time.sleep(0.1)
        raise InputError(f"{problem or 'another process was lost'}; its message is above") from None
    finally:
        over.set()
