"""Conversations and preference pairs in the forms that people have, as messages with the roles of our templates."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llm.common.errors import InputError

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "customer", "client", "instruction", "question"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bot", "chatbot", "ai", "model", "bing", "bard", "claude", "llm", "answer"),
        "assistant",
    ),
    **dict.fromkeys(("function_call", "function-call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
    **dict.fromkeys(("function_response", "function-response", "tool_response", "tool_result"), "tool"),
}
KEPT = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")  # of a message, for its template
TURN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")  # of the texts of hh-rlhf
PROMPTS = ("prompt", "question", "instruction", "query")  # columns of preference pairs

Messages = list[dict[str, Any]]


class Preference(NamedTuple):
    """Two conversations that differ in their end, of which the first was preferred."""

    chosen: Messages
    rejected: Messages


def is_conversation(value: Any) -> bool:
    """Return whether a value is a list of messages: role and content or parts, or from and value."""
    if not (isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value)):
        return False
    first = value[0]
    return ("role" in first and any(key in first for key in ("content", "parts", "tool_calls"))) or (
        "from" in first and "value" in first
    )


def is_preference(row: Mapping[str, Any]) -> bool:
    return {"chosen", "rejected"} <= row.keys()


def conversation_columns(row: Mapping[str, Any]) -> list[str]:
    """Return the columns that hold a conversation, also as JSON in a text."""
    return [name for name, value in row.items() if is_conversation(_parsed(value))]


def read_conversation(row: Mapping[str, Any], column: str, where: str) -> Messages:
    """Return the messages of a column, and behind them those of `completion` where the column is a `prompt`."""
    value = _parsed(row.get(column))
    if not is_conversation(value):
        raise InputError(
            f"{where}: expected a conversation in {column!r}, a list of role and content, found "
            f"{type(row.get(column)).__name__}; correct messages: or the row"
        )
    more: Any = _parsed(row.get("completion")) if column == "prompt" else []
    system = row.get("system")
    before = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    found = [*before, *value] if before and not _is_system(value[0]) else list(value)
    return _finished([*found, *(more if is_conversation(more) else [])], where)


def read_preference(row: Mapping[str, Any], where: str) -> Preference:
    """Return both conversations of a preference pair."""
    prompt = next((row[name] for name in PROMPTS if row.get(name)), None)
    system = row.get("system")
    before = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []

    def whole(value: Any) -> Messages:
        answer = _turns(value, "assistant", where)
        if ROLES.get(str(_role(answer[0])).lower()) != "assistant":
            return _finished(answer, where)
        if prompt is None:
            raise InputError(f"{where}: expected a question beside chosen and rejected, found none; add a prompt")
        return _finished([*before, *_turns(prompt, "user", where), *answer], where)

    return Preference(whole(row["chosen"]), whole(row["rejected"]))


def _turns(value: Any, role: str, where: str) -> Sequence[Mapping[str, Any]]:
    """Return the messages that a text or a list stands for."""
    parsed = _parsed(value)
    if is_conversation(parsed):
        return list(parsed)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: expected a text or messages, found {type(value).__name__}; correct the row")
    _, *parts = TURN.split(value)
    if not parts or not TURN.match(value):
        return [{"role": role, "content": value}]
    names = {"Human": "user", "Assistant": "assistant"}
    return [{"role": names[name], "content": text.strip()} for name, text in zip(parts[::2], parts[1::2], strict=True)]


def _parsed(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _role(message: Mapping[str, Any]) -> Any:
    return message.get("role", message.get("from"))


def _is_system(message: Mapping[str, Any]) -> bool:
    return ROLES.get(str(_role(message)).lower()) == "system"


def _finished(messages: Sequence[Mapping[str, Any]], where: str) -> Messages:
    """Return messages up to the last answer; raise `InputError` for what no conversation can be."""
    found = [_message(message, f"{where}, message {i}") for i, message in enumerate(messages, 1)]
    last = max((i for i, message in enumerate(found) if message["role"] == "assistant"), default=-1)
    if last < 0:
        raise InputError(f"{where}: expected an answer of the assistant, found none; remove the row")
    for i, message in enumerate(found[: last + 1]):
        if message["role"] == "system" and i > 0:
            raise InputError(f"{where}, message {i + 1}: expected system as the first message only; join or move it")
    first = next(message["role"] for message in found if message["role"] != "system")
    if first != "user":
        raise InputError(f"{where}: expected a conversation that begins with a question, found {first}; remove it")
    return found[: last + 1]


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f"{where}: expected role and content, found {type(message).__name__}; correct it")
    said = _role(message)
    role = ROLES.get(str(said).lower())
    if role is None:
        raise InputError(f"{where}: expected a role such as system, user, assistant, tool, found {said!r}; correct it")
    if message.get("weight") not in (None, 1):
        raise InputError(f"{where}: expected no weight, as all answers count, found {message['weight']}; remove it")
    kept = {key: message[key] for key in KEPT if message.get(key)}
    if call := message.get("function_call"):
        kept["tool_calls"] = [{"type": "function", "function": call}]
    if "tool_calls" in kept:
        kept["tool_calls"] = [_call(one, where) for one in kept["tool_calls"]]
    content = message.get("content", message.get("value", message.get("parts")))
    text = "" if content is None and "tool_calls" in kept else _text(content, where)
    if not text.strip() and "tool_calls" not in kept:
        raise InputError(f"{where}: expected text of the {role}, found none; fill it or remove the row")
    return {"role": role, "content": text} | kept


def _call(call: Any, where: str) -> dict[str, Any]:
    """Return a tool's call, whose arguments OpenAI writes as JSON in a text and templates take as they are."""
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        raise InputError(f"{where}: expected calls of tools with a function each, found {call!r:.80}; correct it")
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(function["arguments"])
        except ValueError:
            raise InputError(
                f"{where}: expected JSON as arguments, found {function['arguments']!r:.80}; correct it"
            ) from None
    return {**call, "function": function}


def _text(content: Any, where: str) -> str:
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        kinds = sorted({str(part.get("type", "other")) for part in parts if isinstance(part, Mapping)} - {"text"})
        seen = f"parts of {', '.join(kinds)}" if kinds else type(content).__name__
        raise InputError(f"{where}: expected text, found {seen}; only text is read: remove the row")
    text = "\n".join(str(text) for text in texts)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: expected Unicode text, found half a character; correct or remove the row") from None
    return text
