"""The contest `generate`: each contestant builds its model and returns its turn."""

from __future__ import annotations

import torch

from llm.bench.contest import Turn
from llm.bench.models import Shape, gpt2_config, transformers_gpt2
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
