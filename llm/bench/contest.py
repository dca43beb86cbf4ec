"""A contest: this project and its peers do the same in turns.

Each contestant is a process of its own, and they take turns, so that whatever else the machine does meets them all; the
machine's own limits are measured in the same turns. A contestant whose package is not installed, or that cannot take
part as it is, is left out by name. PyTorch is imported where it is used: its memory is no part of what others hold.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import psutil  # type: ignore[import-untyped]

from llm.common.errors import InputError
from llm.common.sanitize import table

OURS = "this project"  # what the names of our own contestants begin with
PATIENCE = 5  # seconds that a contestant has to end
S = TypeVar("S")  # the sizes of a contest, a NamedTuple

Turn = Callable[[], float]  # one turn's work; returns how much it was, in the contest's unit


class LeftOut(Exception):  # noqa: N818 (no error: the others go on)
    """Raised by a contestant that cannot take part; says why."""


class Cost(NamedTuple):
    """What one unit of work cannot do without."""

    flop: float = 0.0  # operations of matrix products
    n_bytes: float = 0.0  # read from memory


class Contest(NamedTuple, Generic[S]):
    kind: str
    unit: str  # of the amounts that turns return, a second
    sizes: S  # unless somebody says otherwise
    contestants: dict[str, Callable[[S], Turn]]  # each makes what it needs, then returns its turn
    check: Callable[[S], None] = lambda sizes: None  # raises `InputError` for sizes that nobody can have
    cost: Callable[[S, str], Cost | None] | None = None  # of a contestant; None where the limits are no measure
    forms: Mapping[str, S] = {}  # other sizes by name


# ---- the machine's limits --------------------------------------------------------------------------------------------


KEPT_UP = 0.25  # seconds of products of one size


def matrix_limit() -> float:
    """The rate that matrix products keep up, at the best of some sizes, in FLOP/s: in fp32, on a GPU in bf16."""
    import torch

    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    sizes = ((2048, 384, 1536), (2048, 1536, 384), (1024, 1024, 1024), (2048, 2048, 2048))
    rates = []
    for rows, inner, columns in ((16384, 768, 3072), (8192, 8192, 8192)) if on_gpu else sizes:
        a, b = (torch.randn(size, device=device, dtype=dtype) for size in ((rows, inner), (inner, columns)))
        products, start = 0, time.perf_counter()
        while (took := time.perf_counter() - start) < KEPT_UP:
            torch.mm(a, b)
            if on_gpu:
                torch.cuda.synchronize()
            products += 1
        rates.append(2 * rows * inner * columns * products / took)
    return max(rates)


def memory_limit() -> float:
    """The rate at which all threads together read memory that no cache holds, in bytes/s."""
    import torch

    numbers = torch.ones(2**27)  # 512 MB
    return max(4 * numbers.numel() / seconds(numbers.sum) for _ in range(5))


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# ---- rounds ----------------------------------------------------------------------------------------------------------


def compare(
    contest: Contest[Any],
    sizes: Any,
    rounds: int,
    least: float,
    say: Callable[[str], None],
    only: Collection[str] | None = None,
) -> dict[str, Any]:
    """Runs a contest: `rounds` turns of each contestant, or of `only` those named, each of at least `least` seconds.

    Returns a JSON object: sizes, machine, limits (FLOP/s and bytes/s, where they are a measure) and, for each
    contestant that could be had, its rates, their median, its share of the limit and its memory.
    """
    contest.check(sizes)
    for name in only or ():
        if name not in contest.contestants:
            known = ", ".join(contest.contestants)
            raise InputError(f"{name}: takes no part in {contest.kind}; those who do: {known}")
    workers: dict[str, Worker] = {}
    limits: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        try:
            for name in contest.contestants if only is None else only:
                workers[name] = Worker(contest, name, sizes, folder)
                if workers[name].left_out:
                    worker = workers.pop(name)
                    worker.end()
                    say(f"{name}: left out, {worker.left_out}")
            for number in range(rounds):
                if contest.cost is not None:
                    limits.append((matrix_limit(), memory_limit()))
                names = list(workers)
                for name in names[number % len(names) :] + names[: number % len(names)]:  # no one is always the first
                    rate = workers[name].turn(least)
                    say(f"round {number + 1} of {rounds}, {name}: {rate:,.1f} {contest.unit}")
            memory = {name: worker.memory() for name, worker in workers.items()}
        finally:
            for worker in workers.values():
                worker.end()
    limit = Cost(*(statistics.median(values) for values in zip(*limits, strict=True)))  # a second's worth
    return {
        "kind": contest.kind,
        "unit": contest.unit,
        "shape": sizes._asdict(),
        "machine": machine(),
        "versions": versions(),
        "limits": {"flop_per_s": limit.flop, "bytes_per_s": limit.n_bytes} if limits else None,
        "results": {
            name: {
                "rates": worker.rates,
                "median": (median := statistics.median(worker.rates)),
                "of_limit": of_limit(contest.cost and contest.cost(sizes, name), median, limit),
                "memory": memory[name],
            }
            for name, worker in workers.items()
        },
    }


def machine() -> dict[str, Any]:
    import torch

    return {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}


def versions() -> dict[str, str]:
    import torch

    return {"python": platform.python_version(), "torch": torch.__version__}


def of_limit(cost: Cost | None, rate: float, limit: Cost) -> float | None:
    """The share of what the machine can do in a second, of its matrix products or its memory reads, in `rate` units."""
    return None if cost is None else rate * max(cost.flop / limit.flop, cost.n_bytes / limit.n_bytes)


class Worker:
    """A contestant's process, as seen by the one that compares. They speak in lines of JSON."""

    def __init__(self, contest: Contest[Any], name: str, sizes: Any, folder: str) -> None:
        """`folder` is where its temporary files go: a process that is killed does not remove them."""
        import torch

        self._process = subprocess.Popen(
            [sys.executable, "-m", "llm.bench", json.dumps([contest.kind, name, sizes])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": folder, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        self.rates: list[float] = []  # of each turn
        try:
            self.left_out: str | None = self._ask(None)
        except InputError:
            self.end()
            raise

    def turn(self, least: float) -> float:
        """Rates by the clock of the worker, which knows when its own work began."""
        amount, took = self._ask(least)
        self.rates.append(amount / took)
        return self.rates[-1]

    def memory(self) -> int:
        """The most that the process and its children have held, in bytes."""
        return int(self._ask("memory"))

    def end(self) -> None:
        """No more questions end it; what does not end by itself is killed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _ask(self, question: object) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        if question is not None:
            print(json.dumps(question), file=self._process.stdin, flush=True)
        if not (line := self._process.stdout.readline()):
            raise InputError(f"a contestant ended with status {self._process.wait()}; what it said stands above")
        answer = json.loads(line)
        if isinstance(answer, dict):
            raise InputError(answer["wrong"])
        return answer


def serve(contest: Contest[Any], name: str, sizes: list[Any]) -> None:
    """The contestant's side: makes what it needs, then answers."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what a package prints is no answer

    def answer(value: object) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        turn = contest.contestants[name](type(contest.sizes)(*sizes))
        turn()  # what is made once is made before the clock runs
    except ModuleNotFoundError as error:
        return answer(f"no package {error.name}")
    except LeftOut as error:
        return answer(str(error))
    except InputError as error:
        return answer({"wrong": str(error)})
    answer(None)
    for line in sys.stdin:
        question = json.loads(line)
        if question == "memory":
            answer(memory())
            continue
        start = time.perf_counter()
        amount = turn()
        while (took := time.perf_counter() - start) < question:
            amount += turn()
        answer([amount, took])


def apart(work: Callable[..., object], *arguments: object) -> None:
    """Runs something in a process that then ends, so that its memory is none of this one's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(work, *arguments).result()


def memory() -> int:
    """The most that this process has held on a GPU; else in memory, it and each of its children; in bytes."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and (held := torch.cuda.max_memory_allocated()):
        return int(held)
    own = psutil.Process()
    return sum(map(_most_held, [own, *own.children(recursive=True)]))


def _most_held(process: psutil.Process) -> int:
    """Where the system does not say, what it holds now.

    `getrusage` would count what the process was started from, before it became this program.
    """
    status = Path(f"/proc/{process.pid}/status")
    if not status.is_file():
        return int(process.memory_info().rss)
    [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024  # it says kB


# ---- for people ------------------------------------------------------------------------------------------------------


def markdown(found: Mapping[str, Any]) -> str:
    """A contest as a table, the ratio to the best peer first."""
    results = found["results"]
    peers = [result["median"] for name, result in results.items() if not name.startswith(OURS)]
    limits = found["limits"]
    header = ["", f"{found['unit']} (lowest to highest)", "to the best peer", *(["of the limit"] if limits else [])]
    rows = []
    for name, result in results.items():
        cells = [f"{result['median']:,.1f} ({min(result['rates']):,.1f} to {max(result['rates']):,.1f})"]
        cells.append(f"{result['median'] / max(peers):.2f}" if peers else "-")
        if limits:
            cells.append("-" if result["of_limit"] is None else f"{100 * result['of_limit']:.0f} %")
        rows.append([name, *cells, f"{result['memory'] / 2**20:,.0f} MB"])
    lines = [title(found), ""]
    lines += table([*header, "memory"], rows)
    if limits:
        lines += [f"Limits: {limits['flop_per_s'] / 1e9:.0f} GFLOP/s, {limits['bytes_per_s'] / 1e9:.0f} GB/s.", ""]
    return "\n".join(lines)


def title(found: Mapping[str, Any]) -> str:
    return f"`{found['kind']}`: " + ", ".join(size(key, value) for key, value in found["shape"].items() if value)


def size(name: str, value: int | str) -> str:
    return f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}"


def draw(found: Mapping[str, Any], path: Path) -> None:
    """The rates as bars, with the rounds as points on them."""
    from matplotlib.figure import Figure

    results = found["results"]
    figure = Figure(figsize=(7, 1 + 0.5 * len(results)), layout="constrained")
    axes = figure.subplots()
    names = list(results)[::-1]
    axes.barh(names, [results[name]["median"] for name in names], color="#8fb1d6")
    for name in names:
        axes.plot(results[name]["rates"], [name] * len(results[name]["rates"]), "k.", markersize=4)
    axes.set_xlabel(found["unit"])
    figure.savefig(path, dpi=120)
