"""Tell whether the solutions beside this file are right: `pytest docs/book/exercises`.

`LLM_SOLUTIONS=docs/book/solutions` checks those of another folder.
"""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent


def solutions(name: str) -> ModuleType:
    """Load the solutions of a chapter, anew for each test."""
    path = Path(os.environ.get("LLM_SOLUTIONS", HERE)) / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"solutions_{name}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_perplexity() -> None:
    assert solutions("chapter_1").perplexity(math.log(8)) == pytest.approx(8)


def test_uniform_loss() -> None:
    assert solutions("chapter_1").uniform_loss(50257) == pytest.approx(10.8249, abs=1e-4)


def test_bits_per_character() -> None:
    assert solutions("chapter_1").bits_per_character(math.log(4), 100, 400) == pytest.approx(0.5)


def test_merge() -> None:
    merge = solutions("chapter_2").merge
    assert merge([1, 1, 1, 2, 1, 2], (1, 1), 9) == [9, 1, 2, 1, 2]
    assert merge([1, 2, 1, 2], (1, 2), 9) == [9, 9] and merge([], (1, 2), 9) == []


def test_most_frequent_pair() -> None:
    assert solutions("chapter_2").most_frequent_pair([5, 6, 5, 6, 1, 2, 1, 2]) == (1, 2)


def test_windows() -> None:
    windows = solutions("chapter_2").windows
    assert windows([0, 1, 2, 3, 4], 2, 2) == [([0, 1], [1, 2]), ([2, 3], [3, 4])]
    assert windows([0, 1], 2, 1) == []


def test_causal_weights(random: torch.Generator) -> None:
    weights = solutions("chapter_3").causal_weights(torch.randn(2, 3, 5, 5, generator=random))
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3, 5)) and not weights.triu(1).any()


def test_attend(random: torch.Generator) -> None:
    q, k, v = torch.randn(3, 2, 3, 6, 4, generator=random)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(solutions("chapter_3").attend(q, k, v), expected, atol=1e-5)


def test_cache_bytes() -> None:
    assert solutions("chapter_3").cache_bytes(12, 12, 64, 1024, 2) == 37_748_736


def test_count_block_parameters() -> None:
    assert solutions("chapter_4").count_block_parameters(768, 3072) == 7_087_872


def test_training_memory() -> None:
    assert solutions("chapter_4").training_memory(124_439_808) == 1_991_036_928


def test_layer_norm(random: torch.Generator) -> None:
    x, weight, bias = torch.randn(3, 8, generator=random), torch.randn(8), torch.randn(8)
    expected = F.layer_norm(x, (8,), weight, bias, 1e-5)
    assert torch.allclose(solutions("chapter_4").layer_norm(x, weight, bias, 1e-5), expected, atol=1e-5)


def test_cross_entropy(random: torch.Generator) -> None:
    logits, targets = 500 * torch.randn(7, 11, generator=random), torch.arange(7)
    assert torch.allclose(solutions("chapter_5").cross_entropy(logits, targets), F.cross_entropy(logits, targets))


def test_top_k() -> None:
    logits = torch.tensor([0.5, 2.0, -1.0, 1.0])
    kept = solutions("chapter_5").top_k(logits, 2)
    assert kept.tolist() == [-torch.inf, 2.0, -torch.inf, 1.0]


def test_temperature_entropy() -> None:
    entropy = solutions("chapter_5").temperature_entropy
    assert entropy(torch.zeros(16), 0.3) == pytest.approx(math.log(16))
    logits = torch.tensor([1.0, 2.0, 3.0])
    assert entropy(logits, 0.5) < entropy(logits, 1.0) < entropy(logits, 2.0) < math.log(3)


def test_last_real(random: torch.Generator) -> None:
    hidden = torch.randn(3, 5, 2, generator=random)
    expected = torch.stack([hidden[0, 0], hidden[1, 4], hidden[2, 2]])
    assert torch.equal(solutions("chapter_6").last_real(hidden, torch.tensor([1, 5, 3])), expected)


def test_accuracy_interval() -> None:
    from llm.evaluation.metrics import wilson

    for correct, total in ((50, 50), (293, 300), (1, 9)):
        assert solutions("chapter_6").accuracy_interval(correct, total) == pytest.approx(wilson(correct, total)[1:])


def test_leaks() -> None:
    assert solutions("chapter_6").leaks(["Free entry", "See you"], ["FREE  ENTRY", "see me", "seeyou"]) == 2


def test_mask_prompt() -> None:
    assert solutions("chapter_7").mask_prompt([1, 2, 3, 4, 5], 3) == ([1, 2, 3, 4], [-100, -100, 4, 5])


def test_is_exact() -> None:
    is_exact = solutions("chapter_7").is_exact
    assert is_exact(" It is HOT.", "it is hot") and not is_exact("it is hot now", "it is hot")


def test_alpaca() -> None:
    from llm.tokenizer.bpe import Tokenizer
    from llm.tokenizer.prompts import encode_prompt

    tokenizer = Tokenizer.train(["the cat sat on the mat " * 20], vocab_size=262)
    for words in (("Say hello.", ""), ("Sort.", "b, a")):
        ours = tokenizer.decode(encode_prompt(tokenizer, "alpaca", *words))
        assert solutions("chapter_7").alpaca(*words).strip() == ours.strip()


def test_warmup_cosine() -> None:
    factor = solutions("appendix_d").warmup_cosine
    assert factor(0, 10, 100, 0.1) == pytest.approx(0.1) and factor(10, 10, 100, 0.1) == pytest.approx(1)
    assert factor(55, 10, 100, 0.1) == pytest.approx(0.55) and factor(100, 10, 100, 0.1) == pytest.approx(0.1)


def test_clip(random: torch.Generator) -> None:
    gradient = torch.randn(5, 4, generator=random)
    clip = solutions("appendix_d").clip
    assert torch.equal(clip(gradient, 1e6), gradient)
    clipped = clip(gradient, 0.5)
    assert (
        clipped.norm() == pytest.approx(0.5) and F.cosine_similarity(clipped.flatten(), gradient.flatten(), 0) > 0.999
    )


def test_adamw_step(random: torch.Generator) -> None:
    weight = torch.nn.Parameter(torch.randn(6, generator=random))
    w, m, v = weight.detach().clone(), torch.zeros(6), torch.zeros(6)
    optimizer = torch.optim.AdamW([weight], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for t in (1, 2, 3):
        weight.grad = torch.randn(6, generator=random)
        w, m, v = solutions("appendix_d").adamw_step(w, weight.grad, m, v, t, 0.1)
        optimizer.step()
    assert torch.allclose(w, weight.detach(), atol=1e-6)


def test_lora_parameters() -> None:
    assert solutions("appendix_e").lora_parameters(768, 3072, 8) == 30_720


def test_merge_of_an_adapter(random: torch.Generator) -> None:
    weight, a, b, x = (torch.randn(shape, generator=random) for shape in ((6, 4), (2, 4), (6, 2), (4,)))
    merged = solutions("appendix_e").merge(weight, a, b, alpha=8.0)
    assert torch.allclose(merged @ x, weight @ x + 4.0 * (b @ (a @ x)), atol=1e-5)


def test_is_mergeable() -> None:
    weight, a, b = torch.zeros(6, 4), torch.zeros(2, 4), torch.zeros(6, 2)
    is_mergeable = solutions("appendix_e").is_mergeable
    assert is_mergeable(weight, a, b)
    assert not is_mergeable(weight.T, a, b) and not is_mergeable(weight, a, torch.zeros(6, 3))
