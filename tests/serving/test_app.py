"""The server over HTTP, asked by OpenAI's own client."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import requests
import torch

import llm
from llm.inference.generate import generate
from llm.inference.sampling import Sampling
from llm.serving.prompts import default_sampling
from llm.tokenizer.chat_source import GenerationConfig
from tests.helpers import tiny_tokenizer
from tests.serving.conftest import MODERN, QUESTION, Running, metric, wait_until


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Running]:
    running = Running(place)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return server.client()


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [each.id for each in client.models.list()] == ["base", "instruct", "spam"]
    assert client.models.retrieve("base").owned_by == "textmill"


def test_chat_and_completion_are_the_models_own_answers(client: openai.OpenAI, place: Path) -> None:
    chat = client.chat.completions.create(model="instruct", messages=QUESTION, temperature=0, max_tokens=20)
    [choice] = chat.choices
    expected = llm.load(place / "instruct", device="cpu").chat(QUESTION, max_new_tokens=20)
    assert choice.message.role == "assistant" and choice.message.content == expected
    assert choice.finish_reason == "length"
    assert chat.usage is not None and chat.usage.completion_tokens == 20
    assert chat.usage.total_tokens == chat.usage.prompt_tokens + 20
    text = client.completions.create(model="base", prompt="the cat", temperature=0, max_tokens=9, echo=True)
    base = llm.load(place / "base", device="cpu")
    assert text.choices[0].text == "the cat" + base.generate("the cat", max_new_tokens=9)
    by_ids = client.completions.create(
        model="base", prompt=[tiny_tokenizer().encode("the cat"), [1]], temperature=0, max_tokens=9
    )
    assert [each.index for each in by_ids.choices] == [0, 1]
    assert "the cat" + by_ids.choices[0].text == text.choices[0].text


def test_streams_give_the_same_text_and_usage(client: openai.OpenAI) -> None:
    options: Any = {"model": "instruct", "messages": QUESTION, "temperature": 0, "max_tokens": 20, "n": 2}
    whole = client.chat.completions.create(**options)
    texts, reasons, usage = ["", ""], [None, None], None
    for chunk in client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]  # type: ignore[call-overload]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == ["length", "length"] and usage == whole.usage
    pieces = client.completions.create(model="base", prompt=["a", "b"], temperature=0, max_tokens=5, stream=True)
    assert {chunk.choices[0].index for chunk in pieces} == {0, 1}


def test_seed_n_and_sampling(client: openai.OpenAI) -> None:
    def texts(**values: Any) -> list[str | None]:
        options = {"model": "instruct", "messages": QUESTION, "max_tokens": 12, "temperature": 1.5} | values
        return [choice.message.content for choice in client.chat.completions.create(**options).choices]

    assert texts(seed=7, n=3) == texts(seed=7, n=3)
    assert len(set(texts(seed=7, n=3))) == 3
    assert texts(seed=8, n=1) == texts(seed=7, n=2)[1:]
    assert texts(seed=-1) == texts(seed=-1)
    assert texts() != texts(), "without a seed, every answer has its own"
    assert texts(seed=1, top_p=1e-9) == texts(temperature=0)
    assert texts(seed=1, extra_body={"top_k": 1}) == texts(temperature=0)


def test_a_conversation_keeps_what_fits_where_it_is_asked_to(client: openai.OpenAI) -> None:
    turn: Any = [*QUESTION, {"role": "assistant", "content": "on the mat. " * 4}]
    options: Any = {"model": "instruct", "messages": [*turn * 12, *QUESTION], "temperature": 0, "max_tokens": 6}
    with pytest.raises(openai.BadRequestError, match="context"):
        client.chat.completions.create(**options)
    fitting = client.chat.completions.create(**options, extra_body={"drop_oldest": True})
    assert fitting.usage is not None and 128 < fitting.usage.prompt_tokens <= 250
    with pytest.raises(openai.BadRequestError, match="no question at the end"):
        client.chat.completions.create(**options | {"messages": turn})


def test_defaults_are_the_models_own_settings_or_openais(place: Path) -> None:
    model = llm.load(place / "instruct", device="cpu")
    assert default_sampling(model) == Sampling(temperature=1.0)
    own = GenerationConfig(do_sample=True, temperature=0.3, top_k=7)
    model.checkpoint = model.checkpoint._replace(config=model.checkpoint.config.model_copy(update={"generation": own}))
    assert default_sampling(model) == Sampling(temperature=0.3, top_k=7)


def test_stop_strings(client: openai.OpenAI) -> None:
    options: Any = {"model": "base", "prompt": "the cat", "temperature": 0, "max_tokens": 60}
    free = client.completions.create(**options).choices[0].text
    stop = free[20:23]
    stopped = client.completions.create(**options, stop=[stop, "never"]).choices[0]
    assert stopped.text == free[: free.index(stop)] and stopped.finish_reason == "stop"
    pieces = client.completions.create(**options, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in pieces if chunk.choices) == stopped.text


def test_log_probabilities(client: openai.OpenAI) -> None:
    options: Any = {"model": "instruct", "messages": QUESTION, "temperature": 0, "max_tokens": 6}
    choice = client.chat.completions.create(**options, logprobs=True, top_logprobs=3).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 3 and token.top_logprobs[0].logprob == token.logprob <= 0
    data = b"".join(bytes(token.bytes or []) for token in choice.logprobs.content)
    assert data.decode(errors="replace") == choice.message.content
    text = client.completions.create(model="base", prompt="a", temperature=0, max_tokens=4, logprobs=2).choices[0]
    assert text.logprobs is not None and len(text.logprobs.tokens or []) == 4
    assert text.logprobs.text_offset is not None and text.logprobs.text_offset[0] == 0


def test_embeddings_are_the_mean_of_the_last_hidden_state(client: openai.OpenAI, place: Path) -> None:
    found = client.embeddings.create(model="base", input=["the cat", "a dog"])  # in base64, as the client asks
    model = llm.load(place / "base", device="cpu").gpt
    with torch.no_grad():
        expected = model.hidden_states(torch.tensor([tiny_tokenizer().encode("a dog")]))[0].mean(0)
    assert np.allclose(found.data[1].embedding, expected, atol=1e-5)
    plain = client.embeddings.create(model="base", input="a dog", encoding_format="float")
    assert np.allclose(plain.data[0].embedding, expected, atol=1e-5)
    raw = requests.post(
        f"{client.base_url}embeddings", json={"model": "base", "input": "a", "encoding_format": "base64"}
    )
    assert len(base64.b64decode(raw.json()["data"][0]["embedding"])) == 4 * MODERN.emb_dim


@pytest.mark.parametrize(
    ("values", "status", "code", "param"),
    [
        ({"model": "gone"}, 404, "model_not_found", "model"),
        ({"model": "base"}, 400, "wrong_model_kind", "model"),
        ({"model": "spam"}, 400, "wrong_model_kind", "model"),
        ({"messages": []}, 400, None, "messages"),
        ({"messages": [{"content": "a"}]}, 400, None, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "the cat " * 200}]}, 400, "context_length_exceeded", "messages"),
        ({"temperature": -1}, 400, None, "temperature"),
        ({"max_tokens": 0}, 400, None, "max_tokens"),
        ({"max_tokens": 10**6}, 400, None, "max_tokens"),
        ({"n": 1000}, 400, None, "n"),
        ({"top_logprobs": 3}, 400, None, "top_logprobs"),
        ({"logit_bias": {"99999": 1}}, 400, None, "logit_bias"),
        ({"extra_body": {"functions": []}}, 400, None, "functions"),
        ({"extra_body": {"nonsense": 1}}, 400, None, "nonsense"),
        ({"stop": [""]}, 400, None, "stop.list[constrained-str].0"),
    ],
)
def test_errors_have_openais_form(
    client: openai.OpenAI, values: Any, status: int, code: str | None, param: str
) -> None:
    with pytest.raises(openai.APIStatusError) as raised:
        client.chat.completions.create(**({"model": "instruct", "messages": QUESTION, "max_tokens": 5} | values))
    assert raised.value.status_code == status
    assert isinstance(raised.value.body, dict) and raised.value.body["code"] == code
    found = raised.value.body["param"]
    assert found == param or (param.startswith("stop") and found.startswith("stop"))
    assert "\n" not in raised.value.body["message"]


def test_a_client_that_gives_up_frees_its_place(server: Running) -> None:
    client = server.client(timeout=0.05)
    with pytest.raises(openai.APITimeoutError):
        for _ in range(50):
            client.completions.create(model="base", prompt="the cat", max_tokens=250 - 8, temperature=0)
    stream = server.client().completions.create(
        model="base", prompt="a dog", max_tokens=240, temperature=0, stream=True
    )
    next(iter(stream))
    stream.close()
    wait_until(lambda: not server.models.engines["base"].busy)


def test_classify_and_its_words(server: Running, place: Path) -> None:
    texts = ["you have won spam", "ham"]
    body = {"model": "spam", "input": texts, "explain": True}
    found = requests.post(f"{server.url}/v1/classify", json=body).json()["data"]
    model = llm.load(place / "spam", device="cpu")
    expected = model.classify(texts)
    assert [each["probabilities"] for each in found] == [pytest.approx(row) for row in expected]
    assert [each["label"] for each in found] == [max(row, key=row.__getitem__) for row in expected]
    words = found[0]["words"]
    assert [word["text"] for word in words] == texts[0].split()
    without = model.classify(["you have  spam"])[0][found[0]["label"]]
    assert words[2]["effect"] == pytest.approx(expected[0][found[0]["label"]] - without, abs=1e-6)
    assert found[1]["words"][0]["effect"] is None


def test_tokenize(server: Running) -> None:
    found = requests.post(f"{server.url}/tokenize", json={"model": "base", "text": "the cat"}).json()
    assert [token["id"] for token in found["tokens"]] == tiny_tokenizer().encode("the cat")
    assert "".join(token["text"] for token in found["tokens"]) == "the cat" and found["count"] == len(found["tokens"])
    chat = requests.post(f"{server.url}/tokenize", json={"model": "instruct", "messages": QUESTION}).json()
    assert chat["tokens"][0]["text"] == "<|im_start|>"
    assert requests.post(f"{server.url}/tokenize", json={"model": "base"}).status_code == 400


def test_inspect_agrees_with_the_model(server: Running, place: Path) -> None:
    text = "the cat sat on the mat"
    body = {"model": "base", "text": text, "layer": 1, "head": 2, "top": 3}
    found = requests.post(f"{server.url}/v1/inspect", json=body).json()
    model = llm.load(place / "base", device="cpu")
    ids = tiny_tokenizer().encode(text)
    losses = [token["loss"] for token in found["tokens"]]
    assert losses[0] is None and sum(losses[1:]) == pytest.approx(model.score(text).nats, rel=1e-4)
    [following] = generate(model.gpt, [ids], max_new_tokens=1)
    assert found["tokens"][-1]["candidates"][0]["text"] == tiny_tokenizer().decode(following)
    attention = torch.tensor(found["attention"])
    assert attention.shape == (len(ids), len(ids))
    assert torch.allclose(attention.sum(-1), torch.ones(len(ids))) and not attention.triu(1).any()
    assert len(found["lens"]) == MODERN.n_layers + 1
    assert found["lens"][-1] == [token["candidates"][0] for token in found["tokens"]]
    for wrong in ({"layer": 2}, {"head": 4}, {"text": "the cat " * 200}):
        assert requests.post(f"{server.url}/v1/inspect", json=body | wrong).status_code == 400


def test_health_and_metrics(server: Running, client: openai.OpenAI) -> None:
    assert requests.get(f"{server.url}/health").json() == {"status": "ok"}
    assert requests.get(f"{server.url}/ready").json() == {"ready": True}
    before = metric(server, 'llm_prefix_hit_tokens_total{model="base"}')
    for _ in range(2):
        client.completions.create(model="base", prompt="the cat sat on the mat. " * 8, max_tokens=3)
    assert metric(server, 'llm_prefix_hit_tokens_total{model="base"}') > before
    assert metric(server, 'llm_generated_tokens_total{model="base"}') >= 6
    assert metric(server, 'llm_time_to_first_token_seconds_count{model="base"}') >= 2
    assert metric(server, 'llm_batch_size_count{model="base"}') >= 2
    assert metric(server, 'llm_queue{model="base"}') == 0
    assert metric(server, 'llm_requests_total{path="/v1/completions",status="200"}') >= 2
