"""Prompt templates against the chat templates of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llm.config import Template
from llm.tokenizer.hf import read_tokenizer_json, write_tokenizer_json
from llm.tokenizer.prompts import encode_prompt
from tests.tokenizer.originals import (
    QUESTIONS,
    imported,
    prompt_of,
    save_original,
    tokenizers_of_all_kinds,
    trained_here,
)

CHATML_TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{%- if messages[0].role == 'system' %}{%- set rest = messages[1:] %}{%- else %}\n"
    "{{- '<|im_start|>system\nYou are \"helpful\" {{ }}.<|im_end|>\n' }}{%- endif %}\n"
    "{%- if tools %}{{- raise_exception('no tools') }}{%- endif %}" + CHATML_TURNS
)
LLAMA3_TEMPLATE = (
    "{{- bos_token }}{%- for m in messages %}\n"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}\n"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
LLAMA31_TEMPLATE = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n' }}"
    "{{- 'Today Date: ' + date_string + '\n\n<|eot_id|>' }}" + LLAMA3_TEMPLATE.removeprefix("{{- bos_token }}")
)


@pytest.mark.parametrize(
    ("family", "source", "template", "system"),
    [
        ("qwen2", CHATML_TURNS, "chatml", None),
        ("qwen2", QWEN_TEMPLATE, "chatml", 'You are "helpful" {{ }}.'),
        ("llama-bpe", LLAMA3_TEMPLATE, "llama3", None),
        ("llama-bpe", LLAMA31_TEMPLATE, "llama3", "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"),
    ],
)
def test_prompts_are_the_chat_templates(
    family: str, source: str, template: Template, system: str | None, tmp_path: Path
) -> None:
    bos = {"bos_token": "<|begin_of_text|>"} if family == "llama-bpe" else {}
    other = save_original(tmp_path, family, source, **bos)
    found = read_tokenizer_json(tmp_path)
    assert found[1:] == (template, system)
    for question in QUESTIONS:
        assert encode_prompt(found.tokenizer, template, question, system=system) == prompt_of(other, question)


def test_a_template_in_the_tokenizers_config(tmp_path: Path) -> None:
    save_original(tmp_path, "qwen2")
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    several = [{"name": "tool_use", "template": "-"}, {"name": "default", "template": QWEN_TEMPLATE}]
    for chat_template in (QWEN_TEMPLATE, several):
        path.write_text(json.dumps({**config, "chat_template": chat_template}))
        assert read_tokenizer_json(tmp_path)[1:] == ("chatml", 'You are "helpful" {{ }}.')


@pytest.mark.parametrize(
    ("source", "template"),
    [
        (CHATML_TURNS + "<think>", "chatml"),  # not the same prompt, but the same form
        ("{{ undefined_function() }}<|im_start|>", "chatml"),
        ("{% for %}<|start_header_id|>", "llama3"),
        ("{{ messages[0].content }}### Instruction:", "alpaca"),
        ("[INST] {{ messages[0].content }} [/INST]", None),
        ("{{ ''.__class__.__mro__ }}", None),
    ],
)
def test_other_templates_are_told_by_their_markers(source: str, template: str | None, tmp_path: Path) -> None:
    save_original(tmp_path, "qwen2", source)
    assert read_tokenizer_json(tmp_path)[1:] == (template, None)


def test_no_template(tmp_path: Path) -> None:
    save_original(tmp_path, "qwen2")
    assert read_tokenizer_json(tmp_path)[1:] == (None, None)


BRIEF = "Be brief: it's 5 o'clock.\n\n"


@pytest.mark.parametrize(
    ("name", "template", "system"),
    [
        ("trained here", "chatml", None),
        ("trained here", "chatml", BRIEF),
        ("trained here", "alpaca", None),
        ("gpt-2", "chatml", None),  # no tokens for the markers
        ("gpt-2", "chatml", BRIEF),
        ("gpt-2", "alpaca", None),
        ("llama-bpe", "llama3", None),
        ("llama-bpe", "llama3", BRIEF),
        ("llama-bpe", "alpaca", None),
        ("qwen2", "chatml", BRIEF),
    ],
)
def test_autotokenizer_writes_the_same_prompts(
    name: str, template: Template, system: str | None, tmp_path: Path
) -> None:
    tokenizer = tokenizers_of_all_kinds()[name]
    write_tokenizer_json(tmp_path, tokenizer, template, system)
    other = AutoTokenizer.from_pretrained(tmp_path)
    for question in QUESTIONS:
        assert prompt_of(other, question) == encode_prompt(tokenizer, template, question, system=system)
        given = [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": question}]
        ids = list(other.apply_chat_template(given, add_generation_prompt=True, return_dict=False))
        if template != "alpaca":  # a system that is said takes the place of the default
            assert ids == encode_prompt(tokenizer, template, question, system="Rhyme.")
    assert read_tokenizer_json(tmp_path)[1:] == (template, system)


@pytest.mark.parametrize("template", ["chatml", "llama3", "alpaca"])
def test_chats_go_on_as_the_training_wrote_them(template: Template, tmp_path: Path) -> None:
    """A chat of several turns holds the prompt, the answer and what ends it, then the next question."""
    tokenizer = imported("llama-bpe") if template == "llama3" else trained_here()
    write_tokenizer_json(tmp_path, tokenizer, template, None)
    other = AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]
    text = other.apply_chat_template([*chat, {"role": "user", "content": "Three?"}], tokenize=False)
    prompt = other.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "alpaca": "<|endoftext|>"}[template]
    assert text.startswith(f"{prompt}Two.{end}")
    assert "Three?" in text.removeprefix(prompt)
