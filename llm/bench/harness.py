"""A benchmark: this project and its peers do the same work in rounds.

Each implementation is a process of its own. They take turns, so that other load on the machine meets them all; the
machine's own limits are measured in the same rounds. An implementation whose package is not installed, or that cannot
take part, is skipped by name. PyTorch is imported where it is used: its memory does not count for others.
"""

from __future__ import annotations

import json
import logging
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
from llm.common.markdown import table

OURS = "this project"  # the names of our own implementations begin with it
END_SECONDS = 5  # that a process has to end
S = TypeVar("S")  # the sizes of a benchmark, a NamedTuple

Workload = Callable[[], float]  # runs once; returns its amount of work, in the benchmark's unit

log = logging.getLogger("llm")


class Skipped(Exception):  # noqa: N818 (no error: the others go on)
    """Raised by an implementation that cannot take part; says why."""


class Cost(NamedTuple):
    """The operations and memory reads that one unit of work needs."""

    flop: float = 0.0  # of matrix products
    n_bytes: float = 0.0  # read from memory


class Benchmark(NamedTuple, Generic[S]):
    """A kind of work, and who does it."""

    kind: str
    unit: str  # of the amounts that workloads return, a second
    sizes: S  # the default
    implementations: dict[str, Callable[[S], Workload]]  # each makes what it needs, then returns its workload
    check: Callable[[S], None] = lambda sizes: None  # raises `InputError` for impossible sizes
    cost: Callable[[S, str], Cost | None] | None = None  # of an implementation; None where the limits do not apply
    forms: Mapping[str, S] = {}  # default sizes by form


def load_benchmark(kind: str) -> Benchmark[Any]:
    """Return the benchmark of a kind, without the imports of the others."""
    if kind == "tokenize":
        from llm.bench.tokenizing import TOKENIZE

        return TOKENIZE
    if kind == "generate":
        from llm.bench.decoding import GENERATE

        return GENERATE
    if kind.startswith("gpu"):
        from llm.bench.gpu import DECODE, TRAIN_GPT2

        return {"gpu train": TRAIN_GPT2, "gpu decode": DECODE}[kind]
    from llm.bench.training import FINETUNE, TRAIN

    return {"train": TRAIN, "finetune": FINETUNE}[kind]


# ---- the machine's limits --------------------------------------------------------------------------------------------


SECONDS_PER_SIZE = 0.25  # of matrix products


def matrix_limit() -> float:
    """Return the sustained rate of matrix products, at the best of some sizes, in FLOP/s: fp32, on a GPU bf16.

    On a CPU those of PyTorch's BLAS and of its oneDNN count, as either may be twice as fast as the other.
    """
    import torch

    from llm.model.linear import product

    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    sizes = ((2048, 384, 1536), (2048, 1536, 384), (1024, 1024, 1024), (2048, 2048, 2048))
    rates = []
    kinds: list[Callable[[Any, Any], Any]] = [torch.mm] if on_gpu else [torch.mm, lambda a, b: product(a, b.T)]
    for rows, inner, columns in ((16384, 768, 3072), (8192, 8192, 8192)) if on_gpu else sizes:
        a, b = (torch.randn(size, device=device, dtype=dtype) for size in ((rows, inner), (inner, columns)))
        for multiply in kinds:
            products, start = 0, time.perf_counter()
            while (took := time.perf_counter() - start) < SECONDS_PER_SIZE:
                multiply(a, b)
                if on_gpu:
                    torch.cuda.synchronize()
                products += 1
            rates.append(2 * rows * inner * columns * products / took)
    return max(rates)


def memory_limit() -> float:
    """Return the rate at which all threads together, or a GPU, read memory outside the caches, in bytes/s."""
    import torch

    on_gpu = torch.cuda.is_available()
    numbers = torch.ones(2**30 if on_gpu else 2**27, device="cuda" if on_gpu else "cpu")  # 4 GB, 512 MB
    return max(4 * numbers.numel() / seconds(lambda: numbers.sum().item()) for _ in range(5))


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# ---- rounds ----------------------------------------------------------------------------------------------------------


def compare(
    benchmark: Benchmark[Any], sizes: Any, rounds: int, least: float, only: Collection[str] | None = None
) -> dict[str, Any]:
    """Run a benchmark: `rounds` rounds of each implementation, or of `only` those named, of `least` seconds or more.

    Returns a JSON object: sizes, machine, limits (FLOP/s and bytes/s, where they apply) and, for each implementation
    that took part, its rates, their median, its share of the limit and its memory.
    """
    benchmark.check(sizes)
    for name in only or ():
        if name not in benchmark.implementations:
            known = ", ".join(benchmark.implementations)
            raise InputError(f"{name}: takes no part in {benchmark.kind}; those who do: {known}")
    workers: dict[str, Worker] = {}
    limits: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        try:
            for name in benchmark.implementations if only is None else only:
                workers[name] = Worker(benchmark, name, sizes, folder)
                if workers[name].skipped:
                    worker = workers.pop(name)
                    worker.end()
                    log.info(f"{name}: skipped, {worker.skipped}")
            if not workers:
                raise InputError(f"bench {benchmark.kind}: no implementation takes part; install a skipped one")
            for number in range(rounds):
                if benchmark.cost is not None:
                    limits.append((matrix_limit(), memory_limit()))
                names = list(workers)
                for name in names[number % len(names) :] + names[: number % len(names)]:  # in another order each time
                    rate = workers[name].run_round(least)
                    log.info(f"round {number + 1} of {rounds}, {name}: {rate:,.1f} {benchmark.unit}")
            memory = {name: worker.memory() for name, worker in workers.items()}
        finally:
            for worker in workers.values():
                worker.end()
    limit = Cost(*(statistics.median(values) for values in zip(*limits, strict=True)))  # a second's worth
    return {
        "kind": benchmark.kind,
        "unit": benchmark.unit,
        "shape": sizes._asdict(),
        "machine": machine(),
        "versions": versions(),
        "limits": {"flop_per_s": limit.flop, "bytes_per_s": limit.n_bytes} if limits else None,
        "results": {
            name: {
                "rates": worker.rates,
                "median": (median := statistics.median(worker.rates)),
                "of_limit": of_limit(benchmark.cost and benchmark.cost(sizes, name), median, limit),
                "memory": memory[name],
            }
            for name, worker in workers.items()
        },
    }


