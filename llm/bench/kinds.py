"""The benchmarks by name."""

from __future__ import annotations

from typing import Any

from llm.bench.harness import Benchmark


def load_benchmark(kind: str) -> Benchmark[Any]:
    """Return the benchmark tokenize, train, finetune or generate, without the imports of the others."""
    if kind == "tokenize":
        from llm.bench.tokenizing import TOKENIZE

        return TOKENIZE
    if kind == "generate":
        from llm.bench.decoding import GENERATE

        return GENERATE
    from llm.bench.training import FINETUNE, TRAIN

    return {"train": TRAIN, "finetune": FINETUNE}[kind]
