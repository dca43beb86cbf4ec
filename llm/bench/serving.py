"""Servers under clients that stream: one client at a time, then many, beside llama.cpp's server; and one long load.

Each server is a process of its own that answers OpenAI's completions over HTTP. Prompts are random tokens, answers
greedy. A chunk of a stream is a token.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import multiprocessing
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped]

from llm.bench.harness import machine, run_apart, title, versions
from llm.bench.models import Shape
from llm.common.errors import InputError
from llm.common.markdown import table

OURS = {  # options of `python -m llm serve`
    "this project": (),
    "this project, compiled": ("--compile",),
    "this project, int8": ("--int8",),
    "this project, int8, compiled": ("--int8", "--compile"),
}
LLAMA_CPP = {"llama.cpp, F32": "f32", "llama.cpp, Q8_0": "q8_0"}
SIZES = Shape(
    layers=30,
    width=576,
    heads=9,
    vocab=49152,
    context=2048,
    batch=16,
    prompt=64,
    new=64,
    kv_heads=3,
    ffn=1536,
    form="llama",
)  # SmolLM2-135M's; `batch` are the clients
LEAVES = 0.05  # share of a load's clients that leave in the middle
QUEUE = 8  # requests that wait, in a load
MODEL = "model"


# ---- servers ---------------------------------------------------------------------------------------------------------


class Address(NamedTuple):
    """A running server."""

    host: str
    port: int
    process: psutil.Process


@contextlib.contextmanager
def our_server(shape: Shape, place: Path, *options: str) -> Iterator[Address]:
    """Run `python -m llm serve` on a model with random weights."""
    folder = place / MODEL
    if not folder.exists():
        run_apart(write_model, shape, folder)
    command = [sys.executable, "-m", "llm", "serve", str(folder), "--port", "0", "--batch-size", str(shape.batch)]
    command += options
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        try:
            assert process.stderr is not None
            found, said = None, ""
            for line in process.stderr:
                said = line.strip() or said
                if found := re.search(r"serving at http://([\d.]+):(\d+)", line):
                    break
            if found is None:
                raise InputError(f"our server did not start: {said}")
            threading.Thread(target=process.stderr.read, daemon=True).start()  # or it would stop at a full pipe
            yield Address(found[1], int(found[2]), psutil.Process(process.pid))
        finally:
            process.kill()


@contextlib.contextmanager
def llama_cpp_server(shape: Shape, place: Path, weights: str) -> Iterator[Address]:
    """Run llama.cpp's server, from xllamacpp's wheel, on the same weights."""
    path = place / f"{weights}.gguf"
    if not path.exists():
        run_apart(write_gguf, place / MODEL, shape, path, weights)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve_llama_cpp, args=(path, shape, threads(), there), daemon=True)
    process.start()
    there.close()
    try:
        try:
            url = here.recv()
        except EOFError:
            raise InputError("llama.cpp's server did not start; see its output above") from None
        host, _, port = url.removeprefix("http://").partition(":")
        assert process.pid is not None
        yield Address(host, int(port), psutil.Process(process.pid))
    finally:
        process.kill()
        process.join()


def serve_llama_cpp(path: Path, shape: Shape, n_threads: int, pipe: Any) -> None:
    """Be llama.cpp's server, until this process is killed."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.hostnames, params.port = str(path), ["127.0.0.1"], 0
    params.n_parallel, params.n_ctx = shape.batch, shape.batch * (shape.prompt + shape.new + 1)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = n_threads
    params.n_threads_http, params.n_gpu_layers, params.fit_params, params.verbosity = shape.batch + 2, 0, False, 0
    server = xllamacpp.Server(params)
    pipe.send(server.listening_address)
    threading.Event().wait()


def write_model(shape: Shape, folder: Path) -> None:
    """Write a model folder with random weights, and a vocabulary of as many texts in ASCII."""
    from llm.bench.models import gpt_config
    from llm.checkpoint.folder import lm_checkpoint, save_checkpoint
    from llm.model.gpt import GPT
    from llm.tokenizer.bpe import END_OF_TEXT, GPT2_PATTERN, Tokenizer

    letters = [bytes([byte]) for byte in range(33, 127)]
    pairs = [a + b for a in letters for b in letters]
    longer = [pair + letter for letter in letters for pair in pairs]
    tokens = [*(bytes([byte]) for byte in range(256)), *pairs, *longer][: shape.vocab - 1]
    tokenizer = Tokenizer(tokens, GPT2_PATTERN, {END_OF_TEXT: len(tokens)})
    save_checkpoint(folder, lm_checkpoint(GPT(gpt_config(shape)), tokenizer, None, None))


def write_gguf(folder: Path, shape: Shape, path: Path, weights: Any) -> None:
    """Write the same model for llama.cpp."""
    from llm.checkpoint.folder import load_checkpoint
    from llm.convert.gguf import export_gguf

    if not folder.exists():
        write_model(shape, folder)
    export_gguf(load_checkpoint(folder, dtype=None), path, weights)


