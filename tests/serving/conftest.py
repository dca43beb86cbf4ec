"""Tiny models for the server, and clients that wait for whole answers."""

from __future__ import annotations

import pytest
import torch

from llm.model.gpt import GPT
from llm.serving.engine import Engine
from llm.serving.generation import Generation
from llm.serving.text_stream import Piece
from tests.helpers import LLAMA_FORM, gpt_config, tiny_tokenizer
from tests.inference.conftest import make_model

GPT2 = gpt_config(vocab_size=280, context_length=128, emb_dim=32, head_dim=8, ffn_dim=64)
MODERN = gpt_config(**GPT2.model_dump() | LLAMA_FORM | {"n_kv_heads": 2, "qk_norm": True, "tie_embeddings": False})
NARROW = gpt_config(**MODERN.model_dump() | {"sliding_window": 5})


@pytest.fixture(scope="module", params=[GPT2, MODERN, NARROW], ids=["learned", "rotary", "sliding window"])
def model(request: pytest.FixtureRequest) -> GPT:
    return make_model(request.param)


def prompts(n: int, longest: int = 90, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (n,), generator=generator).tolist()
    return [torch.randint(256, (length,), generator=generator).tolist() for length in lengths]


def engine(model: GPT, **values: object) -> Engine:
    from llm.serving.engine import Limits

    return Engine(model, tiny_tokenizer(), Limits(**({"batch_size": 8, "chunk": 16} | values)))  # type: ignore[arg-type]


class Client:
    """A request with the pieces of its answer."""

    def __init__(self, prompt: list[int], max_new_tokens: int = 12, **values: object) -> None:
        self.pieces: list[Piece] = []
        self.generation = Generation(prompt, max_new_tokens, self.pieces.append, **values)  # type: ignore[arg-type]

    @property
    def answer(self) -> list[int]:
        return self.generation.answer

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def finish_reason(self) -> str | None:
        return self.pieces[-1].finish_reason if self.pieces else None


def finish(engine: Engine, *clients: Client) -> list[list[int]]:
    """Answer requests one step after another."""
    engine.submit([client.generation for client in clients])
    while engine.busy:
        engine.step()
    return [client.answer for client in clients]
