"""Speed beside other projects: `python -m llm bench train | finetune | generate`.

Each contestant is a process of its own, and they take turns, so that whatever else the machine does meets them all; the
machine's own limits are measured in the same turns. Weights and data are random, nothing is downloaded. A contestant
whose package is not installed is left out by name.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.config import GPTConfig, InputError
from llm.data import Batch, Example, collate_labels, example_batches
from llm.generate import generate
from llm.model import GPT, GPTClassifier
from llm.train import keep_freed_memory, label_loss, next_token_loss
from llm.weights import GPT2Form


class Shape(NamedTuple):
    """What all contestants run: GPT-2's form, `batch` rows of `context` tokens, `new` tokens behind `prompt` ones."""

    layers: int
    width: int
    heads: int
    vocab: int
    context: int
    batch: int
    prompt: int
    new: int


Turn = Callable[[], int]  # one turn's work; returns how many tokens it was


# ---- the machine's limits --------------------------------------------------------------------------------------------


def matrix_limit() -> float:
    """The best rate of fp32 matrix products that this process sees, in FLOP/s."""
    rates = []
    for rows, inner, columns in ((2048, 384, 1536), (2048, 1536, 384), (1024, 1024, 1024), (2048, 2048, 2048)):
        a, b = torch.randn(rows, inner), torch.randn(inner, columns)
        rates += [2 * rows * inner * columns / seconds(partial(torch.mm, a, b)) for _ in range(5)]
    return max(rates)


def memory_limit() -> float:
    """The rate at which all threads together read memory that no cache holds, in bytes/s."""
    numbers = torch.ones(2**27)  # 512 MB
    return max(4 * numbers.numel() / seconds(numbers.sum) for _ in range(5))


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# ---- contestants: each builds its model and returns its turn ---------------------------------------------------------


def gpt2_config(shape: Shape) -> GPTConfig:
    """GPT-2's form, which all of them can take."""
    form = GPT2Form(
        vocab_size=shape.vocab,
        n_positions=shape.context,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
    )
    return form.gpt_config()


def training_turn(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], shape: Shape) -> Turn:
    """Forward, backward, clipping and AdamW on one batch, as every one of these projects does it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    tokens = torch.randint(0, shape.vocab, (shape.batch, shape.context + 1))  # [B, T+1]
    model.train()

    def turn() -> int:
        optimizer.zero_grad(set_to_none=True)
        loss(tokens[:, :-1], tokens[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return shape.batch * shape.context

    return turn


def train_ours(shape: Shape) -> Turn:
    keep_freed_memory()
    model = GPT(gpt2_config(shape))

    def loss(idx: Tensor, targets: Tensor) -> Tensor:
        total, weight = next_token_loss(model, Batch(idx, targets, []))
        return total / weight

    return training_turn(model, loss, shape)


def transformers_config(shape: Shape) -> Any:
    import transformers

    return transformers.GPT2Config(
        vocab_size=shape.vocab,
        n_positions=shape.context,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )


def transformers_gpt2(shape: Shape) -> Any:
    import transformers

    config = transformers_config(shape)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def train_transformers(shape: Shape) -> Turn:
    model = transformers_gpt2(shape)

    def loss(idx: Tensor, targets: Tensor) -> Tensor:
        logits = model(idx, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return training_turn(model, loss, shape)


def train_litgpt(shape: Shape) -> Turn:
    """Its GPT-NeoX form: rotary positions in place of learned ones, an output layer of its own."""
    import litgpt
    from litgpt.utils import chunked_cross_entropy

    config = litgpt.Config(
        block_size=shape.context,
        vocab_size=shape.vocab,
        padded_vocab_size=shape.vocab,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_embd=shape.width,
        parallel_residual=False,
        bias=True,
    )
    model = litgpt.GPT(config)

    def loss(idx: Tensor, targets: Tensor) -> Tensor:
        return cast(Tensor, chunked_cross_entropy(model(idx), targets, chunk_size=128))

    return training_turn(model, loss, shape)


def train_book(shape: Shape) -> Turn:
    """The book's fast model; its output layer is its own."""
    from llms_from_scratch.ch04 import GPTModelFast

    model = GPTModelFast(
        {
            "vocab_size": shape.vocab,
            "context_length": shape.context,
            "emb_dim": shape.width,
            "n_heads": shape.heads,
            "n_layers": shape.layers,
            "drop_rate": 0.0,
            "qkv_bias": True,
        }
    )

    def loss(idx: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())

    return training_turn(model, loss, shape)


def generate_ours(shape: Shape) -> Turn:
    model = GPT(gpt2_config(shape))
    prompts = torch.randint(0, shape.vocab, (shape.batch, shape.prompt)).tolist()
    return lambda: sum(map(len, generate(model, prompts, max_new_tokens=shape.new)))


