"""A base model's view of a held-out text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from llm.checkpoint.folder import lm_checkpoint
from llm.data.shards import TokenShards
from llm.evaluation.base import inside
from llm.evaluation.base.inside import farthest_head, look_inside, passage_length, token_texts
from llm.inference.layers import run_layers
from llm.model.gpt import GPT
from tests.helpers import GPT2_FORM, LLAMA_FORM, gpt_config, randomize, tiny_tokenizer


@pytest.mark.parametrize("form", [GPT2_FORM, LLAMA_FORM | {"n_kv_heads": 2}], ids=["gpt2", "grouped queries"])
def test_layers_are_those_of_the_model(form: dict[str, object]) -> None:
    model = randomize(GPT(gpt_config(**form)))
    assert isinstance(model, GPT)
    ids = [5, 9, 2, 7, 1]
    embedding, *blocks = run_layers(model, ids)
    assert len(blocks) == model.config.n_layers and not embedding.attention.numel()
    with torch.inference_mode():
        expected = model.hidden_states(torch.tensor([ids]))[0]
        torch.testing.assert_close(model.final_norm(blocks[-1].stream), expected, atol=1e-5, rtol=1e-4)
    for layer in blocks:
        assert layer.attention.shape == (model.config.n_heads, 5, 5)
        torch.testing.assert_close(layer.attention.sum(-1), torch.ones(model.config.n_heads, 5))
        assert not layer.attention.triu(1).any(), "no token looks ahead"


def test_losses_and_attention_are_of_the_first_held_out_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()
    model = GPT(gpt_config(vocab_size=tokenizer.vocab_size, context_length=64))
    ids = tokenizer.encode("the cat sat on the mat. the dog ran to the hill and the")
    monkeypatch.setattr(inside, "TokenShards", lambda folder, split: Shards([*ids, tokenizer.eot, 1, 2], split))
    found = look_inside(lm_checkpoint(model, tokenizer, template=None, system=None), tmp_path)
    assert found is not None and "".join(found.tokens) == tokenizer.decode(ids)
    with torch.inference_mode():
        logits = model(torch.tensor([ids]))[0]
    expected = functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    assert found.losses[0] == 0.0
    np.testing.assert_allclose(found.losses[1:], expected, rtol=1e-4)
    n = passage_length(found.tokens)
    assert found.attention.shape == (n, n) and "".join(found.tokens[:n]).endswith("mat.")
    monkeypatch.setattr(inside, "TokenShards", lambda folder, split: Shards(ids[:3], split))
    assert look_inside(lm_checkpoint(model, tokenizer, template=None, system=None), tmp_path) is None


class Shards(TokenShards):
    """Tokens of the val part, where the test part is empty."""

    def __init__(self, ids: list[int], split: str) -> None:
        self.ids = ids if split == "val" else []

    @property
    def n_tokens(self) -> int:  # type: ignore[override]
        return len(self.ids)

    def read(self, start: int, stop: int) -> np.ndarray:  # type: ignore[override]
        return np.array(self.ids[start:stop])


def test_a_character_of_several_tokens_stands_behind_the_last() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("né 日")
    pieces = token_texts(tokenizer, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == "né 日" and "" in pieces


def test_the_head_that_looks_farthest_is_shown() -> None:
    near, far = torch.eye(4), torch.zeros(4, 4)
    far[:, 1] = 1
    first = torch.zeros(4, 4)
    first[:, 0] = 1
    assert farthest_head([torch.stack((near, first)), torch.stack((near, far))]) == (1, 1)
