"""Prompt templates for models without a chat template of their own: one class for each form of a conversation."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from llm.common.errors import InputError
from llm.config import Template
from llm.tokenizer.bpe import END_OF_TEXT, Tokenizer

Message = Mapping[str, Any]  # role, content and perhaps input, a text that the content is about
Span = tuple[int, int]  # of tokens: the first, and the one behind the last
MARKER = re.compile(r"(<\|\w+\|>)")


class PromptTemplate(ABC):
    """A form of conversations for the model, and the same form as a chat template for other tools."""

    marker: str  # text that only chat templates of this kind have
    turn_end: str | None = None  # the token behind a response; None: the end of the text
    other_ends: tuple[str, ...] = ()  # further tokens that a model may end a response with
    has_system = True

    def encode(self, tokenizer: Tokenizer, instruction: str, input: str = "", system: str | None = None) -> list[int]:
        """Return the tokens of one question, up to where the response starts."""
        return self.encode_messages(tokenizer, [{"role": "user", "content": instruction, "input": input}], system)

    @abstractmethod
    def encode_messages(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        system: str | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Return the tokens of a conversation; no text of a message becomes a special token.

        `system` stands at the beginning unless the first message is a system message. `add_generation_prompt` adds the
        head of the response.
        """

    def encode_answers(
        self, tokenizer: Tokenizer, messages: Sequence[Message], system: str | None = None
    ) -> tuple[list[int], list[Span]]:
        """Return the tokens of a conversation up to its last answer, and the places of all answers with their ends.

        Before each answer stand the tokens that a model is given when it is asked for that answer.
        """
        stop = self.stop_token(tokenizer)
        ids: list[int] = []
        spans: list[Span] = []
        done = 0  # messages, up to the last answer
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.encode_messages(tokenizer, messages[:i], system)
            if spans:  # behind the last answer, whose tokens are those that a model writes
                answered = self.encode_messages(tokenizer, messages[:done], system, add_generation_prompt=False)
                if stop not in answered:
                    raise InputError(
                        f"{messages[i]['role']} message {i + 1}: the tokenizer has no token {self.turn_end} to end the "
                        "turns of a conversation (expected one in its vocabulary); take the template alpaca"
                    )
                prompt = prompt[len(answered) - answered[::-1].index(stop) :]
            ids += prompt
            start, done = len(ids), i + 1
            ids += [*tokenizer.encode_after(ids, self.written(message)), stop]
            spans.append((start, len(ids)))
        return ids, spans

    def written(self, message: Message) -> str:
        """Return the text of a message as the template writes it."""
        return with_input(message)

    @abstractmethod
    def jinja(self, tokenizer: Tokenizer, system: str | None) -> str:
        """Return the Jinja template that writes the same prompt, for chats of any length."""

    def stop_token(self, tokenizer: Tokenizer) -> int:
        """Return the token that ends a response in training."""
        return tokenizer.special_tokens.get(self.turn_end or tokenizer.eot_token, tokenizer.eot)

    def stop_tokens(self, tokenizer: Tokenizer) -> set[int]:
        """Return all tokens that a model may end its response with."""
        known = tokenizer.special_tokens
        return {tokenizer.eot, *(known[name] for name in (self.turn_end, *self.other_ends) if name in known)}