def generate_transformers(shape: Shape, cache: str = "dynamic") -> Turn:
    model = transformers_gpt2(shape).eval()
    prompts = torch.randint(0, shape.vocab, (shape.batch, shape.prompt))

    def turn() -> int:
        found = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=shape.new,
            min_new_tokens=shape.new,
            do_sample=False,
            pad_token_id=0,
            cache_implementation=cache,
            disable_compile=True,
        )
        return int(found.shape[0] * (found.shape[1] - shape.prompt))

    return turn


# ---- finetuning ------------------------------------------------------------------------------------------------------


LABELS, EXAMPLES = 2, 2048


def messages(shape: Shape) -> list[Example]:
    """As long as short messages are, 4 to `context` tokens and 20 in the middle, with labels at random."""
    random = torch.Generator().manual_seed(0)
    lengths = torch.empty(EXAMPLES).log_normal_(3.0, 0.6, generator=random).long().clamp(4, shape.context).tolist()
    labels = torch.randint(0, LABELS, (EXAMPLES,), generator=random).tolist()
    ids = [torch.randint(0, shape.vocab, (length,), generator=random).tolist() for length in lengths]
    return [Example(row, 0, label) for row, label in zip(ids, labels, strict=True)]


def last_block_trains(blocks: nn.ModuleList, *others: nn.Module) -> None:
    for module in (blocks[-1], *others):
        module.requires_grad_(True)


def finetune_ours(shape: Shape) -> Turn:
    keep_freed_memory()
    examples = messages(shape)
    model = GPTClassifier(GPT(gpt2_config(shape)), LABELS)
    model.requires_grad_(False)
    last_block_trains(model.gpt.blocks, model.gpt.final_norm, model.head)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    batches = example_batches(examples, collate_labels, shape.batch, 1, seed=0)
    step = 0

    def turn() -> int:
        nonlocal step
        [batch] = batches(step)
        step += 1
        optimizer.zero_grad(set_to_none=True)
        loss, weight = label_loss(model, batch)
        (loss / weight).backward()
        optimizer.step()
        return len(batch.rows)

    return turn


def finetune_transformers(shape: Shape) -> Turn:
    """Batches in random order, padded to their longest row, as its Trainer's collator makes them."""
    import transformers

    examples = messages(shape)
    config = transformers_config(shape)
    config.pad_token_id = 0
    model = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa")
    model.requires_grad_(False)
    last_block_trains(model.transformer.h, model.transformer.ln_f, model.score)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    random = torch.Generator().manual_seed(0)
    model.train()

    def turn() -> int:
        rows = torch.randint(0, len(examples), (shape.batch,), generator=random).tolist()
        batch = collate_labels(examples, rows)
        assert batch.lengths is not None
        mask = (torch.arange(batch.idx.shape[1]) < batch.lengths[:, None]).long()
        optimizer.zero_grad(set_to_none=True)
        model(batch.idx, attention_mask=mask, labels=batch.targets).loss.backward()
        optimizer.step()
        return len(rows)

    return turn


# ---- contests --------------------------------------------------------------------------------------------------------


class Contest(NamedTuple):
    shape: Shape  # unless the command line says otherwise
    unit: str
    contestants: dict[str, Callable[[Shape], Turn]]


OURS = "this project"
CONTESTS = {
    "train": Contest(
        Shape(layers=6, width=384, heads=6, vocab=8192, context=256, batch=8, prompt=0, new=0),
        "tokens/s",
        {OURS: train_ours, "transformers": train_transformers, "litgpt": train_litgpt, "the book": train_book},
    ),
    "finetune": Contest(
        Shape(layers=12, width=384, heads=6, vocab=8192, context=256, batch=16, prompt=0, new=0),
        "examples/s",
        {OURS: finetune_ours, "transformers": finetune_transformers},
    ),
    "generate": Contest(
        Shape(layers=12, width=768, heads=12, vocab=50257, context=1024, batch=1, prompt=64, new=256),
        "tokens/s",
        {
            OURS: generate_ours,
            "transformers": generate_transformers,
            "transformers, static cache": partial(generate_transformers, cache="static"),
        },
    ),
}