def machine() -> dict[str, Any]:
    import torch

    found = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def versions() -> dict[str, str]:
    import torch

    return {"python": platform.python_version(), "torch": torch.__version__}


def of_limit(cost: Cost | None, rate: float, limit: Cost) -> float | None:
    """Return the share of the machine's limit, of matrix products or memory reads, that `rate` units a second need."""
    return None if cost is None else rate * max(cost.flop / limit.flop, cost.n_bytes / limit.n_bytes)


class Worker:
    """The process of an implementation, seen from the harness. They exchange lines of JSON."""

    def __init__(self, benchmark: Benchmark[Any], name: str, sizes: Any, folder: str) -> None:
        """Start the process; `folder` takes its temporary files, as a killed process does not remove them."""
        import torch

        self._process = subprocess.Popen(
            [sys.executable, "-m", "llm.bench", json.dumps([benchmark.kind, name, sizes])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": folder, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        self.rates: list[float] = []  # of each round
        try:
            self.skipped: str | None = self._ask(None)
        except InputError:
            self.end()
            raise

    def run_round(self, least: float) -> float:
        """Return the rate of a round, by the clock of the worker."""
        amount, took = self._ask(least)
        self.rates.append(amount / took)
        return self.rates[-1]

    def memory(self) -> int:
        """Return the peak memory of the process and its children, in bytes."""
        return int(self._ask("memory"))

    def end(self) -> None:
        """Close the process's input, which ends it; kill it if that does not."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _ask(self, question: object) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        if question is not None:
            print(json.dumps(question), file=self._process.stdin, flush=True)
        if not (line := self._process.stdout.readline()):
            raise InputError(f"an implementation ended with status {self._process.wait()}; see its output above")
        answer = json.loads(line)
        if isinstance(answer, dict):
            raise InputError(answer["wrong"])
        return answer


def serve(benchmark: Benchmark[Any], name: str, sizes: list[Any]) -> None:
    """Be an implementation's process: make its workload, then answer the harness."""
    answers, sys.stdout = sys.stdout, sys.stderr  # a package's output is no answer

    def answer(value: object) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        run = benchmark.implementations[name](type(benchmark.sizes)(*sizes))
        run()  # warm up
    except ModuleNotFoundError as error:
        return answer(f"no package {error.name}")
    except Skipped as error:
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
        amount = run()
        while (took := time.perf_counter() - start) < question:
            amount += run()
        answer([amount, took])


def run_apart(work: Callable[..., object], *arguments: object) -> None:
    """Run a function in a process that then ends, so that its memory does not count for this one."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(work, *arguments).result()


def memory() -> int:
    """Return the peak memory in bytes: of this process on a GPU, else of it and each of its children."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and (held := torch.cuda.max_memory_allocated()):
        return int(held)
    own = psutil.Process()
    return sum(map(_peak_memory, [own, *own.children(recursive=True)]))


def _peak_memory(process: psutil.Process) -> int:
    """Return a process's peak memory, or where the system does not say, its memory now.

    `getrusage` would count the program that the process was forked from.
    """
    status = Path(f"/proc/{process.pid}/status")
    if not status.is_file():
        return int(process.memory_info().rss)
    [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024  # it says kB


# ---- the report ------------------------------------------------------------------------------------------------------


def markdown(found: Mapping[str, Any]) -> str:
    limits = found["limits"]
    header = ["", f"{found['unit']} (lowest to highest)", "to the best peer", *(["of the limit"] if limits else [])]
    lines = [title(found), "", *table([*header, "memory"], result_rows(found))]
    return "\n".join([*lines, *([limits_line(limits), ""] if limits else [])])


def limits_line(limits: Mapping[str, float]) -> str:
    return f"Limits: {limits['flop_per_s'] / 1e9:,.0f} GFLOP/s, {limits['bytes_per_s'] / 1e9:,.0f} GB/s."


def result_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Return the cells of each implementation: name, rates, ratio to the best peer, share of the limit, memory."""
    results, limits = found["results"], found["limits"]
    peers = [result["median"] for name, result in results.items() if not name.startswith(OURS)]
    rows = []
    for name, result in results.items():
        cells = [f"{result['median']:,.1f} ({min(result['rates']):,.1f} to {max(result['rates']):,.1f})"]
        cells.append(f"{result['median'] / max(peers):.2f}" if peers else "-")
        if limits:
            cells.append("-" if result["of_limit"] is None else f"{100 * result['of_limit']:.0f} %")
        rows.append([name, *cells, f"{result['memory'] / 2**20:,.0f} MB"])
    return rows


def title(found: Mapping[str, Any]) -> str:
    return f"`{found['kind']}`: " + ", ".join(
        f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}"
        for name, value in found["shape"].items()
        if value
    )


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draw the rates as bars, with the rounds as points on them."""
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
