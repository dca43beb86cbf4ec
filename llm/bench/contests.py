"""Who takes part in which contest, and at which sizes. As a program it is the process of one contestant."""

from __future__ import annotations

from functools import partial
from typing import Any

from llm.bench.contest import OURS, Contest, serve
from llm.bench.decoding import generate_ours, generate_transformers
from llm.bench.models import Shape, check_shape, decoding_cost, training_cost
from llm.bench.training import (
    finetune_ours,
    finetune_transformers,
    train_book,
    train_litgpt,
    train_ours,
    train_transformers,
)

CONTESTS: dict[str, Contest[Any]] = {
    contest.kind: contest
    for contest in (
        Contest(
            "train",
            "tokens/s",
            Shape(layers=6, width=384, heads=6, vocab=8192, context=256, batch=8),
            {OURS: train_ours, "transformers": train_transformers, "litgpt": train_litgpt, "the book": train_book},
            check_shape,
            training_cost,
        ),
        Contest(
            "finetune",
            "examples/s",
            Shape(layers=12, width=384, heads=6, vocab=8192, context=256, batch=16),
            {OURS: finetune_ours, "transformers": finetune_transformers},
            check_shape,
        ),
        Contest(
            "generate",
            "tokens/s",
            Shape(layers=12, width=768, heads=12, vocab=50257, context=1024, batch=1, prompt=64, new=256),
            {
                OURS: generate_ours,
                "transformers": generate_transformers,
                "transformers, static cache": partial(generate_transformers, cache="static"),
            },
            check_shape,
            decoding_cost,
        ),
    )
}

if __name__ == "__main__":
    serve(CONTESTS)
