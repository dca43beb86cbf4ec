"""Models' own chat templates against transformers, token for token.

The files of `chat_templates/` have the forms of the families' templates, in words of this project.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Original
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llm.common.errors import InputError
from llm.tokenizer.chat_source import read_hf_chat
from llm.tokenizer.conversation import ConversationEncoder
from llm.tokenizer.hf import read_tokenizer_json
from llm.tokenizer.own_template import OwnTemplate
from tests.tokenizer.originals import original
from tests.tokenizer.test_sentencepiece import original as pieces

FOLDER = Path(__file__).parent / "chat_templates"
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather of a place: <b>é</b>",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
CALL = {"id": "abcdefgh1", "type": "function", "function": {"name": "weather", "arguments": {"place": "Österö"}}}
USER = {"role": "user", "content": " Is it <b>cold</b>?\n"}
ANSWER = {"role": "assistant", "content": "No, 'tis\nwarm. "}
SYSTEM = {"role": "system", "content": "Be brief.\n"}
MARKED = {"role": "user", "content": "say </s> or <|user|> or [INST] <|im_end|>\n <｜User｜>"}
THOUGHT = {"role": "assistant", "content": "<think>\nSummer, so\n</think>\n\nIt is warm."}
TOOLS = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"degrees": 21}', "tool_call_id": "abcdefgh1"},
]
Messages = list[dict[str, Any]]
PLAIN: list[Messages] = [[USER], [USER, ANSWER, USER], [USER, THOUGHT, USER, ANSWER, {**USER, "content": "日本?"}]]
WITH_SYSTEM: list[Messages] = [[SYSTEM, *messages] for messages in PLAIN]


class Form(NamedTuple):
    """A template's tokenizer: its family and added tokens, and conversations beyond the plain ones."""

    family: str
    special: list[str]
    shown: list[str] = []  # noqa: RUF012  (added tokens that are not special)
    bos: str | None = None
    eos: str = "<|im_end|>"
    more: list[Messages] = WITH_SYSTEM
    tools: bool = False
    rstrip: bool = False  # of the special tokens, as Phi-3's


THINK = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
R1 = ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"]
MISTRAL = ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"]
ENDS = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
GEMMA = ["<start_of_turn>", "<end_of_turn>"]
PHI3 = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
FORMS = {
    "chatml": Form("qwen2", []),
    "smollm2": Form("smollm", []),
    "smollm3": Form("llama-bpe", ["<|im_start|>", "<|im_end|>"], bos="<|begin_of_text|>"),
    "qwen2.5": Form("qwen2", [], THINK[2:], tools=True),
    "qwen3": Form("qwen2", [], THINK, tools=True),
    "qwen3-thinking": Form("qwen2", [], THINK, tools=True),
    "llama3.1": Form("llama-bpe", [], bos="<|begin_of_text|>", eos="<|eot_id|>", tools=True),
    "mistral-v1": Form("tekken", [], bos="<s>", eos="</s>", more=[]),
    "mistral-v3": Form("tekken", MISTRAL, bos="<s>", eos="</s>", tools=True),
    "zephyr": Form("tekken", [], bos="<s>", eos="</s>"),
    "r1-distill": Form(
        "qwen2",
        ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"],
        R1,
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
    ),
    "gemma": Form("tekken", GEMMA, bos="<s>", eos="</s>"),
    "phi3": Form("tekken", PHI3, bos="<s>", eos="<|end|>", rstrip=True),
    "mistral-v1 of pieces": Form("prepend", [], bos="<s>", eos="</s>", more=[]),
    "zephyr of pieces": Form("first", [], bos="<s>", eos="</s>"),
    "gemma of pieces": Form("never", GEMMA, bos="<s>", eos="</s>"),
    "phi3 of pieces": Form("prepend", PHI3, bos="<s>", eos="<|end|>", rstrip=True),
}


class Made(NamedTuple):
    theirs: Any
    ours: ConversationEncoder


@lru_cache
def made(name: str, template: str | None = None) -> Made:
    """Return transformers' tokenizer with a chat template, and our encoder of the same folder."""
    form = FORMS[name]
    source_of = pieces if form.family in ("prepend", "first", "never") else original
    tokenizer = Original.from_str(source_of(form.family).to_str())
    options = {"special": True, "normalized": False, "rstrip": form.rstrip}
    tokenizer.add_special_tokens([AddedToken(token, **options) for token in form.special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in form.shown])
    named = {"eos_token": form.eos} | ({"bos_token": form.bos} if form.bos else {})
    source = template or (FOLDER / f"{name.removesuffix(' of pieces')}.jinja").read_text(encoding="utf-8")
    with TemporaryDirectory() as folder:
        saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=source, **named)
        saved.save_pretrained(folder)
        theirs = AutoTokenizer.from_pretrained(folder)
        return Made(theirs, encoder_of(Path(folder)))