class AlpacaTemplate(PromptTemplate):
    """Alpaca's template (Taori et al. 2023): the instruction and the response each follow their heading."""

    marker = "### Instruction"
    has_system = False
    preamble = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )
    instruction = "\n\n### Instruction:\n"
    response = "\n\n### Response:\n"

    def encode_messages(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        system: str | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        first = messages[0]
        parts: list[int | str] = [first["content"] if first["role"] == "system" else self.preamble]
        for message in messages:
            if message["role"] == "user":
                more = f"\n\n### Input:\n{message['input']}" if message.get("input") else ""
                parts.append(f"{self.instruction}{message['content']}{more}")
            elif message["role"] == "assistant":
                parts += [f"{self.response}{message['content']}", tokenizer.eot]
        if add_generation_prompt:
            parts.append(self.response)
        return tokenizer.encode_parts([*tokenizer.bos_ids, *parts])

    def jinja(self, tokenizer: Tokenizer, system: str | None) -> str:
        preamble, instruction, response = map(_quoted, (self.preamble, self.instruction, self.response))
        content = "message['content']"
        return (
            f"{_jinja_bos(tokenizer)}"
            f"{{{{ messages[0]['content'] if messages[0]['role'] == 'system' else {preamble} }}}}"
            f"{{% for message in messages %}}{{% if message['role'] == 'user' %}}{{{{ {instruction} + {content} }}}}"
            "{% elif message['role'] == 'assistant' %}"
            f"{{{{ {response} + {content} + {_quoted(tokenizer.eot_token)} }}}}"
            f"{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {response} }}}}{{% endif %}}"
        )


class TurnsTemplate(PromptTemplate):
    """A chat of turns: `head`, the role, `middle`, the text, `tail`."""

    head: str
    middle: str
    tail: str
    strips = False  # whether white space around a message is removed

    def written(self, message: Message) -> str:
        return with_input(message).strip() if self.strips else with_input(message)

    def encode_messages(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        system: str | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        turns = [(str(message["role"]), self.written(message)) for message in messages]
        if system is not None and messages[0]["role"] != "system":
            turns.insert(0, ("system", system))
        head, middle, tail = (_marked(tokenizer, text) for text in (self.head, self.middle, self.tail))
        parts = [part for role, text in turns for part in (*head, role, *middle, text, *tail)]
        if add_generation_prompt:
            parts += [*head, "assistant", *middle]
        return tokenizer.encode_parts([*tokenizer.bos_ids, *parts])

    def jinja(self, tokenizer: Tokenizer, system: str | None) -> str:
        head, middle, tail = map(_quoted, (self.head, self.middle, self.tail))
        content = "message['content'] | trim" if self.strips else "message['content']"
        given = ""
        if system is not None:
            turn = _quoted(f"{self.head}system{self.middle}{system}{self.tail}")
            given = f"{{% if messages[0]['role'] != 'system' %}}{{{{ {turn} }}}}{{% endif %}}"
        response = _quoted(f"{self.head}assistant{self.middle}")
        return (
            f"{_jinja_bos(tokenizer)}{given}{{% for message in messages %}}"
            f"{{{{ {head} + message['role'] + {middle} + ({content}) + {tail} }}}}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{{{{ {response} }}}}{{% endif %}}"
        )


class ChatMLTemplate(TurnsTemplate):
    """OpenAI's ChatML, as Qwen and SmolLM2 use it."""

    marker = "<|im_start|>"
    turn_end = "<|im_end|>"
    other_ends = (END_OF_TEXT,)
    head, middle, tail = "<|im_start|>", "\n", "<|im_end|>\n"


class Llama3Template(TurnsTemplate):
    """Llama 3's chats."""

    marker = "<|start_header_id|>"
    turn_end = "<|eot_id|>"
    other_ends = ("<|eom_id|>", "<|end_of_text|>")
    head, middle, tail = "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"
    strips = True


TEMPLATES: dict[Template, PromptTemplate] = {
    "chatml": ChatMLTemplate(),
    "llama3": Llama3Template(),
    "alpaca": AlpacaTemplate(),
}


def encode_prompt(
    tokenizer: Tokenizer, template: Template, instruction: str, input: str = "", system: str | None = None
) -> list[int]:
    """Return the tokens of a prompt up to where the response starts; see `PromptTemplate.encode`."""
    return TEMPLATES[template].encode(tokenizer, instruction, input, system)


def stop_token(tokenizer: Tokenizer, template: Template) -> int:
    """Return the token that ends a response in training."""
    return TEMPLATES[template].stop_token(tokenizer)


def end_tokens(tokenizer: Tokenizer, template: Template | None) -> set[int]:
    """Return all tokens that a model may end its text with."""
    return {tokenizer.eot} if template is None else TEMPLATES[template].stop_tokens(tokenizer)


def with_input(message: Message) -> str:
    """Return a message's content, above its input where it has one."""
    content, more = str(message["content"]), message.get("input")
    return f"{content}\n{more}" if more else content


def _jinja_bos(tokenizer: Tokenizer) -> str:
    return "" if tokenizer.bos_token is None else f"{{{{ {_quoted(tokenizer.bos_token)} }}}}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _marked(tokenizer: Tokenizer, text: str) -> list[int | str]:
    """Split text at its markers: one token each where the tokenizer has it, else (GPT-2) the marker's characters."""
    parts = MARKER.split(text)
    return [tokenizer.special_tokens.get(part, part) if MARKER.fullmatch(part) else part for part in parts]
