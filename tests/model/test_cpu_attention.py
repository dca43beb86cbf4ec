"""Causal attention in blocks against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm.model import cpu_attention as attention
from llm.model import gpt as model
from llm.model.cpu_attention import causal_attention
from llm.model.gpt import GPT
from tests.helpers import gpt_config, randomize


def problem(tokens: int, heads: int = 4, kv_heads: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, tokens, n, 8, generator=generator, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    )
    return q, k, v, torch.randn(2, heads, tokens, 8, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tokens", [1, 2, 5, 6, 13])
def test_output_and_gradients_are_those_of_torch(tokens: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK_SIZE", 5)
    *inputs, grad = problem(tokens, kv_heads=kv_heads)
    y = causal_attention(*inputs)
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(y, inputs, grad)
    torch.testing.assert_close(found, torch.autograd.grad(expected, inputs, grad), atol=1e-6, rtol=0)


def test_no_scores_are_stored_for_the_backward_pass() -> None:
    *inputs, _ = problem(100)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        causal_attention(*inputs)
    assert kept and max(kept) == inputs[0].numel() < 100 * 100


def test_a_model_uses_it_in_bf16_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    monkeypatch.setattr(model, "causal_attention", lambda q, k, v: seen.append(q.dtype) or causal_attention(q, k, v))
    gpt, idx = GPT(gpt_config()).eval(), torch.randint(0, 61, (4, 8), generator=torch.Generator().manual_seed(0))
    randomize(gpt, std=0.1)
    plain = gpt(idx)
    assert not seen
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gpt(idx)
    assert seen == [torch.bfloat16] * len(gpt.blocks)
    torch.testing.assert_close(mixed.float(), plain, atol=0.02, rtol=0.02)
