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
from itertools import takewhile
from typing import Any

from llm.common.errors import InputError
from llm.common.sanitize import one_line
from llm.tokenizer.bpe import Tokenizer
from llm.tokenizer.prompts import Message, Span, with_input

DEFAULT, TOOL_USE = "default", "tool_use"  # names of chat templates, as transformers knows them
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a message's thoughts, the first the templates'
TEXTS = ("content", "text", *REASONING)  # keys of free text, which no template compares with a word
ROLE = re.compile(r"[A-Za-z_][\w-]*")
PROBES = ("axa", "byb")  # answers that differ at both ends
PROMPT_TAIL = 6  # characters by which the end of a prompt is known again
BREAKERS = [chr(point) for point in range(0xFDD0, 0xFDF0)]  # characters that no text means anything by


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
        breaker = _breaker(messages, tools, template_kwargs)
        text = self._rendered(messages, breaker, add_generation_prompt, tools, template_kwargs)
        return self.tokenizer.encode_rendered(text, breaker)

    def encode_answers(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[list[int], list[Span]]:
        """Return the tokens of a conversation up to its last answer, and the places of all answers with their ends."""
        breaker = _breaker(messages, tools)
        whole = self._rendered(messages, breaker, False, tools)
        ids: list[int] = []
        spans: list[Span] = []
        done = 0  # characters of the rendered text
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                start, end, closing = self._answer(whole, messages, i, breaker, tools)
                # Encoded with the token that ended the last answer, as that may take the space behind it.
                ids += self.tokenizer.encode_rendered(whole[done:start], breaker, ids[:-1])[1 if spans else 0 :]
                first, done = len(ids), end
                ids += self.tokenizer.encode_rendered(whole[start:closing], breaker, ids)
                spans.append((first, len(ids)))
        return ids, spans

    def _answer(
        self, whole: str, messages: Sequence[Message], i: int, breaker: str, tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[int, int, int]:
        """Return where an answer in a rendered conversation starts, and where the token starts and ends that ends it.

        Words stand where the text changes with them. What the template writes before them is the answer's too where it
        is white space, thoughts or calls that the model has to write behind the generation prompt.
        """
        others = [
            self._rendered(
                [*messages[:i], {"role": "assistant", "content": text}, *messages[i + 1 :]], breaker, False, tools
            )
            for text in PROBES
        ]
        start = min(_n_equal(whole, other) for other in others)
        end = len(whole) - min(_n_equal(whole[::-1], other[::-1]) for other in others)
        try:
            prompt = self._rendered(messages[:i], breaker, True, tools)
        except InputError:  # a template that ends with no question
            prompt = whole
        if len(prompt) <= start and whole.startswith(prompt):
            between = whole[len(prompt) : start].replace(breaker, "").strip()
            said = messages[i].get("content") or ""
            written_by_model = messages[i].get("tool_calls") or any(messages[i].get(name) for name in REASONING)
            if not between or written_by_model or between in said:
                start = len(prompt)
        else:  # a template that writes earlier turns otherwise; the space behind the same prompt is the answer's
            spaces = start - len(whole[:start].rstrip(" \n" + breaker))
            ends = (n for n in range(spaces + 1) if whole[: start - n].endswith(prompt[-PROMPT_TAIL:]))
            start -= next(ends, 0)
        if (closing := re.compile(rf"[\s{breaker}]*({self._special.pattern})").match(whole, max(start, end))) is None:
            raise InputError(
                "messages: the model's chat template writes no special token behind an answer (expected one, as "
                "<|im_end|>), so that a model would learn no end; take one of the templates alpaca, chatml, llama3"
            )
        return start, closing.start(1), closing.end()

    def _rendered(
        self,
        messages: Sequence[Message],
        breaker: str,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of a conversation, in whose messages the breaker stands inside of every special token."""
        name = TOOL_USE if tools and TOOL_USE in self.sources else DEFAULT
        if name not in self.sources:
            names = ", ".join(map(one_line, sorted(self.sources)))
            raise InputError(f"the chat template of the model has no form for chats (expected {DEFAULT}, got {names})")
        from llm.tokenizer.chat_template import RenderError, render_chat_untrusted  # with Jinja2

        variables = {
            **self.special_tokens,
            **self._broken(template_kwargs or {}, "", breaker),
            "messages": [self._broken(one, str(one["role"]), breaker) for one in _checked(messages)],
            "tools": self._broken(tools, "", breaker),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return render_chat_untrusted(self.sources[name], variables)
        except RenderError as error:
            raise InputError(f"messages: the model's chat template refuses them ({one_line(str(error))})") from None

    def _broken(self, value: Any, role: str, breaker: str, key: str = "") -> Any:
        """Return a message or another value for the template, in whose texts no token of a turn is whole."""
        if isinstance(value, str):
            text = _break(value, self._special if role == "assistant" else self._special_and_written, breaker)
            return f"{breaker}{text}{breaker}" if key in TEXTS and self._borders(text) else text
        if isinstance(value, Mapping):
            return {
                name: item if name == "role" else self._broken(item, role, breaker, name)
                for name, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._broken(item, role, breaker, key) for item in value]
        return value

    def _borders(self, text: str) -> bool:
        """Return whether a text could be a special token together with what the template writes around it."""
        starts, ends = self._special_edges
        inside = any(text in name for name in self._names) if text else False
        return inside or text.startswith(ends) or text.endswith(starts)

    @cached_property
    def _names(self) -> set[str]:
        """Return the special tokens; added tokens that are not special are not among them."""
        return self.tokenizer.special_tokens.keys() - set(self.tokenizer.user_defined)

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return _any_of(self._names)

    @cached_property
    def _special_and_written(self) -> re.Pattern[str]:
        """Return the special tokens, and other added tokens that a template writes."""
        written = {name for name in self.tokenizer.user_defined if any(name in s for s in self.sources.values())}
        return _any_of(self._names | {name for name in written if not name.isspace()})

    @cached_property
    def _special_edges(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the beginnings and the ends of special tokens."""
        cuts = [(name[:n], name[n:]) for name in self._names for n in range(1, len(name))]
        return tuple({start for start, _ in cuts}), tuple({end for _, end in cuts})


def _breaker(messages: Sequence[Message], *others: Any) -> str:
    """Return a character that nothing given holds."""
    try:
        text = json.dumps([list(_checked(messages)), *others], ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"messages: not plain JSON ({one_line(str(error))}); give texts and numbers") from None
    breaker = next((char for char in BREAKERS if char not in text), None)
    if breaker is None:
        raise InputError("messages: hold every one of the noncharacters U+FDD0 to U+FDEF; leave one out")
    return breaker


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


def _n_equal(one: str, other: str) -> int:
    """Return how many characters at the beginning are equal."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _any_of(names: Collection[str]) -> re.Pattern[str]:
    """Return an expression for the longest of the names that have an inside; one of no names matches nothing."""
    long = sorted((name for name in names if len(name) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, long)) or "(?!)")


def _break(text: str, names: re.Pattern[str], breaker: str) -> str:
    """Put a character behind the first of each name, also of those that overlap."""
    while names.search(text):
        text = names.sub(lambda found: f"{found[0][0]}{breaker}{found[0][1:]}", text)
    return text
