"""A GPT with a classification head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llm.model.gpt import GPT
from llm.model.linear import Linear


class GPTClassifier(nn.Module):
    """A GPT with a linear head on the hidden state of each row's last token."""

    def __init__(self, gpt: GPT, n_labels: int) -> None:
        super().__init__()
        self.gpt = gpt
        self.head = Linear(gpt.config.emb_dim, n_labels)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, idx: Tensor, lengths: Tensor, cached_hidden: Tensor | None = None, start_layer: int = 0
    ) -> Tensor:
        """Return the logits [B, n_labels] of right-padded ids [B, T] with `lengths` [B] real tokens each.

        Attention is causal, so that padding changes no logits. `cached_hidden` is as in `GPT.hidden_states`.
        """
        hidden = self.gpt.hidden_states(idx, cached_hidden=cached_hidden, start_layer=start_layer)  # [B, T, C]
        last = hidden[torch.arange(len(idx), device=idx.device), lengths - 1]  # [B, C]
        return self.head(last)
