"""Scores of text against a token-by-token loop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from llm.common.errors import InputError
from llm.inference import score
from llm.inference.score import Score, score_tokens
from llm.model.gpt import GPT
from tests.helpers import SHIPPED_FORM, gpt_config


def make_gpt(context_length: int = 8, positions: str = "rotary") -> GPT:
    torch.manual_seed(0)
    form = SHIPPED_FORM | {"n_layers": 2, "head_dim": 4, "vocab_size": 50, "tie_embeddings": False}
    config = gpt_config(**form | {"context_length": context_length, "positions": positions})
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)  # a fresh model is nearly uniform: differences between windows would not show
    return model.eval()


@torch.no_grad()
def naive_nats(model: GPT, ids: list[int]) -> float:
    """One forward pass for each token, from the definition: windows of the context, overlapping by half."""
    T = model.config.context_length
    nats = 0.0
    for i in range(1, len(ids)):
        start = 0
        while i >= start + T:
            start += T // 2
        logits = model(torch.tensor([ids[start:i]]))[0, -1].double()
        nats -= logits.log_softmax(-1)[ids[i]].item()
    return nats


@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 9, 12, 13, 40, 61])
@pytest.mark.parametrize("context_length", [8, 7])
def test_score_equals_a_loop_over_tokens(length: int, context_length: int) -> None:
    model = make_gpt(context_length, "learned")
    ids = torch.randint(0, 50, (length,), generator=torch.Generator().manual_seed(1))
    score = score_tokens(model, ids, batch_size=3)
    assert score.tokens == max(length - 1, 0)
    assert score.nats == pytest.approx(naive_nats(model, ids.tolist()), rel=1e-5, abs=1e-9)


def test_long_windows_are_scored_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_gpt()
    ids = torch.randint(0, 50, (100,), generator=torch.Generator().manual_seed(1))
    expected, rows = score_tokens(model, ids), []
    hidden = model.hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda idx: rows.append(len(idx)) or hidden(idx))
    monkeypatch.setattr(score, "MAX_TOKENS", 20)  # two windows of 8
    assert score_tokens(model, ids).nats == pytest.approx(expected.nats, rel=1e-5)
    assert set(rows) <= {1, 2} and 2 in rows


def test_score_does_not_depend_on_the_batch_size_or_the_training_mode() -> None:
    model = make_gpt()
    ids = torch.randint(0, 50, (100,), generator=torch.Generator().manual_seed(1))
    expected = score_tokens(model, ids, batch_size=1)
    assert score_tokens(model, ids, batch_size=64).nats == pytest.approx(expected.nats, rel=1e-5)
    model.train()
    model.set_dropout(0.5)
    assert score_tokens(model, ids).nats == pytest.approx(expected.nats, rel=1e-5)  # no dropout
    assert model.training


def test_score_of_shards_reads_no_more_than_max_tokens() -> None:
    ids = torch.randint(0, 50, (100,), generator=torch.Generator().manual_seed(1))

    class Shards:
        n_tokens = 100

        def read(self, start: int, length: int) -> np.ndarray[Any, Any]:
            assert start + length <= 30
            return ids[start : start + length].numpy()

    model = make_gpt()
    assert score_tokens(model, Shards(), max_tokens=30) == score_tokens(model, ids[:30])


def test_score_needs_a_context_of_two() -> None:
    with pytest.raises(InputError, match="context_length of 1"):
        score_tokens(make_gpt(1, "learned"), torch.tensor([1, 2, 3]))


def test_bits_per_byte_and_perplexity() -> None:
    scored = Score(nats=math.log(2) * 30, tokens=10)
    assert scored.bpb(15) == pytest.approx(2.0)
    assert scored.perplexity == pytest.approx(8.0)
    assert Score(1e6, 2).perplexity > 1e300  # large, not an error
