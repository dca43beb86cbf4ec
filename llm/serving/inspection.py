"""A model's insides over a text: losses, candidates, attention and the logit lens; and embeddings.

Shapes: T tokens, C emb_dim, V vocab_size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llm.api import Model
from llm.common.errors import InputError
from llm.inference.layers import run_layers
from llm.model.gpt import GPT
from llm.serving.prompts import text_ids
from llm.tokenizer.bpe import Tokenizer

MAX_TOKENS = 256  # of a text that is looked into


@torch.inference_mode()
def embed(model: GPT, ids: list[int]) -> list[float]:
    """Return the mean [C] of the last hidden states of a text's tokens."""
    if len(ids) > (longest := model.config.context_length):
        raise InputError(f"input: {len(ids)} tokens (expected at most {longest}); send a shorter text")
    idx = torch.tensor([ids], device=model.tok_emb.weight.device)
    mean: list[float] = model.hidden_states(idx)[0].float().mean(0).tolist()
    return mean


@torch.inference_mode()
def inspect_text(model: Model, text: str, layer: int, head: int, top: int) -> dict[str, Any]:
    """Return a text's tokens with losses and candidates, a head's attention [T, T] and the logit lens by layer."""
    gpt, tokenizer = model.gpt, model.checkpoint.tokenizer
    ids = text_ids(model, text)
    config = gpt.config
    for name, value, size in (("layer", layer, config.n_layers), ("head", head, config.n_heads)):
        if value >= size:
            raise InputError(f"{name}: no such {name} (expected 0 to {size - 1}, got {value})")
    if len(ids) > (longest := min(MAX_TOKENS, config.context_length)):
        raise InputError(f"text: {len(ids)} tokens (expected at most {longest}); send a shorter text")
    layers = list(run_layers(gpt, ids))
    streams, attention = [each.stream for each in layers], layers[layer + 1].attention[head]
    logprobs = [gpt.lm_head(gpt.final_norm(x)).float().log_softmax(-1) for x in streams]  # (layers + 1) x [T, V]
    following = torch.tensor(ids[1:], device=streams[0].device)[:, None]  # [T - 1, 1]
    losses = [None, *(-logprobs[-1][:-1].gather(1, following)[:, 0]).tolist()]
    candidates = likeliest(tokenizer, logprobs[-1], top)
    return {
        "tokens": [
            {"id": token, "text": tokenizer.decode([token]), "loss": loss, "candidates": likely}
            for token, loss, likely in zip(ids, losses, candidates, strict=True)
        ],
        "attention": attention.tolist(),
        "lens": [[row[0] for row in likeliest(tokenizer, each, 1)] for each in logprobs],
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
    }


def likeliest(tokenizer: Tokenizer, logprobs: Tensor, top: int) -> list[list[dict[str, Any]]]:
    """Return the likeliest tokens behind each place, with their probabilities, from log probabilities [T, V]."""
    values, ids = logprobs.exp().topk(min(top, logprobs.shape[-1]))
    return [
        [{"text": tokenizer.decode([token]), "probability": value} for token, value in zip(*pair, strict=True)]
        for pair in zip(ids.tolist(), values.tolist(), strict=True)
    ]
