"""Speculative decoding: the draft changes the speed, and neither greedy text nor the distribution of samples."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from llm.common.errors import InputError
from llm.inference.generate import generate, stream
from llm.inference.request import Request
from llm.inference.sampling import Sampling, probabilities
from llm.inference.speculative import NUM_LOOKUP_TOKENS, _Lookup
from llm.model.gpt import GPT
from tests.inference.conftest import GPT2, PROMPTS, Calls, make_model, without_cache


def make_draft(model: GPT, noise: float) -> GPT:
    """Return a model that often, but not always, predicts the tokens of the other."""
    draft = GPT(model.config).double()
    draft.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return draft


@pytest.mark.parametrize("noise", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("prompt", PROMPTS[:3])
def test_greedy_text_does_not_depend_on_the_draft(
    model: GPT, prompt: list[int], noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the context too, and with a stop token and a penalty."""
    draft = make_draft(model, noise)
    for options in ({}, {"stop": {11, 12}}, {"sampling": Sampling(repetition_penalty=1.3)}):
        [expected] = generate(model, [prompt], max_new_tokens=50, **options)  # type: ignore[arg-type]
        calls = Calls(model, monkeypatch)
        found = list(stream(model, prompt, max_new_tokens=50, draft=draft, **options))  # type: ignore[arg-type]
        assert found == expected
        if not noise and len(expected) == 50:
            assert len(calls.shapes) < 25, "the draft is the model itself: every token is accepted"


@pytest.mark.parametrize("prompt", [*PROMPTS, [7, 8, 9, 3] * 5, [4, 4, 4, 4]])
def test_greedy_text_does_not_depend_on_a_lookup(model: GPT, prompt: list[int]) -> None:
    """Past the context too, and with a stop token and a penalty."""
    for options in ({}, {"stop": {11, 12}}, {"sampling": Sampling(repetition_penalty=1.3)}):
        [expected] = generate(model, [prompt], max_new_tokens=50, **options)  # type: ignore[arg-type]
        found = list(stream(model, prompt, max_new_tokens=50, draft="prompt", **options))  # type: ignore[arg-type]
        assert found == expected


def test_a_text_that_repeats_itself_takes_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that says one token for ever: eight guesses and one more token a call."""
    model = make_model(GPT2.model_copy(update={"context_length": 128}))
    with torch.no_grad():
        for block in model.blocks:
            for parameter in block.parameters():
                parameter.zero_()
        model.pos_emb.weight.zero_()
    prompt = [1, 2, 3]
    [expected] = generate(model, [prompt], max_new_tokens=60)
    calls = Calls(model, monkeypatch)
    assert list(stream(model, prompt, max_new_tokens=60, draft="prompt")) == expected
    assert len(set(expected)) < 4 and len(calls.shapes) < 15
    assert max(tokens for _, tokens in calls.shapes) == 1 + NUM_LOOKUP_TOKENS


def test_what_followed_an_n_gram_before_is_proposed() -> None:
    """The longest n-gram counts, then its last place; a short period goes on; a new context is read anew."""
    lookup = _Lookup(20, torch.device("cpu"))

    def proposed(context: list[int], read: int, limit: int = 4) -> list[int]:
        request = Request(0, context, limit, torch.Generator(), None)
        tokens, q = lookup.propose(read, limit, request)
        assert [int(row.argmax()) for row in q] == tokens and all(row.sum() == row.max() == 1 for row in q)
        return tokens

    assert proposed([1, 2, 3, 4, 2, 3], 0) == [4, 2, 3, 4]
    assert proposed([1, 2, 3, 4, 2, 3, 5, 1, 2, 3], 5) == [4, 2, 3, 5], "three tokens, not the last place of two"
    assert proposed([1, 2, 3, 4, 2, 3, 5, 1, 2, 3, 9, 2, 3], 9, limit=2) == [9, 2]
    assert proposed([1, 2, 3, 4, 2, 3, 5, 1, 2, 3, 9, 2, 3], 12, limit=0) == []
    assert proposed([6, 2, 3], 0) == []
    assert proposed([6, 6, 6], 0) == [6, 6, 6, 6]


@pytest.mark.parametrize(
    ("noise", "draws", "tolerance"),
    [
        (0.1, 800, 0.06),
        ("prompt", 800, 0.06),
        *(pytest.param(noise, 4000, 0.03, marks=pytest.mark.slow) for noise in ("prompt", 0.0, 0.1, 1.0)),
    ],
)
def test_samples_with_a_draft_follow_the_models_distribution(
    noise: float | Literal["prompt"], draws: int, tolerance: float
) -> None:
    """Pairs of tokens from a model of five: the first one was accepted or replaced."""
    model = make_model(GPT2.model_copy(update={"vocab_size": 5, "n_layers": 1}))
    draft = noise if isinstance(noise, str) else make_draft(model, noise)
    warm = Sampling(temperature=3.0, top_k=4)
    prompt = [1, 2, 3, 1, 2]
    counts = torch.zeros(5, 5)
    for seed in range(draws):
        first, second = stream(model, prompt, max_new_tokens=2, sampling=warm, seed=seed, draft=draft)
        counts[first, second] += 1
    with torch.no_grad():
        first = probabilities(model(torch.tensor([prompt]))[:, -1], warm)[0]  # [V]
        second = probabilities(model(torch.tensor([[*prompt, token] for token in range(5)]))[:, -1], warm)  # [V, V]
    torch.testing.assert_close(counts.double() / draws, first[:, None] * second, atol=tolerance, rtol=0)


def test_a_draft_with_another_vocabulary_or_a_short_context_is_refused(model: GPT) -> None:
    other = make_model(GPT2.model_copy(update={"vocab_size": 60}))
    with pytest.raises(InputError, match="the draft has 60 tokens, the model 61"):
        stream(model, [1], max_new_tokens=3, draft=other)
    short = make_model(GPT2.model_copy(update={"context_length": 8}))
    assert list(stream(model, [1], max_new_tokens=7, draft=short)) == without_cache(model, [1], 7)
    with pytest.raises(InputError, match="the draft reads 8 tokens, and 9 are needed"):
        stream(model, [1], max_new_tokens=8, draft=short)
