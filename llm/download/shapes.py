"""Name the forms of records that no source reads yet, so that a message about one does not mislead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def describe_shape(row: Mapping[str, Any]) -> str | None:
    """Return the name of a form that holds more than one text, label or pair a row, or None."""
    if {"chosen", "rejected"} <= row.keys():
        return "a preference pair (chosen and rejected)"
    if isinstance(row.get("paragraphs"), list) or _inner(row.get("data"), "paragraphs"):
        return "nested questions on passages (SQuAD: data, paragraphs, qas)"
    if {"question", "context", "answers"} <= row.keys():
        return "a question on a passage with its answers (SQuAD)"
    for name, value in row.items():
        if _inner(value, "role") and (_inner(value, "content") or _inner(value, "parts")):
            return f"a conversation ({name}: a list of role and content)"
        if _inner(value, "from") and _inner(value, "value"):
            return f"a conversation ({name}: a list of from and value, as ShareGPT)"
    if isinstance(row.get("tokens"), list):
        return "a list of tokens (tokens, with tags)"
    if isinstance(row.get("translation"), Mapping):
        return "a translation (a text for each language)"
    if any(isinstance(row.get(name), list | Mapping) for name in ("choices", "options", "endings")):
        return "a question with a choice of answers"
    return _describe_table(row)


def _describe_table(row: Mapping[str, Any]) -> str | None:
    """Return the name of a form that holds a whole table in one object, or None."""
    values = list(row.values())
    if {"columns", "data"} <= row.keys() and isinstance(row["data"], list):
        return "a whole table in one object (columns and data, as pandas writes it)"
    if len(values) > 1 and all(isinstance(value, Mapping) and value for value in values):
        return "a whole table in one object (column by column, as pandas writes it)"
    if len(values) > 1 and all(isinstance(value, list) and len(value) > 1 for value in values):
        return "a whole table in one object (a list for each column)"
    for name, value in row.items():
        if isinstance(value, list) and len(value) > 0 and all(isinstance(each, Mapping) for each in value):
            return f"records inside one object, under the key {name!r}"
    return None


def _inner(value: Any, key: str) -> bool:
    """Return whether a value is a list of objects of which the first has the key."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and key in value[0]
