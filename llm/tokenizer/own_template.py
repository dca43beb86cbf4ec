"""A model's own chat template: its prompts are those of transformers, but no message can forge a turn.

transformers finds special tokens in the whole rendered text, in what a user wrote too, unless it is asked for
`sanitize_control_tokens`. Here they are broken in the messages by a character that occurs nowhere else, and made whole
again after the template's own have been found. So are added tokens that are not special and that the template writes,
such as <think> and <tool_response>, except in an assistant's message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llm.common.errors import InputError
from llm.common.sanitize import one_line
from llm.tokenizer.bpe import Tokenizer
from llm.tokenizer.chat_template import RenderError, render_chat_untrusted
from llm.tokenizer.prompts import Message, with_input

DEFAULT, TOOL_USE = "default", "tool_use"  # names of chat templates, as transformers knows them
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a message's thoughts, the first the templates'
TEXTS = ("content", "text", *REASONING)  # keys of free text, which no template compares with a word
ROLE = re.compile(r"[A-Za-z_][\w-]*")
BREAKS = [chr(point) for point in range(0xFDD0, 0xFDF0)]  # characters that no text means anything by


@dataclass(frozen=True)
class OwnTemplate:
    """The chat templates that came with a model, by name, and the tokens that they call bos_token and the like."""

    tokenizer: Tokenizer
    sources: Mapping[str, str]
    special_tokens: Mapping[str, str]

    def encode(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the tokens of a conversation; see `ConversationEncoder.encode`."""
        conversation = list(_checked(messages))
        given = {"messages": conversation, "tools": tools, **(template_kwargs or {})}
        try:
            text = json.dumps(given, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"messages: not plain JSON ({one_line(str(error))}); give texts and numbers") from None
        joint, cut = [char for char in BREAKS if char not in text][:2]
        rendered = self._render(
            {
                **self.special_tokens,
                **self._broken(template_kwargs or {}, "", joint, cut),
                "messages": [self._broken(one, str(one["role"]), joint, cut) for one in conversation],
                "tools": self._broken(tools, "", joint, cut),
                "add_generation_prompt": add_generation_prompt,
            },
            TOOL_USE if tools and TOOL_USE in self.sources else DEFAULT,
        )
        return self._encode_rendered(rendered, joint, cut)

    def _render(self, variables: Mapping[str, Any], name: str) -> str:
        if name not in self.sources:
            names = ", ".join(map(one_line, sorted(self.sources)))
            raise InputError(f"the chat template of the model has no form for chats (expected {DEFAULT}, got {names})")
        try:
            return render_chat_untrusted(self.sources[name], variables)
        except RenderError as error:
            raise InputError(f"messages: the model's chat template refuses them ({one_line(str(error))})") from None

    def _broken(self, value: Any, role: str, joint: str, cut: str, key: str = "") -> Any:
        """Return a message or another value for the template, in whose texts no token of a turn is whole."""
        if isinstance(value, str):
            text = _break(value, self._special, joint)
            if key in TEXTS and self._borders(text):
                text = f"{joint}{text}{joint}"
            return text if role == "assistant" else _break(text, self._markers, cut)
        if isinstance(value, Mapping):
            return {
                name: item if name == "role" else self._broken(item, role, joint, cut, name)
                for name, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._broken(item, role, joint, cut, key) for item in value]
        return value

    def _borders(self, text: str) -> bool:
        """Return whether a text could be a special token together with what the template writes around it."""
        starts, ends = self._special_edges
        inside = any(text in name for name in self.tokenizer.special_tokens) if text else False
        return inside or text.startswith(ends) or text.endswith(starts)

    def _encode_rendered(self, text: str, joint: str, cut: str) -> list[int]:
        """Return the tokens of a rendered conversation. `joint` is left out, and `cut` parts what it is in."""
        ids: list[int] = []
        for part in self.tokenizer.split_added(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                for piece in part.replace(joint, "").split(cut):
                    ids += self.tokenizer.encode_after(ids, piece)
        return ids

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return _any_of(self.tokenizer.special_tokens.keys() - set(self.tokenizer.user_defined))

    @cached_property
    def _special_edges(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the beginnings and the ends of special tokens."""
        names = self.tokenizer.special_tokens.keys() - set(self.tokenizer.user_defined)
        cuts = [(name[:n], name[n:]) for name in names for n in range(1, len(name))]
        return tuple({start for start, _ in cuts}), tuple({end for _, end in cuts})

    @cached_property
    def _markers(self) -> re.Pattern[str]:
        """Return the added tokens that are not special and that a template writes."""
        shown = self.tokenizer.user_defined
        return _any_of(name for name in shown if any(name in source for source in self.sources.values()))


def _checked(messages: Sequence[Message]) -> Iterator[dict[str, Any]]:
    """Yield the messages as a template takes them; raise `InputError` for what cannot be one."""
    for message in messages:
        role, content = message["role"], message.get("content")
        if not ROLE.fullmatch(role):
            raise InputError(f"messages: the role {one_line(role)!r} is no name (expected user, assistant, tool)")
        given = {key: value for key, value in message.items() if key != "input"}
        if isinstance(content, str):
            given["content"] = with_input(message)
        elif content is None and not given.get("tool_calls"):
            raise InputError(f"messages: the {role} message has no text as its content; give a string")
        thoughts = next((given[name] for name in REASONING if given.get(name) is not None), None)
        yield given if thoughts is None else {"thinking": thoughts, **given, REASONING[0]: thoughts}


def _any_of(names: Collection[str] | Iterator[str]) -> re.Pattern[str]:
    """Return an expression for the longest of the names; one of no names matches nothing."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def _break(text: str, names: re.Pattern[str], char: str) -> str:
    """Put a character behind the first of each name, also of those that overlap."""
    while names.search(text):
        text = names.sub(lambda found: f"{found[0][0]}{char}{found[0][1:]}", text)
    return text
