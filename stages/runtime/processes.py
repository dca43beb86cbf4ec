"""Several processes in one stage.

Peers train one model together: LLM_NPROC asks for them on this machine, or torchrun has started them. And the control
of a finetuning, from random weights, trains beside it: two small trainings use two cores better than one after another.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from llm.common import distributed
from llm.common.errors import InputError
from llm.common.files import write_atomic
from llm.config import parse_params
from stages.runtime.run import Run, device_kind, locked, main, read_yaml
from stages.tracking.journal import Journal, read_events

CONTROL = "LLM_CONTROL"  # in the environment of a control: the folder of the stage's training state
CONTROL_FOLDER, RESULT = "control", "result.json"  # inside it, what the control logs and how it ended
PATIENCE = 5.0  # seconds in which a process may notice itself what has befallen its peer, or both of them
PEER_LOST = re.compile(r"Connection (closed|reset) by peer|Broken pipe|recvVector|failed to connect", re.IGNORECASE)


def main_training(stage: str, body: Callable[[Run], None]) -> None:
    """`main` for a stage that trains: it does so together with the processes that the environment asks for.

    Rank 0 is the stage. The others run the same body for the training in it: they hold no lock and keep no state, what
    they log goes into a folder that is thrown away, and the body leaves all else that it writes to rank 0. An error
    that all of them find is told by rank 0, which ends the others while they wait.
    """

    def together(run: Run) -> None:
        if "RANK" in os.environ:
            with _watched([]):
                distributed.init_distributed()
                body(run)
        elif (n := processes_wanted()) > 1:
            with _started(n - 1) as helpers, _watched(helpers):
                distributed.init_distributed()
                body(run)
        else:
            body(run)

    def help_out(stage: str, body: Callable[[Run], None]) -> None:
        with tempfile.TemporaryDirectory() as name:
            try:
                body(Run(stage, parse_params(read_yaml(Path("params.yaml"))), Path(name), Journal(Path(name))))
            except InputError:
                time.sleep(PATIENCE)
                raise

    def be_control(stage: str, body: Callable[[Run], None]) -> None:
        params, folder = parse_params(read_yaml(Path("params.yaml"))), Path(os.environ[CONTROL])
        with locked(folder / CONTROL_FOLDER / "lock", PATIENCE) as holder, _watched([]):
            if holder is not None:  # one whose stage was killed ends sooner than that
                raise InputError(f"process {holder} still trains the control; end it with: kill {holder}")
            body(Run(f"{stage} (control)", params, folder, Journal(folder / CONTROL_FOLDER)))

    if is_control():
        main(stage, body, be_control)
    elif os.environ.get("RANK", "0") != "0":
        main(stage, together, help_out)
    else:
        main(stage, together)


# ---- a control beside its finetuning ---------------------------------------------------------------------------------


def is_control() -> bool:
    return CONTROL in os.environ


def has_room_beside(device: str) -> bool:
    """Whether a second training would not wait for the first: on the cores of a CPU, and no peers have them."""
    return device_kind(device) == "cpu" and (os.cpu_count() or 1) > 1 and distributed.world_size() == 1


@contextmanager
def control_beside(run: Run) -> Iterator[Callable[[], dict[str, float]]]:
    """Trains the stage's control in a process of its own, each on half of the threads.

    Yields what waits for its end, takes over what it has logged and returns what it has left by `leave_result`. With
    this process it ends, and saves its state first if it is let.
    """
    threads = max(1, torch.get_num_threads() // 2)
    torch.set_num_threads(threads)
    own = {CONTROL: str(run.state_dir.absolute()), "LLM_PARENT": str(os.getpid()), "TQDM_DISABLE": "1"}
    control = subprocess.Popen(
        [sys.executable, "-m", f"stages.{run.stage.replace('-', '_')}"],
        env=os.environ | own | {"OMP_NUM_THREADS": str(threads)},
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the stage, which then tells it
    )

    def finish() -> dict[str, float]:
        with run.phase("control"):
            status = control.wait()
        if status:
            raise InputError(f"the training of the control ended with status {status}; what it said stands above")
        points: dict[int, dict[str, float]] = defaultdict(dict)
        for event in read_events(run.state_dir / CONTROL_FOLDER):
            if event["event"] == "metrics":
                points[event["step"]] |= event["values"]
        for step, values in sorted(points.items()):
            run.log(values, step)
        result: dict[str, float] = json.loads((run.state_dir / CONTROL_FOLDER / RESULT).read_text(encoding="utf-8"))
        return result

    try:
        yield finish
    finally:
        control.terminate()
        try:
            control.wait(2 * PATIENCE)
        except subprocess.TimeoutExpired:
            control.kill()
            control.wait()


def leave_result(run: Run, result: Mapping[str, float]) -> None:
    """Called by the control, for the stage that waits for it."""
    write_atomic(run.state_dir / CONTROL_FOLDER / RESULT, json.dumps(result))


# ---- peers -----------------------------------------------------------------------------------------------------------


def processes_wanted() -> int:
    text = os.environ.get("LLM_NPROC", "1")
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"LLM_NPROC in the environment: expected a whole number, at least 1, found {text!r}")
    return int(text)


@contextmanager
def _started(n: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Starts this program `n` times more, as torchrun would; they end with this process, however it ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world |= {"WORLD_SIZE": str(n + 1), "LOCAL_WORLD_SIZE": str(n + 1), "LLM_PARENT": str(os.getpid())}
    world |= {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
    helpers = []
    try:
        for number in range(1, n + 1):
            ranks = {"RANK": str(number), "LOCAL_RANK": str(number)}
            command = [sys.executable, *sys.orig_argv[1:]]
            helpers.append(subprocess.Popen(command, env=os.environ | world | ranks, stdin=subprocess.DEVNULL))
        os.environ.update(world | {"RANK": "0", "LOCAL_RANK": "0"})
        yield helpers
        deadline = time.monotonic() + PATIENCE
        for helper in helpers:  # the work is done: one that takes longer to leave is not waited for
            with suppress(subprocess.TimeoutExpired):
                helper.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for helper in helpers:
            helper.kill()
            helper.wait()


@contextmanager
def _watched(helpers: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Ends this process when a helper, or the one that it helps, has died: waiting for the dead would take for ever."""
    over = threading.Event()
    parent = int(os.environ.get("LLM_PARENT", os.getpid())) if not helpers else os.getpid()

    def failed() -> str | None:
        for number, helper in enumerate(helpers, 1):
            if helper.poll():
                return f"process {number} of {len(helpers) + 1} ended with status {helper.returncode}"
        return None

    def watch() -> None:
        while not over.wait(1.0):
            if parent not in (os.getpid(), os.getppid()):
                os._exit(1)
            if (problem := failed()) and not over.wait(PATIENCE):
                print(f"{problem}; what it said stands above", file=sys.stderr, flush=True)
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    except RuntimeError as error:
        if not PEER_LOST.search(str(error)):
            raise
        if not helpers:
            raise SystemExit(1) from None  # who was lost says why
        deadline = time.monotonic() + PATIENCE
        while not (problem := failed()) and time.monotonic() < deadline:
            time.sleep(0.1)
        raise InputError(f"{problem or 'another process was lost'}; what it said stands above") from None
    finally:
        over.set()
