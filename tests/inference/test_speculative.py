"""Speculative decoding: the draft changes the speed, and neither greedy text nor the distribution of samples."""

from __future__ import annotations

import pytest
import torch

from llm.common.errors import InputError
from llm.inference.generate import generate, stream
from llm.inference.sampling import Sampling, probabilities
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


@pytest.mark.parametrize(
    ("noise", "draws", "tolerance"),
    [(0.1, 800, 0.06), *(pytest.param(noise, 4000, 0.03, marks=pytest.mark.slow) for noise in (0.0, 0.1, 1.0))],
)
def test_samples_with_a_draft_follow_the_models_distribution(noise: float, draws: int, tolerance: float) -> None:
    """Pairs of tokens from a model of five: the first one was accepted or replaced."""
    model = make_model(GPT2.model_copy(update={"vocab_size": 5, "n_layers": 1}))
    draft = make_draft(model, noise)
    warm = Sampling(temperature=3.0, top_k=4)
    counts = torch.zeros(5, 5)
    for seed in range(draws):
        first, second = stream(model, [1, 2], max_new_tokens=2, sampling=warm, seed=seed, draft=draft)
        counts[first, second] += 1
    with torch.no_grad():
        first = probabilities(model(torch.tensor([[1, 2]]))[:, -1], warm)[0]  # [V]
        second = probabilities(model(torch.tensor([[1, 2, token] for token in range(5)]))[:, -1], warm)  # [V, V]
    torch.testing.assert_close(counts.double() / draws, first[:, None] * second, atol=tolerance, rtol=0)


def test_a_draft_with_another_vocabulary_or_a_short_context_is_refused(model: GPT) -> None:
    other = make_model(GPT2.model_copy(update={"vocab_size": 60}))
    with pytest.raises(InputError, match="the draft has 60 tokens, the model 61"):
        stream(model, [1], max_new_tokens=3, draft=other)
    short = make_model(GPT2.model_copy(update={"context_length": 8}))
    assert list(stream(model, [1], max_new_tokens=7, draft=short)) == without_cache(model, [1], 7)
    with pytest.raises(InputError, match="the draft reads 8 tokens, and 9 are needed"):
        stream(model, [1], max_new_tokens=8, draft=short)
