"""Tools, tool messages and template variables of chat requests, beside transformers' rendering; names of hosts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from llm.checkpoint.folder import save_checkpoint
from llm.cli.main import build_parser
from llm.cli.serve import build
from llm.serving.app import Server, build_app
from llm.serving.engine import Limits
from llm.serving.middleware import Gate
from llm.serving.models import Loading, Models
from tests.devices.test_ollama import own_chat
from tests.serving.conftest import QUESTION
from tests.tokenizer.test_own_template import CALL, TOOL, TOOLS, USER, made, their_ids

BODY = {"model": "qwen3", "max_tokens": 2, "temperature": 0}
# As OpenAI's clients send it: arguments are JSON in a string.
CALLED: list[Any] = [
    {**TOOLS[0]},
    {"role": "assistant", "content": None, "tool_calls": [{**CALL, "function": {**CALL["function"]}}]},  # type: ignore[dict-item]
    {**TOOLS[2]},
]
CALLED[1]["tool_calls"][0]["function"]["arguments"] = json.dumps(CALL["function"]["arguments"])  # type: ignore[index]


@pytest.fixture(scope="module")
def client(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("own") / "qwen3"
    checkpoint = own_chat("qwen3")
    longer = checkpoint.config.gpt.model_copy(update={"context_length": 2048})
    checkpoint.model.config = longer
    save_checkpoint(folder, checkpoint._replace(config=checkpoint.config.model_copy(update={"gpt": longer})))
    models = Models(Loading("cpu", limits=Limits(batch_size=1, chunk=64)))
    models.add(str(folder))
    models.add(str(place / "instruct"))
    with TestClient(build_app(Server(models)), raise_server_exceptions=False) as client:
        yield client


def chat(client: TestClient, **values: Any) -> Any:
    return client.post("/v1/chat/completions", json=BODY | {"messages": QUESTION} | values)


def prompt_tokens(client: TestClient, **values: Any) -> int:
    answer = chat(client, **values)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens"])


def test_tools_and_their_results_reach_the_models_own_template(client: TestClient) -> None:
    theirs = made("qwen3").theirs
    for messages, sent in (([USER], [USER]), (TOOLS, CALLED)):
        expected = len(their_ids(theirs, messages, tools=[TOOL], add_generation_prompt=True))
        assert prompt_tokens(client, messages=sent, tools=[TOOL]) == expected
        assert prompt_tokens(client, messages=sent, tools=[TOOL], tool_choice="auto", drop_oldest=True) == expected
    without = len(their_ids(theirs, [USER], add_generation_prompt=True))
    assert prompt_tokens(client, messages=[USER], tools=[TOOL], tool_choice="none") == without
    assert prompt_tokens(client, messages=[USER], tools=[]) == without


def test_template_variables_reach_the_models_own_template(client: TestClient) -> None:
    theirs = made("qwen3").theirs
    for options in ({"enable_thinking": False}, {"enable_thinking": True}):
        expected = len(their_ids(theirs, QUESTION, add_generation_prompt=True, **options))
        assert prompt_tokens(client, chat_template_kwargs=options) == expected
    assert len({prompt_tokens(client, chat_template_kwargs={"enable_thinking": on}) for on in (True, False)}) == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"chat_template_kwargs": {"enable_thinkin": False}}, "has no 'enable_thinkin'"),
        ({"chat_template_kwargs": {"messages\n": []}}, "has no 'messages"),
        ({"model": "instruct", "chat_template_kwargs": {"enable_thinking": False}}, "has no 'enable_thinking'"),
        ({"model": "instruct", "tools": [TOOL]}, "the template chatml has no place for them"),
        ({"tools": [{"type": "function"}]}, "tools.0.function: Field required"),
        ({"messages": [{"role": "user"}]}, "no content"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]}, "go with the role assistant"),
        ({"messages": [{"role": "assistant", "tool_calls": []}, USER]}, "tool_calls"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "[1"}}]}, USER]},
            "arguments of a tool call are no JSON object",
        ),
    ],
)
def test_what_a_template_has_no_place_for_is_one_line(client: TestClient, values: Any, message: str) -> None:
    answer = chat(client, **values)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]
    assert "\n" not in answer.json()["error"]["message"]


# ---- names of hosts --------------------------------------------------------------------------------------------------


def app_of(place: Path, *arguments: str) -> Any:
    return build(build_parser().parse_args(["serve", str(place / "base"), "--device", "cpu", *arguments]))


def test_a_local_server_answers_to_local_names_alone(place: Path) -> None:
    local = TestClient(app_of(place), base_url="http://127.0.0.1:8000")
    for name in ("localhost", "127.0.0.1:8000", "LOCALHOST:8000", "[::1]:8000", "[::1]"):
        assert local.get("/v1/models", headers={"host": name}).status_code == 200
    for name in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "", "[::2]"):
        refused = local.get("/", headers={"host": name})
        assert refused.status_code == 403 and "Host: a foreign name" in refused.json()["error"]["message"]


def test_a_server_on_the_network_answers_to_any_name(place: Path) -> None:
    everywhere = TestClient(app_of(place, "--host", "0.0.0.0"), base_url="http://models.example")
    assert everywhere.get("/health").status_code == 200
    assert Gate().hosts is None
