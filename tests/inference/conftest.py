"""Tiny random models in double precision, and slower or independent ways to their tokens.

Weights are large enough that greedy text varies; two ways that should agree then agree on every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llm.config import GPTConfig
from llm.inference.kernels.build import load_kernels
from llm.model.gpt import GPT
from tests.helpers import LLAMA_FORM, gpt_config

GPT2 = gpt_config(vocab_size=61, context_length=24, emb_dim=32, head_dim=8, ffn_dim=64)
MODERN = gpt_config(**GPT2.model_dump() | LLAMA_FORM | {"n_kv_heads": 2, "qk_norm": True, "tie_embeddings": False})
NARROW = gpt_config(**MODERN.model_dump() | {"sliding_window": 5})
MIXED = gpt_config(
    **NARROW.model_dump()
    | {"n_layers": 3, "full_layers": (1, 2), "local_rope_theta": 50.0, "nope_layers": (2,), "rotary_dim": 4}
    | {"norm_place": "both", "unit_offset_norm": True, "attention_scale": 0.3, "embedding_scale": 4.0}
)
PROMPTS = [[5, 17, 3, 44], [9], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [60, 0], [12, 30, 31]]


def make_model(config: GPTConfig) -> GPT:
    torch.manual_seed(0)
    model = GPT(config).double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # random biases would favour the same token everywhere
            torch.nn.init.normal_(parameter, std=0.4)
    return model


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the kernels, with this machine's loaded."""
    folder = tmp_path_factory.mktemp("kernels")
    load_kernels(folder)
    return folder


@pytest.fixture(scope="module", params=[GPT2, MODERN], ids=["learned", "rotary"])
def model(request: pytest.FixtureRequest) -> GPT:
    return make_model(request.param)


@torch.no_grad()
def without_cache(model: GPT, prompt: Sequence[int], max_new_tokens: int, stop: Sequence[int] = ()) -> list[int]:
    """Return greedy text the slow way: the whole context again for each token, its last half when it is full."""
    length = model.config.context_length
    context, new = list(prompt[-length:]), []
    for _ in range(max_new_tokens):
        token = int(model(torch.tensor([context]))[0, -1].argmax())
        if token in stop:
            break
        new.append(token)
        context.append(token)
        if len(context) > length:
            context = context[-length // 2 :]
    return new


class Calls:
    """The shapes of ids that a model is called with."""

    def __init__(self, model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, int]] = []
        hidden_states = model.hidden_states

        def recorded(idx: Tensor, *args: object) -> Tensor:
            self.shapes.append((idx.shape[0], idx.shape[1]))
            return hidden_states(idx, *args)  # type: ignore[arg-type]

        monkeypatch.setattr(model, "hidden_states", recorded)
