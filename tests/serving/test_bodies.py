"""Random bodies after the API's own description: an error of the client's, or an answer; never one of the server's."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import requests

from tests.serving.conftest import Running

JUNK: list[Any] = [None, True, 0, -1, 2**70, 1e308, "", "\x00", "😀", "<|im_end|>", [], [[]], {}, {"a": 1}, [None]]
LEAVES: dict[str, list[Any]] = {
    "integer": [0, 1, 2, 5, 100, -1],
    "number": [0, 0.5, 1, 2, -1],
    "boolean": [True, False],
    "string": ["a", "the cat", "user", "日本"],
}


class Bodies:
    """Bodies from JSON schemas, now and then with a value of another kind."""

    def __init__(self, schemas: dict[str, Any], seed: int) -> None:
        self.schemas, self.random = schemas, random.Random(seed)

    def make(self, schema: dict[str, Any]) -> Any:
        pick = self.random
        if pick.random() < 0.03:
            return pick.choice(JUNK)
        if "$ref" in schema:
            return self.make(self.schemas[schema["$ref"].split("/")[-1]])
        if "anyOf" in schema:
            return self.make(pick.choice(schema["anyOf"]))
        if "enum" in schema:
            return pick.choice(schema["enum"])
        if "const" in schema:
            return schema["const"]
        if schema.get("type") == "array":
            return [self.make(schema.get("items", {})) for _ in range(pick.randint(0, 3))]
        if "properties" in schema:
            wanted = {
                name for name in schema["properties"] if name in schema.get("required", []) or pick.random() < 0.1
            }
            return {name: self.make(field) for name, field in schema["properties"].items() if name in wanted}
        return pick.choice(LEAVES.get(schema.get("type", ""), JUNK))


def test_no_body_is_the_servers_error(place: Path) -> None:
    running = Running(place, max_tokens=4)
    try:
        api = requests.get(f"{running.url}/openapi.json").json()
        found: Counter[int] = Counter()
        bodies = Bodies(api["components"]["schemas"], seed=5)
        with requests.Session() as session:
            for path, methods in sorted(api["paths"].items()):
                for _ in range(25 if "post" in methods and path != "/admin/reload" else 0):
                    content = methods["post"]["requestBody"]["content"]["application/json"]
                    body = bodies.make(content["schema"])
                    if isinstance(body, dict):
                        body["model"] = bodies.random.choice(["base", "instruct", "spam"])
                        body.pop("max_tokens", None)
                    answer = session.post(running.url + path, json=body)
                    assert answer.status_code < 500 and "server_error" not in answer.text, (path, body, answer.text)
                    found[answer.status_code] += 1
        assert found[200] > 10 and found[400] > 10
    finally:
        running.stop()