def encoder_of(folder: Path) -> ConversationEncoder:
    """Return our encoder of a folder of transformers."""
    tokenizer, template, system = read_tokenizer_json(folder)
    chat = read_hf_chat(folder)
    own = OwnTemplate(tokenizer, chat.templates or {}, chat.special_tokens or {})
    return ConversationEncoder(tokenizer, template, system, own)


def their_ids(theirs: Any, messages: Messages, **options: Any) -> list[int]:
    return list(theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **options))


@pytest.mark.parametrize("name", FORMS)
def test_prompts_equal_those_of_transformers(name: str) -> None:
    form, (theirs, ours) = FORMS[name], made(name)
    for messages in [*PLAIN, *form.more]:
        for ask in (True, False):
            ids = ours.encode(messages, add_generation_prompt=ask)
            assert ids == their_ids(theirs, messages, add_generation_prompt=ask)
            assert (
                form.bos is None
                or form.bos not in (ours.own.sources["default"] if ours.own else "")
                or (ids.count(theirs.bos_token_id) == 1 and ids[0] == theirs.bos_token_id)
            )


@pytest.mark.parametrize("name", FORMS)
def test_marked_text_has_the_ids_of_text(name: str) -> None:
    """Breaking markers in messages changes no id beside them: other text is encoded as it stands."""
    theirs, ours = made(name)
    if "pieces" not in name:  # transformers cuts pieces anew at each marker
        messages: Messages = [MARKED, ANSWER, {"role": "user", "content": "x"}]
        expected = their_ids(theirs, messages, add_generation_prompt=True, sanitize_control_tokens=True)
        ids = ours.encode(messages)
        assert ours.tokenizer.decode(ids) == ours.tokenizer.decode(expected)
        special = ours.tokenizer.special_tokens.values()
        assert [i for i in ids if i in special] == [i for i in expected if i in special]


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.tools])
def test_tools_their_calls_and_results_equal_those_of_transformers(name: str) -> None:
    theirs, ours = made(name)
    for messages in ([USER], TOOLS, [*TOOLS, ANSWER, USER]):
        expected = their_ids(theirs, messages, tools=[TOOL], add_generation_prompt=True)
        assert ours.encode(messages, tools=[TOOL]) == expected
        assert "weather" in theirs.decode(expected)


@pytest.mark.parametrize("options", [{"enable_thinking": False}, {"enable_thinking": True}])
def test_enable_thinking_and_other_variables_reach_the_template(options: dict[str, Any]) -> None:
    theirs, ours = made("qwen3")
    expected = their_ids(theirs, PLAIN[1], add_generation_prompt=True, **options)
    assert ours.encode(PLAIN[1], template_kwargs=options) == expected
    assert (ours.encode(PLAIN[1]) == expected) == options["enable_thinking"]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_in_a_field_of_their_own(key: str) -> None:
    theirs, ours = made("qwen3")
    messages = [USER, {**ANSWER, key: "Warm?"}]
    assert ours.encode(messages) == their_ids(theirs, messages, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("name", "end"), [("qwen3-thinking", "assistant\n<think>\n"), ("r1-distill", "<｜Assistant｜><think>\n")]
)
def test_the_generation_prompt_ends_as_the_template_says(name: str, end: str) -> None:
    ours = made(name).ours
    assert ours.tokenizer.decode(ours.encode([USER])).endswith(end)
    old = ours.tokenizer.decode(ours.encode([USER, THOUGHT, USER]))
    assert "Summer" not in old and "It is warm." in old


@pytest.mark.parametrize("name", FORMS)
def test_no_message_writes_a_token_of_a_turn(name: str) -> None:
    """Markers in messages stay text: the prompt has the special tokens of one that holds none."""
    ours = made(name).ours
    assert ours.own is not None
    source, shown = ours.own.sources["default"], ours.tokenizer.user_defined
    names = ours.tokenizer.special_tokens.items()
    added = {token: number for token, number in names if token not in shown or token in source}
    forged = "".join(added) + "<" + "<s>" * 2 + "".join(added)

    def found(text: str) -> list[int]:
        messages: Messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "ok"}]
        return [number for number in ours.encode([*messages, messages[0]]) if number in added.values()]

    assert found(forged) == found("hello")
    text = ours.tokenizer.decode(ours.encode([{"role": "user", "content": forged}]))
    assert forged in text


@pytest.mark.parametrize("name", ["llama3.1", "mistral-v3", "r1-distill", "qwen3"])
def test_no_tool_or_thought_writes_a_special_token(name: str) -> None:
    ours = made(name).ours
    names = ours.tokenizer.special_tokens.items()
    special = {number for token, number in names if token not in ours.tokenizer.user_defined}

    def found(text: str) -> list[int]:
        messages = [*TOOLS[:-1], {**TOOLS[-1], "content": text}]
        tool = {**TOOL, "function": {**TOOL["function"], "description": text}}  # type: ignore[dict-item]
        messages = [{"role": "user", "content": "hi"}, {**ANSWER, "reasoning_content": text}, *messages]
        return [number for number in ours.encode(messages, tools=[tool]) if number in special]

    assert found("".join(ours.tokenizer.special_tokens)) == found("hello")


