"""Conversations: their tokens in a model's prompt template, and the turns that fit into its context."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any, NamedTuple

from llm.common.errors import InputError
from llm.config import Template
from llm.tokenizer.bpe import Tokenizer
from llm.tokenizer.own_template import OwnTemplate
from llm.tokenizer.prompts import TEMPLATES, Message, Span

ROLES = ("system", "user", "assistant")


class Answered(NamedTuple):
    """The tokens of a conversation, and the places of its answers, each with the token that ends it."""

    ids: list[int]
    spans: list[Span]

    def cut(self, max_length: int) -> Answered | None:
        """Return as many turns as a context holds, which never reads the last token; None for not even one.

        An only answer is cut where the context ends.
        """
        fitting = [span for span in self.spans if span[1] <= max_length + 1]
        if fitting:
            return Answered(self.ids[: fitting[-1][1]], fitting)
        start = self.spans[0][0]
        if len(self.spans) > 1 or start > max_length:
            return None
        return Answered(self.ids[: max_length + 1], [(start, max_length + 1)])


@dataclass(frozen=True)
class ConversationEncoder:
    """The tokens of conversations with one model: in its own chat template, else in one of ours."""

    tokenizer: Tokenizer
    template: Template | None
    system: str | None = None  # begins a conversation that has no system message; a template of ours
    own: OwnTemplate | None = None

    def encode(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the tokens of a conversation; no text of a message becomes a special token.

        `add_generation_prompt` adds the head of the answer. `tools` are JSON schemas of functions, and
        `template_kwargs` further variables of the model's own chat template, such as enable_thinking. Raises
        `InputError` for a conversation that the template cannot express.
        """
        check_messages(messages)
        if self.own is not None:
            return self.own.encode(
                messages, add_generation_prompt=add_generation_prompt, tools=tools, template_kwargs=template_kwargs
            )
        assert self.template is not None
        self._check_ours(messages, tools, template_kwargs)
        template = TEMPLATES[self.template]
        return template.encode_messages(self.tokenizer, messages, self.system, add_generation_prompt)

    def encode_answers(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> Answered:
        """Return the tokens of a conversation up to its last answer, with the places of the answers."""
        check_messages(messages)
        if self.own is not None:
            return Answered(*self.own.encode_answers(messages, tools))
        assert self.template is not None
        self._check_ours(messages, tools, None)
        return Answered(*TEMPLATES[self.template].encode_answers(self.tokenizer, messages, self.system))

    @cached_property
    def turn_end(self) -> int | None:
        """Return the token behind an answer, if the template has one."""
        if self.own is None:
            return None if self.template is None else TEMPLATES[self.template].stop_token(self.tokenizer)
        one, two = (
            self.encode(
                [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}],
                add_generation_prompt=False,
            )[::-1]
            for answer in ("x", "1")
        )
        behind = [a for a, b in takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False))][::-1]
        special = set(self.tokenizer.special_tokens.values())
        return next((number for number in behind if number in special), None)

    def _check_ours(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        template_kwargs: Mapping[str, Any] | None,
    ) -> None:
        """Raise `InputError` for anything that a template of ours has no place for."""
        assert self.template is not None
        name = self.template
        for i, message in enumerate(messages):
            if (role := message["role"]) not in ROLES or (role == "system" and i > 0):
                place = "only as the first message" if role == "system" else f"not one of {', '.join(ROLES)}"
                raise InputError(f"messages: message {i + 1} has the role {role} ({place}); leave it out")
            if not isinstance(message.get("content"), str):
                raise InputError(f"messages: the {role} message has no text as its content; give a string")
        if messages[0]["role"] == "system" and not TEMPLATES[name].has_system:
            raise InputError(f"messages: the template {name} has no place for a system message; leave it out")
        for what, given in (("tools", tools), ("template_kwargs", template_kwargs)):
            if given:
                raise InputError(f"{what}: the template {name} has no place for them; leave them out")


def as_messages(row: Mapping[str, Any]) -> list[Message]:
    """Return the messages of a conversation, or of an instruction with its output."""
    if row.get("messages"):
        return list(row["messages"])
    return [
        {"role": "user", "content": row["instruction"], "input": row["input"]},
        {"role": "assistant", "content": row["output"]},
    ]


def check_messages(messages: Sequence[Message]) -> None:
    """Raise `InputError` for no messages, and for one without a role."""
    if not messages:
        raise InputError("messages: none (expected system, if any, then user and assistant in turn); give a question")
    for i, message in enumerate(messages, start=1):
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise InputError(f"messages: message {i} has no role (expected {', '.join(ROLES)}); name one")


def split_turns(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """Return the system messages at the beginning, and the turns: each a question with all that answers it."""
    start = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    turns: list[list[Message]] = []
    for message in messages[start:]:
        if message["role"] == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    return list(messages[:start]), turns


def fit_turns(
    messages: Sequence[Message], encode: Callable[[Sequence[Message]], list[int]], budget: int
) -> tuple[list[Message], list[int], int]:
    """Return the messages without the oldest turns beyond a budget of tokens, their tokens, and the turns left out.

    Neither the system messages nor the last turn are ever left out, and no turn is cut.
    """
    check_messages(messages)
    system, turns = split_turns(messages)

    def kept(left_out: int) -> list[Message]:
        return [*system, *(message for turn in turns[left_out:] for message in turn)]

    most = max(0, len(turns) - 1)
    left_out = bisect.bisect_left(range(most), True, key=lambda n: len(encode(kept(n))) <= budget)
    return kept(left_out), encode(kept(left_out)), left_out
