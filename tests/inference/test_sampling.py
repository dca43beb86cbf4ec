"""Sampling: filters against transformers, and samples against their distribution."""

from __future__ import annotations

import pytest
import torch
from transformers.generation import logits_process as warpers

from llm.common.errors import InputError
from llm.inference.generate import generate
from llm.inference.sampling import Sampling, apply_repetition_penalty, filter_logits, sample
from llm.model.gpt import GPT
from tests.inference.conftest import GPT2, PROMPTS

PROBABILITIES = torch.tensor([[0.05, 0.4, 0.1, 0.25, 0.2], [0.96, 0.01, 0.01, 0.01, 0.01]])


def kept(**options: float) -> list[list[int]]:
    filtered = filter_logits(PROBABILITIES.log(), Sampling(temperature=1.0, **options))  # type: ignore[arg-type]
    return [row.isfinite().nonzero().flatten().tolist() for row in filtered]


def test_filters_keep_exactly_the_expected_tokens() -> None:
    assert kept(top_k=3)[0] == [1, 3, 4]
    assert kept(top_k=1) == [[1], [0]]
    assert kept(top_k=99) == [[0, 1, 2, 3, 4]] * 2
    assert kept(top_p=0.6) == [[1, 3], [0]]
    assert kept(top_p=0.7) == [[1, 3, 4], [0]]
    assert kept(top_p=0.01) == [[1], [0]]
    assert kept(top_p=1.0) == [[0, 1, 2, 3, 4]] * 2
    assert kept(min_p=0.45) == [[1, 3, 4], [0]]
    assert kept(min_p=1.0) == [[1], [0]]
    assert kept(min_p=0.0) == [[0, 1, 2, 3, 4]] * 2


def test_filters_apply_one_after_the_other() -> None:
    """0.4 and 0.25 are 0.65 of everything, but 0.76 of the three tokens that top-k leaves."""
    assert kept(top_p=0.7)[0] == [1, 3, 4]
    assert kept(top_p=0.7, top_k=3)[0] == [1, 3]


def test_equal_logits_keep_k_tokens() -> None:
    assert filter_logits(torch.zeros(1, 9), Sampling(temperature=1.0, top_k=4)).isfinite().sum() == 4


def test_filters_equal_those_of_transformers() -> None:
    logits = 3 * torch.randn(50, GPT2.vocab_size, generator=torch.Generator().manual_seed(1))
    ids = torch.randint(GPT2.vocab_size, (50, 20), generator=torch.Generator().manual_seed(2))
    for ours, theirs in [
        (filter_logits(logits, Sampling(top_k=7)), warpers.TopKLogitsWarper(7)),
        (filter_logits(logits, Sampling(top_p=0.83)), warpers.TopPLogitsWarper(0.83)),
        (filter_logits(logits, Sampling(min_p=0.07)), warpers.MinPLogitsWarper(0.07)),
        (
            apply_repetition_penalty(logits, torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True), 1.4),
            warpers.RepetitionPenaltyLogitsProcessor(1.4),
        ),
    ]:
        torch.testing.assert_close(ours, theirs(ids, logits))


def test_samples_follow_the_distribution() -> None:
    """20,000 draws at temperature 0.5: the probabilities are squared and normalised again."""
    rows = 20_000
    generators = [torch.Generator().manual_seed(row) for row in range(rows)]
    logits = PROBABILITIES[:1].log().expand(rows, -1)
    counts = sample(logits, Sampling(temperature=0.5), generators).bincount(minlength=5)
    expected = PROBABILITIES[0].square() / PROBABILITIES[0].square().sum()
    torch.testing.assert_close(counts / rows, expected, atol=0.012, rtol=0)  # more than three standard deviations


def test_temperature_near_zero_is_greedy(model: GPT) -> None:
    greedy = generate(model, PROMPTS, max_new_tokens=10)
    assert generate(model, PROMPTS, max_new_tokens=10, sampling=Sampling(temperature=1e-30)) == greedy
    assert generate(model, PROMPTS, max_new_tokens=10, sampling=Sampling(temperature=5.0, top_k=1)) == greedy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.5}, "temperature must be 0 .* found -0.5"),
        ({"temperature": float("nan")}, "temperature must be 0 .* found nan"),
        ({"top_k": 0}, "top_k must be 1 or more, found 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, found 0.0"),
        ({"top_p": 1.5}, "top_p must be"),
        ({"min_p": -0.1}, "min_p must be between 0 and 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
    ],
)
def test_sampling_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**options)  # type: ignore[arg-type]