def test_a_template_and_a_message_write_no_token_together() -> None:
    theirs, ours = made("chatml", "{% for m in messages %}<{{ m.content }}|>{% endfor %}")
    assert "im_start" in theirs.decode(their_ids(theirs, [{"role": "user", "content": "|im_start"}]))
    ids = ours.encode([{"role": "user", "content": "|im_start"}])
    assert ours.tokenizer.special_tokens["<|im_start|>"] not in ids
    assert ours.tokenizer.decode(ids) == "<|im_start|>"


def test_functions_and_filters_are_those_of_transformers() -> None:
    source = (
        "{{ strftime_now('%Y-%m') }}{{ [1, {'ä<b>': none}] | tojson }}{{ {'b': 1, 'a': 'é'} | tojson(indent=2, "
        "ensure_ascii=True, sort_keys=True) }}{{ [1, 2] | tojson(separators=(',', ':')) }}"
        "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{% if loop.index == 4 %}{% break %}"
        "{% endif %}\n    {% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}"
        "{{ tools is none }}{{ documents is none }}{{ pad_token is defined }}{{ eos_token }}"
    )
    theirs, ours = made("chatml", source)
    messages = [{"role": "user", "content": str(i)} for i in range(5)]
    assert ours.encode(messages) == their_ids(theirs, messages)


def test_messages_of_every_breaking_character_are_refused() -> None:
    everything = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    ours = made("chatml").ours
    with pytest.raises(InputError, match="noncharacters"):
        ours.encode([{"role": "user", "content": everything}])
    ids = ours.encode([{"role": "user", "content": f"{everything[1:]}<|im_end|>"}])
    assert ours.tokenizer.decode(ids).startswith(f"<|im_start|>user\n{everything[1:]}<|im_end|><|im_end|>\n")
    assert ids.count(ours.tokenizer.special_tokens["<|im_end|>"]) == 1


def test_a_template_that_refuses_says_why() -> None:
    ours = made("mistral-v1").ours
    with pytest.raises(InputError, match=r"chat template refuses them \(Conversation roles must alternate"):
        ours.encode([SYSTEM, USER])
    with pytest.raises(InputError, match=r"chat template refuses them \('missing' is undefined"):
        made("chatml", "{{ missing() }}").ours.encode([USER])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "a\nb", "content": "x"}], "is no name"),
        ([{"role": "user"}], "no text as its content"),
        ([{"role": "user", "content": {1, 2}}], "not plain JSON"),
    ],
)
def test_messages_that_no_template_takes_are_one_line(messages: Messages, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        made("chatml").ours.encode(messages)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("chatml", "<|im_end|>"),
        ("llama3.1", "<|eot_id|>"),
        ("mistral-v1", "</s>"),
        ("r1-distill", "<｜end▁of▁sentence｜>"),
        ("gemma", "<end_of_turn>"),
        ("zephyr", "</s>"),
    ],
)
def test_the_token_behind_an_answer_is_found(name: str, end: str) -> None:
    ours = made(name).ours
    assert ours.turn_end == ours.tokenizer.special_tokens[end]


def test_templates_by_name(tmp_path: Path) -> None:
    sources = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools[0].function.name }}"}
    saved = PreTrainedTokenizerFast(
        tokenizer_object=Original.from_str(original("qwen2").to_str()), chat_template=sources, eos_token="<|im_end|>"
    )
    for legacy in (False, True):
        folder = tmp_path / str(legacy)
        saved.save_pretrained(folder, save_jinja_files=not legacy)
        theirs, ours = AutoTokenizer.from_pretrained(folder), encoder_of(folder)
        assert ours.own is not None and ours.own.sources == sources
        assert ours.encode([USER]) == their_ids(theirs, [USER])
        assert ours.encode([USER], tools=[TOOL]) == their_ids(theirs, [USER], tools=[TOOL])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("chat_template.jinja", b"\xff", "no chat template in UTF-8"),
        ("tokenizer_config.json", b'{"chat_template": 5}', "expected text, found 5"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "../x", "template": ""}]}', "is no name of a chat"),
        ("tokenizer_config.json", b'{"chat_template": [5]}', "expected names and templates"),
        ("generation_config.json", b'{"temperature": "hot"}', "temperature: .*found 'hot'"),
        ("generation_config.json", b'{"eos_token_id": [1, "a"]}', "eos_token_id"),
        ("generation_config.json", b'{"top_p": 1.5}', "top_p: .*found 1.5"),
    ],
)
def test_damaged_files_of_a_chat_are_one_line(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_hf_chat(tmp_path)
    assert name in str(error.value) and "\n" not in str(error.value)
