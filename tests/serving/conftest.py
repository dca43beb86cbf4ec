"""Tiny models for the server, and clients that wait for whole answers."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
import torch
import uvicorn

from llm.checkpoint.folder import Checkpoint, CheckpointConfig, save_checkpoint
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT
from llm.serving.answers import RequestLimits
from llm.serving.app import Server, build_app
from llm.serving.engine import Engine, Limits
from llm.serving.generation import Generation
from llm.serving.middleware import Gate
from llm.serving.models import CLASSIFIER, Loading, Models
from llm.serving.text_stream import Piece
from tests.helpers import LLAMA_FORM, gpt_config, randomize, tiny_tokenizer
from tests.inference.conftest import make_model

GPT2 = gpt_config(vocab_size=280, context_length=128, emb_dim=32, head_dim=8, ffn_dim=64)
MODERN = gpt_config(**GPT2.model_dump() | LLAMA_FORM | {"n_kv_heads": 2, "qk_norm": True, "tie_embeddings": False})
NARROW = gpt_config(**MODERN.model_dump() | {"sliding_window": 5, "full_layers": (1,), "local_rope_theta": 50.0})


@pytest.fixture(scope="module", params=[GPT2, MODERN, NARROW], ids=["learned", "rotary", "window in a layer"])
def model(request: pytest.FixtureRequest) -> GPT:
    return make_model(request.param)


def prompts(n: int, longest: int = 90, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (n,), generator=generator).tolist()
    return [torch.randint(256, (length,), generator=generator).tolist() for length in lengths]


def engine(model: GPT, **values: object) -> Engine:
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


# ---- over HTTP -------------------------------------------------------------------------------------------------------

QUESTION: Any = [{"role": "user", "content": "the cat sat on"}]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, instruct and spam, tiny random models."""
    path = tmp_path_factory.mktemp("models")
    config = MODERN.model_copy(update={"vocab_size": tiny_tokenizer().vocab_size, "context_length": 256})
    for name, kind, template in (("base", "base", None), ("instruct", "instruct", "chatml")):
        values: Any = {"kind": kind, "template": template, "gpt": config}
        save_checkpoint(
            path / name, Checkpoint(make_model(config).float(), tiny_tokenizer(), CheckpointConfig(**values))
        )
    torch.manual_seed(0)
    classifier = randomize(GPTClassifier(make_model(config).float(), 2))
    labels = CheckpointConfig(kind="classifier", gpt=config, labels=["ham", "spam"], max_length=32)
    assert isinstance(classifier, GPTClassifier)
    save_checkpoint(path / "spam", Checkpoint(classifier, tiny_tokenizer(), labels))
    return path


class Running:
    """A server in a thread of this process."""

    def __init__(
        self, place: Path, gate: Gate | None = None, limits: Limits | None = None, origins: Any = (), **values: Any
    ) -> None:
        self.models = Models(Loading("cpu", limits=limits or Limits(batch_size=4, chunk=32, deterministic=True)))
        for name in ("base", "instruct"):
            self.models.add(str(place / name))
        self.models.add(str(place / "spam"), CLASSIFIER)
        self.server = Server(self.models, RequestLimits(**values), gate or Gate(), origins)
        config = uvicorn.Config(build_app(self.server), "127.0.0.1", 0, http="h11", log_level="error")
        self.uvicorn, sockets = uvicorn.Server(config), [config.bind_socket()]
        self.port = sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.uvicorn.run, args=(sockets,), daemon=True)
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.01)

    def client(self, **values: Any) -> openai.OpenAI:
        return openai.OpenAI(**({"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0} | values))

    def stop(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join()


def wait_until(condition: Any) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come")


def metric(server: Running, name: str) -> float:
    lines = requests.get(f"{server.url}/metrics").text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(f"{name} ")), 0.0)
