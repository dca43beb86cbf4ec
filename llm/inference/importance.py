"""Importance of the inputs of linear layers: how much an error of their weights shows in a model's own text."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llm.inference.generate import generate
from llm.inference.request import eval_mode
from llm.inference.sampling import Sampling
from llm.model.gpt import GPT

ROWS, TOKENS = 8, 32  # of the text


def input_importance(model: GPT) -> dict[nn.Linear, Tensor]:
    """Return the mean square of each input [I] of each linear layer, over text that the model samples.

    The squared error of an output that a weight's error causes is proportional to it. Few inputs are hundreds of times
    larger than the rest, whatever the text.
    """
    idx = own_text(model)
    found: dict[nn.Linear, Tensor] = {}

    def record(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(layer, nn.Linear)
        found[layer] = inputs[0].flatten(0, -2).float().square().mean(0)

    layers = [part for part in model.modules() if isinstance(part, nn.Linear)]
    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        with torch.inference_mode(), eval_mode(model):
            model(idx)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def own_text(model: GPT) -> Tensor:
    """Return a batch of texts [B, T] that the model samples, each behind a random token; always the same."""
    device, n_tokens = model.tok_emb.weight.device, min(TOKENS, model.config.context_length)
    first = torch.randint(model.config.vocab_size, (ROWS, 1), generator=torch.Generator().manual_seed(0))  # [B, 1]
    made = generate(model, first.tolist(), max_new_tokens=n_tokens - 1, sampling=Sampling(temperature=1.0))
    return torch.cat([first, torch.tensor(made, dtype=torch.long)], dim=1).to(device)
