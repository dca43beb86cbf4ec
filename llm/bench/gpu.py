"""The benchmark `gpu`: GPT-2 124M on a CUDA device, training and decoding, in one table.

Training is in bf16 by autocast at a context of 1,024, decoding a single row in bf16. Peers run compiled and not. Each
share is of the device's own limit, measured in the same rounds.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm.bench.decoding import requests
from llm.bench.harness import OURS, Benchmark, Cost, Skipped, Workload, compare, limits_line, result_rows
from llm.bench.models import Shape, check_shape, gpt_config, matrix_weights, training_cost, transformers_model
from llm.bench.training import train_book, train_litgpt, train_ours, train_transformers
from llm.common.errors import InputError
from llm.common.markdown import table
from llm.inference.compiled import CompiledDecoder
from llm.inference.generate import generate
from llm.model.gpt import GPT

GPT2 = Shape(layers=12, width=768, heads=12, vocab=50304, context=1024, batch=16, prompt=64, new=256)
# The vocabulary is GPT-2's, filled up to a multiple of 128, as nanoGPT does.


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def decode_ours(shape: Shape, graph: bool = False) -> Workload:
    """Return greedy decoding of a single row in bf16; `graph` replays a CUDA graph for each token."""
    model = GPT(gpt_config(shape)).to(device(), torch.bfloat16)
    if graph and device().type != "cuda":
        raise Skipped("CUDA graphs need a CUDA device")
    decoder = CompiledDecoder(model) if graph else model
    prompts, new = requests(shape._replace(batch=1))
    return lambda: sum(map(len, generate(decoder, prompts, max_new_tokens=new)))


def decode_transformers(shape: Shape, compiled: bool = False) -> Workload:
    """Return the same by transformers; `compiled` takes its static cache, for which it compiles by itself on GPUs."""
    model = transformers_model(shape).to(device(), torch.bfloat16).eval()
    [prompt], [new] = requests(shape._replace(batch=1))
    idx = torch.tensor([prompt], device=device())  # [1, T]

    def run() -> int:
        model.generate(
            idx,
            attention_mask=torch.ones_like(idx),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            cache_implementation="static" if compiled else "dynamic",
            disable_compile=not compiled,
        )
        return new

    return run


def decoding_cost(shape: Shape, name: str) -> Cost:
    """Return the cost of a token of a single row, which reads every weight once, in bf16."""
    return Cost(n_bytes=2 * matrix_weights(gpt_config(shape)))


TRAIN_GPT2 = Benchmark(
    "gpu train",
    "tokens/s",
    GPT2,
    {
        OURS: train_ours,
        f"{OURS}, compiled": partial(train_ours, compiled=True),
        "transformers": train_transformers,
        "transformers, compiled": partial(train_transformers, compiled=True),
        "litgpt, compiled": partial(train_litgpt, compiled=True),
        "the book, compiled": partial(train_book, compiled=True),
    },
    check_shape,
    training_cost,
)
DECODE = Benchmark(
    "gpu decode",
    "tokens/s",
    GPT2,
    {
        OURS: decode_ours,
        f"{OURS}, CUDA graph": partial(decode_ours, graph=True),
        "transformers": decode_transformers,
        "transformers, compiled": partial(decode_transformers, compiled=True),
    },
    check_shape,
    decoding_cost,
)


def measure(shape: Shape, rounds: int, seconds: float) -> dict[str, Any]:
    """Measure training and decoding on the CUDA device; without one, raise `InputError`."""
    if not torch.cuda.is_available():
        raise InputError("bench gpu: PyTorch sees no CUDA device here; on a CPU run `bench train` and `bench generate`")
    return {"kind": "gpu", "parts": [compare(part, shape, rounds, seconds) for part in (TRAIN_GPT2, DECODE)]}


def markdown(found: dict[str, Any]) -> str:
    """Return one table of all parts, and a line that says what it was measured on."""
    rows = [[part["kind"].removeprefix("gpu "), *cells] for part in found["parts"] for cells in result_rows(part)]
    header = ["GPT-2 124M, bf16", "", "tokens/s (lowest to highest)", "to the best peer", "of the limit", "memory"]
    first = found["parts"][0]
    shape, versions = first["shape"], first["versions"]
    limits = [limits_line(part["limits"]) for part in found["parts"] if part["limits"]]
    about = (
        f"{first['machine'].get('gpu', 'no GPU')}; Python {versions['python']}, torch {versions['torch']}; training at "
        f"{shape['batch']} x {shape['context']:,} tokens, decoding {shape['new']} tokens after {shape['prompt']}. "
    )
    return "\n".join([*table(header, rows), about + " ".join(limits[:1]), ""])


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw the rates of each part as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    for axes, part in zip(figure.subplots(len(found["parts"]), squeeze=False).flat, found["parts"], strict=True):
        names = list(part["results"])[::-1]
        axes.barh(names, [part["results"][name]["median"] for name in names], color="#8fb1d6")
        axes.set_xlabel(f"{part['kind'].removeprefix('gpu ')}, {part['unit']}")
    figure.savefig(path, dpi=120)
