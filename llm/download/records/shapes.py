"""Name the forms of records that a source does not read as it stands, with the option or the source that does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm.download.content.nested import records_of
from llm.download.records.conversations import conversation_columns, is_preference

NOT_YET = "this form is not read yet: write one text, message or pair a row"


def describe_shape(row: Mapping[str, Any]) -> str | None:
    """Return the name of a form that holds more than one text, label or pair a row, and the way on, or None."""
    if is_preference(row):
        return "a preference pair (chosen and rejected); it is read under instructions: without columns stated"
    if conversations := conversation_columns(row):
        return f"a conversation ({conversations[0]}); it is read under instructions: without columns stated"
    if {"question", "context", "answers"} <= row.keys():
        path = "answers[0].text" if isinstance(row["answers"], list) else "answers.text[0]"
        return (
            "a question on a passage with its answers (SQuAD); state instruction: question, input: context, output: "
            f"{path}"
        )
    if isinstance(row.get("tokens"), list):
        return f"a list of tokens (tokens, with tags); {NOT_YET}"
    if isinstance(row.get("translation"), Mapping):
        languages = ", ".join(f"translation.{name}" for name in row["translation"])
        return f"a translation (a text for each language); state one for each column, such as {languages}"
    if any(isinstance(row.get(name), list | Mapping) for name in ("choices", "options", "endings")):
        return f"a question with a choice of answers; {NOT_YET}"
    if records := records_of(row):
        return f"a whole table or list in one object; write records: {records}"
    return None
