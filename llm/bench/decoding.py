"""The contest `generate`: each contestant builds its model and returns its turn."""

from __future__ import annotations

from functools import partial

import torch

from llm.bench.contest import OURS, Contest, Turn
from llm.bench.models import Shape, check_shape, decoding_cost, gpt2_config, transformers_gpt2
from llm.generate import generate
from llm.model import GPT


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


GENERATE = Contest(
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
)
