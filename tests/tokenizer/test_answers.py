"""Answers in the tokens of a conversation: their words and the token that ends them, in every template."""

from __future__ import annotations

import pytest

from llm.common.errors import InputError
from llm.config import Template
from llm.tokenizer.bpe import Tokenizer
from llm.tokenizer.conversation import Answered, ConversationEncoder
from llm.tokenizer.pre_tokenizers import GPT2_PATTERN
from tests.tokenizer.originals import tokenizers_of_all_kinds
from tests.tokenizer.test_own_template import CALL, FORMS, SYSTEM, TOOL, TOOLS, Messages, made


def said(*turns: str) -> Messages:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


TALK = said("One?", "Two, says 日本.", "assistant", "user", "Three?", "Two, says 日本.")


def words(encoder: ConversationEncoder, found: Answered) -> list[str]:
    return [encoder.tokenizer.decode(found.ids[start:end]) for start, end in found.spans]


def check(encoder: ConversationEncoder, messages: Messages, end: str) -> None:
    """Hold the answers' tokens against the texts, and what stands before them against the prompts of a chat."""
    found = encoder.encode_answers(messages)
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    texts = words(encoder, found)
    assert all(text.endswith(end) for text in texts)
    known = [encoder.tokenizer.decode(encoder.tokenizer.encode(messages[i]["content"])) for i in places]
    assert [text.removesuffix(end).strip() for text in texts] == [text.strip() for text in known]
    assert len(found.ids) == found.spans[-1][1]
    for i, (start, _) in zip(places, found.spans, strict=True):
        asked, given = (encoder.tokenizer.decode(ids) for ids in (encoder.encode(messages[:i]), found.ids[:start]))
        assert given.startswith(asked) or given[-6:] == asked[-6:] or "think" in asked + given


@pytest.mark.parametrize("name", FORMS)
def test_answers_are_their_words_and_their_end_in_foreign_templates(name: str) -> None:
    encoder = made(name).ours
    end = {"qwen2.5": "<|im_end|>", "gemma": "<end_of_turn>"}.get(name.split()[0], FORMS[name].eos)
    check(encoder, TALK, end)
    check(encoder, said("Say <|im_end|> and </s>", "No <|im_end|>, </s> [INST] <|user|>", "x", " y \n"), end)
    if FORMS[name].more:
        check(encoder, [SYSTEM, *TALK], end)


@pytest.mark.parametrize(
    ("name", "template", "end"),
    [
        ("trained here", "chatml", "<|im_end|>"),
        ("qwen2", "chatml", "<|im_end|>"),
        ("trained here", "alpaca", "<|endoftext|>"),
        ("gpt-2", "alpaca", "<|endoftext|>"),
        ("llama-bpe", "llama3", "<|eot_id|>"),
    ],
)
def test_answers_are_their_words_and_their_end_in_our_templates(name: str, template: Template, end: str) -> None:
    encoder = ConversationEncoder(tokenizers_of_all_kinds()[name], template, None)
    check(encoder, TALK, end)
    one = encoder.encode_answers(said("One?", "Two."))
    prompt = encoder.encode(said("One?"))
    assert one.ids[: one.spans[0][0]] == prompt  # a single pair: the prompt, the answer and its end
    assert encoder.tokenizer.decode(one.ids[len(prompt) :]) == f"Two.{end}"


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "llama3.1"])
def test_calls_of_tools_are_answers_and_results_are_not(name: str) -> None:
    encoder = made(name).ours
    found = encoder.encode_answers([*TOOLS, {"role": "assistant", "content": "It is 21."}], tools=[TOOL])
    call, answer = words(encoder, found)
    assert CALL["function"]["name"] in call and "21" not in call and call.count("{") >= 1  # type: ignore[index]
    assert answer.strip().startswith("It is 21.")
    before = encoder.tokenizer.decode(found.ids[found.spans[0][1] : found.spans[1][0]])
    assert "degrees" in before


def test_thoughts_are_part_of_an_answer() -> None:
    encoder = made("qwen3").ours
    thinking = {"role": "assistant", "content": "Warm.", "reasoning_content": "Summer."}
    found = encoder.encode_answers([*said("Is it cold?"), thinking])
    assert words(encoder, found) == ["<think>\nSummer.\n</think>\n\nWarm.<|im_end|>"]


def test_a_template_without_an_end_is_refused() -> None:
    encoder = made("chatml", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}").ours
    with pytest.raises(InputError, match="writes no special token behind an answer"):
        encoder.encode_answers(TALK)
    bare = Tokenizer([bytes([i]) for i in range(256)], GPT2_PATTERN, {"<|endoftext|>": 256})
    single = ConversationEncoder(bare, "chatml").encode_answers(said("One?", "Two."))
    assert single.ids[-1] == 256
    with pytest.raises(InputError, match=r"no token <\|im_end\|> to end the turns .* alpaca"):
        ConversationEncoder(bare, "chatml").encode_answers(TALK)


def test_long_conversations_are_cut_behind_an_answer() -> None:
    found = Answered(list(range(30)), [(4, 10), (14, 20), (24, 30)])
    assert found.cut(29) == found
    assert found.cut(28) == Answered(list(range(20)), [(4, 10), (14, 20)])
    assert found.cut(9) == Answered(list(range(10)), [(4, 10)])
    assert found.cut(8) is None  # never in an answer
    single = Answered(list(range(10)), [(4, 10)])
    assert single.cut(6) == Answered(list(range(7)), [(4, 7)])
    assert single.cut(4) == Answered(list(range(5)), [(4, 5)])
    assert single.cut(3) is None
