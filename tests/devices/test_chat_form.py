"""Prompts of the plain form of chat templates, and of Ollama's template made of it, beside the templates' own."""

from __future__ import annotations

from typing import Any

import pytest

from llm.checkpoint.folder import CheckpointConfig
from llm.common.errors import InputError
from llm.devices.chat_form import ChatForm, Turn, chat_form
from llm.devices.ollama import go_template
from llm.tokenizer.bpe import Tokenizer
from llm.tokenizer.conversation import ConversationEncoder
from llm.tokenizer.prompts import TEMPLATES
from tests.devices.go_template import render
from tests.helpers import gpt_config, tiny_tokenizer
from tests.tokenizer.test_own_template import FORMS, made

BREAKER = "\ufdd0"
ANSWERED: list[Turn] = [("user", "Is it <b>cold</b>?"), ("assistant", "No, 'tis\nwarm."), ("user", "{{ Why }}? 日本")]
CHATS: list[list[Turn]] = [[("user", "Hi")], ANSWERED, [*ANSWERED, ("assistant", "So."), ("user", "Oh")]]
EXPRESSED = [name for name in FORMS if name != "smollm3"]


def config_of(**values: Any) -> CheckpointConfig:
    return CheckpointConfig(kind="instruct", gpt=gpt_config(), **values)


def own(name: str, source: str | None = None) -> tuple[CheckpointConfig, ConversationEncoder]:
    encoder = made(name, source).ours
    assert encoder.own is not None
    named = dict(encoder.own.special_tokens)
    return config_of(chat_templates=dict(encoder.own.sources), special_tokens=named), encoder


def ollama_prompt(template: str, chat: list[Turn], **values: Any) -> str:
    """The text that Ollama gives its runner for a chat; it names absent values too."""
    messages = [{"Role": role, "Content": text, "Thinking": ""} for role, text in chat]
    system = "\n\n".join(text for role, text in chat if role == "system")
    given = {"System": system, "Messages": messages, "Tools": None, "Think": False, "IsThinkSet": False, **values}
    return render(template, given)


def encode(encoder: ConversationEncoder, chat: list[Turn]) -> list[int]:
    dated = {} if encoder.own is None else {"date_string": "26 Jul 2024"}
    return encoder.encode([{"role": role, "content": text} for role, text in chat], template_kwargs=dated)


def same_prompts(form: ChatForm, encoder: ConversationEncoder, tokenizer: Tokenizer) -> None:
    """The form and Ollama's template write the tokens of the model's own prompts."""
    template = go_template(form)
    systems = [[], [("system", "Be brief.")]] if form.system_start is not None and encoder.own else [[]]
    for chat in [[*system, *chat] for chat in CHATS for system in systems]:
        expected = encode(encoder, chat)
        text = form.prompt(chat)
        assert tokenizer.encode_rendered(text, BREAKER) == expected
        assert ollama_prompt(template, chat) == text


@pytest.mark.parametrize("name", EXPRESSED)
def test_own_templates_of_known_families(name: str) -> None:
    config, encoder = own(name)
    same_prompts(chat_form(config, encoder.tokenizer), encoder, encoder.tokenizer)


@pytest.mark.parametrize(
    ("template", "system"), [("chatml", None), ("chatml", 'Say "{{ hi }}".'), ("llama3", "A b"), ("alpaca", None)]
)
def test_our_templates(template: Any, system: str | None) -> None:
    tokenizer = tiny_tokenizer()
    config = config_of(template=template, system=system)
    same_prompts(chat_form(config, tokenizer), config.conversations(tokenizer), tokenizer)


def test_what_a_template_does_to_texts_and_thoughts() -> None:
    thought: list[Turn] = [("user", "a"), ("assistant", "<think>\nb\n</think>\n\nc"), ("user", " d ")]
    for name, strips, thoughts in (
        ("llama3.1", ("system", "user", "assistant"), "kept"),
        ("gemma", ("user", "assistant"), "kept"),
        ("qwen3", (), "cut with line feeds"),
        ("r1-distill", (), "cut"),
        ("phi3", (), "kept"),
    ):
        config, encoder = own(name)
        form = chat_form(config, encoder.tokenizer)
        assert (form.strips, form.thoughts) == (strips, thoughts)
        text = encode(encoder, thought)
        assert encoder.tokenizer.encode_rendered(form.prompt(thought), BREAKER) == text
    qwen3 = chat_form(own("qwen3")[0], made("qwen3").ours.tokenizer)
    chat: list[Turn] = [("user", "a")]
    silent = made("qwen3").ours.encode([{"role": "user", "content": "a"}], template_kwargs={"enable_thinking": False})
    text = ollama_prompt(go_template(qwen3), chat, IsThinkSet=True)
    assert text.endswith("</think>\n\n") and made("qwen3").ours.tokenizer.encode_rendered(text, BREAKER) == silent
    assert ollama_prompt(go_template(qwen3), chat, IsThinkSet=True, Think=True) == qwen3.prompt(chat)


def test_the_date_is_the_templates_own() -> None:
    assert chat_form(own("llama3.1")[0], made("llama3.1").ours.tokenizer).dated
    with pytest.raises(InputError, match="today's date"):
        chat_form(own("smollm3")[0], made("smollm3").ours.tokenizer)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "once, in order"),
        ("{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}", "more than fixed texts"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}{{ messages[0].content }}", "once, in order"),
        ("{% for m in messages %}{{ m.content | replace('b', 'c') }}|{% endfor %}", "more than fixed texts"),
        ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", "once, in order"),
        ("{{ raise_exception('no') }}", "cannot be rendered"),
    ],
)
def test_templates_that_are_more_than_texts_are_refused(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        chat_form(own("chatml", source)[0], made("chatml", source).ours.tokenizer)


def test_a_chat_without_a_place_for_a_system_message() -> None:
    config, encoder = own("mistral-v1")
    form = chat_form(config, encoder.tokenizer)
    assert form.system_start is None
    with pytest.raises(InputError, match="no place for a system message"):
        form.prompt([("system", "a"), ("user", "b")])


def test_every_template_is_the_form_of_its_jinja() -> None:
    assert set(TEMPLATES) == {"chatml", "llama3", "alpaca"}, "test_our_templates has them all"