def threads() -> int:
    import torch

    return torch.get_num_threads()


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads()), "LLM_API_KEY": ""}


# ---- clients ---------------------------------------------------------------------------------------------------------


@dataclass
class Counts:
    """Outcomes of requests, as their clients saw them."""

    chunks: list[float] = field(default_factory=list)  # times at which text came
    first: list[float] = field(default_factory=list)  # seconds from a request to its first text
    answers: Counter[str] = field(default_factory=Counter)  # complete, left, 429, or an error


def stream(address: Address, shape: Shape, seed: int, counts: Counts, going_on: Callable[[int], bool]) -> None:
    """Send a request and count its chunks while `going_on(chunks)`; then leave."""
    generator = random.Random(seed)
    prompt = [generator.randrange(256, shape.vocab - 1) for _ in range(shape.prompt)]
    body = {"model": MODEL, "prompt": prompt, "max_tokens": shape.new, "temperature": 0, "stream": True}
    begun, n, ended = time.perf_counter(), 0, False
    connection = http.client.HTTPConnection(address.host, address.port, timeout=300)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            response.read()
            counts.answers[str(response.status)] += 1
            return
        for line in response:
            if line.strip() == b"data: [DONE]":
                ended = True
                break
            if not line.startswith(b"data: "):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                break
            if event["choices"] and event["choices"][0].get("text"):
                counts.chunks.append(time.perf_counter())
                if n == 0:
                    counts.first.append(counts.chunks[-1] - begun)
                n += 1
            if not going_on(n):
                counts.answers["left"] += 1
                return
        counts.answers["complete" if ended else "broken off"] += 1
    except (OSError, http.client.HTTPException, ValueError) as error:
        counts.answers[type(error).__name__] += 1
    finally:
        connection.close()


def measure(address: Address, shape: Shape, clients: int, seconds: float, seed: int) -> dict[str, float]:
    """Return the tokens a second of clients that ask one request after another, and the median time to first token."""
    counts = [Counts() for _ in range(clients)]
    begun = time.perf_counter()
    until = begun + seconds

    def client(number: int) -> None:
        n = 0
        while time.perf_counter() < until:
            unique = (seed * 1000 + number) * 10_000 + n  # no prompt twice: nothing comes from a prefix cache
            stream(address, shape, unique, counts[number], lambda _: time.perf_counter() < until)
            n += 1

    run_all(client, clients)
    errors = sum((each.answers for each in counts), Counter[str]()) - Counter({"complete": 10**9, "left": 10**9})
    if errors:
        raise InputError(f"requests failed: {dict(errors)}; see the server's output above")
    made = sum(when <= until for each in counts for when in each.chunks)
    first = [value for each in counts for value in each.first]
    return {"rate": made / seconds, "first": statistics.median(first) if first else float("inf")}


def run_all(client: Callable[[int], None], clients: int) -> None:
    """Run clients in threads until all have ended."""
    running = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(clients)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


# ---- one against many ------------------------------------------------------------------------------------------------


def serve(shape: Shape, rounds: int, seconds: float, only: Collection[str] | None = None) -> dict[str, Any]:
    """Measure all servers, or those named, in rounds: one client for some seconds, then `shape.batch` clients."""
    names = [*OURS, *LLAMA_CPP]
    for name in only or ():
        if name not in names:
            raise InputError(f"{name}: takes no part in serve; those who do: {', '.join(names)}")
    found: dict[str, dict[str, Any]] = {name: {"one": [], "many": []} for name in names if not only or name in only}
    with tempfile.TemporaryDirectory(prefix="bench-") as place, contextlib.ExitStack() as stack:
        servers = {}
        for name in found:
            start = llama_cpp_server(shape, Path(place), LLAMA_CPP[name]) if name in LLAMA_CPP else None
            servers[name] = stack.enter_context(start or our_server(shape, Path(place), *OURS[name]))
            measure(servers[name], shape, 1, min(1.0, seconds), seed=0)  # warm up
        for number in range(rounds):
            order = list(found)[number % len(found) :] + list(found)[: number % len(found)]
            for name in order:
                for key, clients in (("one", 1), ("many", shape.batch)):
                    found[name][key].append(
                        measure(servers[name], shape, clients, seconds, 2 * number + 1 + (clients > 1))
                    )
        for name in found:
            found[name]["memory"] = servers[name].process.memory_info().rss
    return {
        "kind": "serve",
        "shape": shape._asdict(),
        "machine": machine(),
        "versions": versions(),
        "results": {
            name: {
                key: {part: statistics.median(each[part] for each in values[key]) for part in ("rate", "first")}
                for key in ("one", "many")
            }
            | {"rounds": {key: values[key] for key in ("one", "many")}, "memory": values["memory"]}
            for name, values in found.items()
        },
    }