def compare(kind: str, shape: Shape, rounds: int, least: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs a contest: `rounds` turns of each contestant, each of at least `least` seconds.

    Returns a JSON object: shape, machine, limits (FLOP/s and bytes/s) and, for each contestant that could be had, its
    rates, their median, its share of the limit and its memory.
    """
    if shape.width % shape.heads:
        raise InputError(f"width {shape.width} must be a multiple of heads {shape.heads}")
    if shape.prompt + shape.new > shape.context:
        raise InputError(f"prompt {shape.prompt} and new {shape.new} must fit into context {shape.context}")
    contest = CONTESTS[kind]
    workers: dict[str, Worker] = {}
    limits: list[tuple[float, float]] = []
    try:
        for name in contest.contestants:
            workers[name] = Worker(kind, name, shape)
            if workers[name].missing:
                worker = workers.pop(name)
                worker.kill()
                say(f"{name}: left out, no package {worker.missing}")
        for number in range(rounds):
            limits.append((matrix_limit(), memory_limit()))
            for name, worker in workers.items():
                say(f"round {number + 1} of {rounds}, {name}: {worker.turn(least):,.1f} {contest.unit}")
        memory = {name: worker.memory() for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.kill()
    flops, bandwidth = (statistics.median(values) for values in zip(*limits, strict=True))
    return {
        "kind": kind,
        "unit": contest.unit,
        "shape": shape._asdict(),
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "limits": {"flop_per_s": flops, "bytes_per_s": bandwidth},
        "results": {
            name: {
                "rates": worker.rates,
                "median": (median := statistics.median(worker.rates)),
                "of_limit": of_limit(kind, shape, median, flops, bandwidth),
                "memory": memory[name],
            }
            for name, worker in workers.items()
        },
    }


def of_limit(kind: str, shape: Shape, rate: float, flops: float, bandwidth: float) -> float | None:
    """The share of the machine's limit that a rate needs: of its matrix products in a training, of its memory reads for
    one row that is continued; None where neither is the measure.

    A token costs 6 operations for each weight of a matrix, forward and backward, and in each layer's attention as many
    for each number of its width and each position of the context, half of which it sees. A new token reads every weight
    once.
    """
    weights = shape.layers * 12 * shape.width**2 + shape.vocab * shape.width
    if kind == "train":
        return rate * (6 * weights + 6 * shape.layers * shape.width * shape.context) / flops
    if kind == "generate" and shape.batch == 1:
        return rate * 4 * weights / bandwidth
    return None


class Worker:
    """A contestant's process, as seen by the one that compares. They speak in lines of JSON."""

    def __init__(self, kind: str, name: str, shape: Shape) -> None:
        command = [sys.executable, "-m", "llm.bench", json.dumps([kind, name, shape, torch.get_num_threads()])]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.rates: list[float] = []  # of each turn
        self.missing: str | None = self._ask(None)

    def turn(self, least: float) -> float:
        """Rates by the clock of the worker, which knows when its own work began."""
        amount, took = self._ask(least)
        self.rates.append(amount / took)
        return self.rates[-1]

    def memory(self) -> int:
        """The most that the process has held, in bytes."""
        return int(self._ask("memory"))

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _ask(self, question: object) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        if question is not None:
            print(json.dumps(question), file=self._process.stdin, flush=True)
        if not (line := self._process.stdout.readline()):
            raise InputError(f"a contestant ended with status {self._process.wait()}; what it said stands above")
        return json.loads(line)


def work() -> None:
    """The contestant's side: builds its model, then answers."""
    kind, name, shape, threads = json.loads(sys.argv[1])
    answers, sys.stdout = sys.stdout, sys.stderr  # what a package prints is no answer
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    try:
        turn = CONTESTS[kind].contestants[name](Shape(*shape))
    except ModuleNotFoundError as error:
        print(json.dumps(error.name), file=answers, flush=True)
        return
    turn()  # what is made once is made before the clock runs
    print(json.dumps(None), file=answers, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        if question == "memory":
            largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(largest if sys.platform == "darwin" else largest * 1024, file=answers, flush=True)
            continue
        start = time.perf_counter()
        amount = turn()
        while (took := time.perf_counter() - start) < question:
            amount += turn()
        print(json.dumps([amount, took]), file=answers, flush=True)


# ---- for people ------------------------------------------------------------------------------------------------------


def markdown(found: Mapping[str, Any]) -> str:
    """A contest as a table, the ratio to the best peer first."""
    shape, results = found["shape"], found["results"]
    peers = [result["median"] for name, result in results.items() if name != OURS]
    lines = [
        f"`{found['kind']}`: " + ", ".join(f"{key} {value:,}" for key, value in shape.items() if value),
        "",
        f"| | {found['unit']} (lowest to highest) | to the best peer | of the limit | memory |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, result in results.items():
        rates = f"{result['median']:,.1f} ({min(result['rates']):,.1f} to {max(result['rates']):,.1f})"
        ratio = f"{result['median'] / max(peers):.2f}" if peers else "-"
        share = "-" if result["of_limit"] is None else f"{100 * result['of_limit']:.0f} %"
        lines.append(f"| {name} | {rates} | {ratio} | {share} | {result['memory'] / 2**20:,.0f} MB |")
    limits = found["limits"]
    lines += ["", f"Limits: {limits['flop_per_s'] / 1e9:.0f} GFLOP/s, {limits['bytes_per_s'] / 1e9:.0f} GB/s."]
    return "\n".join(lines) + "\n"


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


if __name__ == "__main__":
    work()
