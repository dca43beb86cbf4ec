"""Answers of a stated form, from random models that would never keep to one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.serving.conftest import QUESTION, Running

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(place: Path) -> Iterator[openai.OpenAI]:
    running = Running(place)
    yield running.client()
    running.stop()


def answer(client: openai.OpenAI, form: dict[str, Any], seed: int, **values: Any) -> Any:
    options: Any = {"model": "instruct", "messages": QUESTION, "seed": seed, "max_tokens": 150}
    return client.chat.completions.create(**options | values, response_format=form).choices[0]


@pytest.mark.parametrize("seed", range(4))
def test_json_of_a_schema(client: openai.OpenAI, seed: int) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True}}
    found = answer(client, form, seed, temperature=1.0 if seed else 0)
    value = json.loads(found.message.content)
    assert found.finish_reason == "stop" and value.keys() == {"name", "age", "kind"}
    assert len(value["name"]) <= 8 and 0 <= value["age"] <= 150 and value["kind"] in ("cat", "dog")


def test_a_list_of_choices(client: openai.OpenAI) -> None:
    choices = ["ham", "spam and ham", 'a "quoted" \\ line\n', "日本"]
    texts = {
        answer(client, {"type": "choice", "choices": choices}, seed, temperature=2).message.content
        for seed in range(12)
    }
    assert texts <= set(choices) and len(texts) > 1


def test_any_json_object(client: openai.OpenAI) -> None:
    """A random model may never close its object; what it writes up to there is JSON's beginning."""
    for seed in range(3):
        found = answer(client, {"type": "json_object"}, seed, max_tokens=40)
        assert found.message.content.lstrip().startswith("{")
        if found.finish_reason == "stop":
            assert isinstance(json.loads(found.message.content), dict)


def test_constrained_and_free_answers_share_a_batch(client: openai.OpenAI) -> None:
    form = {"type": "choice", "choices": ["ham", "spam"]}
    pieces = client.chat.completions.create(  # type: ignore[call-overload]
        model="instruct", messages=QUESTION, response_format=form, stream=True, n=3, max_tokens=20
    )
    texts = ["", "", ""]
    for chunk in pieces:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert set(texts) <= {"ham", "spam"}


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "https://example.org/schema"}}},
        {"type": "choice"},
        {"type": "choice", "choices": []},
        {"type": "grammar"},
    ],
)
def test_forms_that_cannot_be_are_refused(client: openai.OpenAI, form: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError, match="response_format"):
        answer(client, form, 0)