def markdown(found: Mapping[str, Any]) -> str:
    if found["kind"] == "load":
        return load_markdown(found)
    header = [
        "",
        "one client, tokens/s",
        "first token, s",
        f"{found['shape']['batch']} clients, tokens/s",
        "first token, s",
    ]
    rows = []
    for name, result in found["results"].items():
        cells = [
            f"{result[key][part]:.{digits}f}" for key in ("one", "many") for part, digits in (("rate", 1), ("first", 2))
        ]
        times = result["many"]["rate"] / result["one"]["rate"] if result["one"]["rate"] else float("inf")
        rows.append([name, *cells, f"{times:.1f}", f"{result['memory'] / 2**20:,.0f} MB"])
    return "\n".join([title(found), "", *table([*header, "many to one", "memory"], rows)])


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draw the rates with many clients as bars, or the memory of a load over its time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    if found["kind"] == "load":
        axes.plot(*zip(*found["memory"], strict=True))
        axes.set(xlabel="seconds", ylabel="memory, bytes", ylim=(0, None))
    else:
        names = list(found["results"])[::-1]
        axes.barh(names, [found["results"][name]["many"]["rate"] for name in names], color="#8fb1d6")
        axes.set_xlabel(f"tokens/s, {found['shape']['batch']} clients")
    figure.savefig(path, dpi=120)


# ---- a long load -----------------------------------------------------------------------------------------------------


def load(shape: Shape, seconds: float) -> dict[str, Any]:
    """Keep our server beyond its queue's limit: some clients leave in the middle, and the model is swapped once.

    Returns what each request came to, the server's memory over time, and what it still holds at the end.
    """
    clients = 2 * shape.batch + QUEUE
    counts = [Counts() for _ in range(clients)]
    options = ("--queue", str(QUEUE), "--max-tokens", str(shape.new))
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as place,
        our_server(shape, Path(place), *options) as address,
    ):
        begun = time.perf_counter()
        until = begun + seconds

        def client(number: int) -> None:
            generator = random.Random(number)
            while time.perf_counter() < until:
                leaves = generator.randrange(1, shape.new) if generator.random() < LEAVES else shape.new + 1
                before = counts[number].answers["429"]
                stream(address, shape, generator.getrandbits(40), counts[number], leaves.__gt__)
                if counts[number].answers["429"] > before:
                    time.sleep(0.2)

        memory: list[tuple[float, int]] = []
        swapped: list[int] = []
        watch = threading.Thread(target=watch_server, args=(address, until, memory, swapped), daemon=True)
        watch.start()
        run_all(client, clients)
        watch.join()
        held = left_over(address)
    answers = sum((each.answers for each in counts), Counter[str]())
    return {
        "kind": "load",
        "shape": shape._asdict() | {"clients": clients, "seconds": seconds},
        "machine": machine(),
        "versions": versions(),
        "answers": dict(answers),
        "errors": sum(answers.values()) - sum(answers[key] for key in ("complete", "left", "429")),
        "swap": swapped,
        "memory": memory,
        "held": held,
    }


def watch_server(address: Address, until: float, memory: list[tuple[float, int]], swapped: list[int]) -> None:
    """Note the server's memory about once a second, and swap its model in the middle."""
    begun = time.perf_counter()
    while (now := time.perf_counter()) < until:
        memory.append((now - begun, address.process.memory_info().rss))
        if not swapped and now - begun > (until - begun) / 2:
            swapped.append(ask(address, "POST", "/admin/reload", "{}")[0])
        time.sleep(min(1.0, (until - begun) / 20))


def left_over(address: Address) -> float:
    """Return the requests that the server still holds after some seconds of peace."""
    for _ in range(50):
        text = ask(address, "GET", "/metrics")[1]
        held = sum(float(value) for value in re.findall(r"^llm_(?:queue|running)\{.*?\} (\S+)$", text, re.MULTILINE))
        if held == 0:
            return 0.0
        time.sleep(0.2)
    return held


def ask(address: Address, method: str, path: str, body: str | None = None) -> tuple[int, str]:
    """Return the status and the text of an answer."""
    connection = http.client.HTTPConnection(address.host, address.port, timeout=300)
    try:
        connection.request(method, path, body, {"content-type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def load_markdown(found: Mapping[str, Any]) -> str:
    """Return the outcome of a load as a table."""
    sizes = [size for _, size in found["memory"]]
    quarter = max(1, len(sizes) // 4)
    memory = [
        f"{statistics.median(part) / 2**20:,.0f} MB"
        for part in (sizes[quarter : 2 * quarter], sizes[-quarter:])
        if part
    ]
    rows = [[f"answers: {key}", f"{value:,}"] for key, value in sorted(found["answers"].items())]
    rows += [
        ["errors", str(found["errors"])],
        ["swap of the model, status", ", ".join(map(str, found["swap"]))],
        ["memory, second quarter and last", ", ".join(memory)],
        ["requests left over", f"{found['held']:g}"],
    ]
    return "\n".join([title(found), "", *table(["", ""], rows)])
