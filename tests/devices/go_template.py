"""Rendering of Go templates, as far as Ollama's own and ours need it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[()]|:=|=|,|[^\s(),=:]+')
FUNCTIONS: dict[str, Any] = {
    "eq": lambda a, *others: a in others,
    "ne": lambda a, b: a != b,
    "not": lambda a: not a,
    "len": len,
    "slice": lambda rows, start: rows[start:],
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "or": lambda *values: next((value for value in values if value), values[-1]),
}


def render(template: str, data: Mapping[str, Any]) -> str:
    """Return the text of a template; a construct that is not known raises an error."""
    parts = re.split(r"\{\{(-?.*?-?)\}\}", template, flags=re.DOTALL)
    for i in range(1, len(parts), 2):
        if parts[i].startswith("- "):
            parts[i], parts[i - 1] = parts[i][1:], parts[i - 1].rstrip()
        if parts[i].endswith(" -"):
            parts[i], parts[i + 1] = parts[i][:-1], parts[i + 1].lstrip()
    nodes, rest = _parse(parts, 0, ())
    assert rest == len(parts)
    out: list[str] = []
    _run(nodes, data, {"$": data}, out)
    return "".join(out)


def _parse(parts: list[str], at: int, ends: tuple[str, ...]) -> tuple[list[Any], int]:
    """Parse until an action that begins with one of the words; `at` is then that action's place."""
    nodes: list[Any] = []
    while at < len(parts):
        if at % 2 == 0:
            nodes.append(("text", parts[at]))
            at += 1
            continue
        words = TOKEN.findall(parts[at].strip())
        if words[0] in ends:
            return nodes, at
        if words[0] in ("if", "range"):
            node, at = _block(words, parts, at)
            nodes.append(node)
        elif words[0].startswith("$") and words[1:2] in ([":="], ["="]):
            nodes.append(("set", words[0], words[2:]))
            at += 1
        else:
            nodes.append(("show", words))
            at += 1
    assert not ends, "no end"
    return nodes, at


def _block(words: list[str], parts: list[str], at: int) -> tuple[Any, int]:
    body, at = _parse(parts, at + 1, ("else", "end"))
    closing = TOKEN.findall(parts[at].strip())
    other: list[Any] = []
    if closing == ["else"]:
        other, at = _parse(parts, at + 1, ("end",))
    elif closing[0] == "else":
        node, at = _block(closing[1:], parts, at)
        return (words[0], words[1:], body, [node]), at
    return (words[0], words[1:], body, other), at + 1


def _run(nodes: list[Any], dot: Any, names: dict[str, Any], out: list[str]) -> None:
    for kind, *node in nodes:
        if kind == "text":
            out.append(node[0])
        elif kind == "set":
            names[node[0]] = _value(node[1], dot, names)
        elif kind == "show":
            out.append(str(_value(node[0], dot, names)))
        elif kind == "if":
            words, body, other = node
            _run(body if _value(words, dot, names) else other, dot, names, out)
        else:
            words, body, _ = node
            index, name = (words[0], words[2]) if ":=" in words else ("", "")
            rows = _value(words[words.index(":=") + 1 :] if name else words, dot, names)
            for i, row in enumerate(rows):
                names.update({index: i, name: row})
                _run(body, row, names, out)


def _value(words: list[str], dot: Any, names: Mapping[str, Any]) -> Any:
    values: list[Any] = []
    at = 0
    while at < len(words):
        word = words[at]
        if word == "(":
            depth, end = 1, at + 1
            while depth:
                depth += {"(": 1, ")": -1}.get(words[end], 0)
                end += 1
            values.append(_value(words[at + 1 : end - 1], dot, names))
            at = end
            continue
        values.append(_atom(word, dot, names))
        at += 1
    return values[0](*values[1:]) if callable(values[0]) else values[0]


def _atom(word: str, dot: Any, names: Mapping[str, Any]) -> Any:
    if word.startswith('"'):
        return json.loads(word)
    if word.startswith("."):
        return dot.get(word[1:]) if word != "." else dot
    if word.startswith("$."):
        return names["$"].get(word[2:])
    if word.startswith("$"):
        return names[word]
    if word in ("true", "false"):
        return word == "true"
    return FUNCTIONS[word] if word in FUNCTIONS else int(word)
