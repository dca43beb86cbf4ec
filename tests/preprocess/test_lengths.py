"""Texts that are longer than their training reads: counted as the training counts them, and refused in bulk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm.common.errors import InputError
from llm.config import SPLITS, Params, parse_params
from llm.data.examples import Pair, pair_examples, too_long_pairs
from llm.preprocess import lengths
from llm.preprocess.lengths import Limit, TooLong
from llm.preprocess.supervised import Row, SplitRows
from llm.tokenizer.conversation import ConversationEncoder
from llm.tokenizer.prompts import encode_prompt, stop_token
from tests.conftest import ROOT
from tests.datasets import message_rows
from tests.helpers import tiny_tokenizer

CONTEXT = Limit(60, "model.context_length")


def shipped_params(**pretrain: Any) -> Params:
    params = parse_params(yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8")))
    return params.model_copy(update={"pretrain": params.pretrain.model_copy(update=pretrain)})


def split(*parts: list[Row]) -> SplitRows:
    return SplitRows(dict(zip(SPLITS, parts, strict=True)), 0, {"val": 0, "test": 0})


def pair_row(pair: Pair) -> Row:
    return Row(pair._asdict(), pair.instruction, pair.instruction, pair.output, "", None)


@pytest.mark.parametrize("template", ["chatml", "alpaca", "llama3"])
def test_pairs_are_counted_as_the_training_cuts_and_drops_them(template: Any) -> None:
    tokenizer = tiny_tokenizer()
    prompt = len(encode_prompt(tokenizer, template, "a" * 20))
    pairs = [Pair("a" * 20, "", "b" * n, "") for n in range(1, 12)]
    pairs += [Pair("a" * n, "", "b", "") for n in range(20, 60)]
    encoder = ConversationEncoder(tokenizer, template)
    for room in (1, 5, 30):
        limit = Limit(prompt + room, "model.context_length")
        rows = split([*map(pair_row, pairs)], [], [])
        count = lengths.count_pairs(rows, encoder, limit)["train"]
        examples = pair_examples(pairs, encoder, limit.tokens)
        cut = sum(example.ids[-1] != stop_token(tokenizer, template) for example in examples)
        assert count == TooLong(len(pairs), cut, len(pairs) - len(examples))
        said = too_long_pairs(examples, pairs)
        assert (f"{cut} cut before their end" in said) == (cut > 0)
    assert too_long_pairs(pair_examples(pairs, encoder, 10_000), pairs) == ""


@pytest.mark.parametrize(("role", "template"), [("tool", "chatml"), ("system", "alpaca")])
def test_conversations_that_a_template_cannot_write_are_named(role: str, template: Any) -> None:
    said = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    said.insert(0 if role == "system" else 2, (role, "e"))
    talk = Pair("c", "", "d", "", [{"role": role, "content": text} for role, text in said])
    rows = split([pair_row(Pair("a", "", "b", "")), pair_row(talk)], [], [])
    with pytest.raises(InputError, match=f"record 2 of train: .*{role}.* name another finetune_instruct.template"):
        lengths.count_pairs(rows, ConversationEncoder(tiny_tokenizer(), template), CONTEXT)


def test_messages_are_counted_by_split() -> None:
    rows = message_rows([("the cat " * n, "ham") for n in range(1, 11)])
    tokenizer = tiny_tokenizer()
    limit = Limit(len(tokenizer.encode("the cat " * 7)), "finetune_classify.max_length")
    counts = lengths.count_messages(split(rows, rows[:7], rows[7:]), tokenizer, limit)
    assert counts == {"train": TooLong(10, 3, 0), "val": TooLong(7, 0, 0), "test": TooLong(3, 3, 0)}


def test_few_are_said_and_many_refused() -> None:
    none = {"train": TooLong(100, 0, 0), "val": TooLong(10, 0, 0)}
    assert lengths.check_lengths("instructions", none, CONTEXT, 0.0) is None
    few = none | {"train": TooLong(100, 4, 1)}
    line = "data.instructions: longer than model.context_length (60 tokens): 4 cut and 1 dropped of 100 in train"
    assert lengths.check_lengths("instructions", few, CONTEXT, 0.05) == line
    with pytest.raises(InputError) as caught:
        lengths.check_lengths("instructions", few, CONTEXT, 0.04)
    assert str(caught.value) == (
        f"{line}; that is 5.0% of train (expected at most 4.0%, tokenize.max_too_long); raise model.context_length, "
        "take shorter texts or raise tokenize.max_too_long"
    )
    with pytest.raises(InputError, match=r"that is 100\.0% of val"):  # nothing would be left of it
        lengths.check_lengths("instructions", none | {"val": TooLong(10, 0, 10)}, CONTEXT, 1.0)


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"n_positions": 1024}, 1024),
        ({"max_position_embeddings": 2048}, 2048),
        ({"text_config": {"max_position_embeddings": 512}}, 512),
        ({"gpt": {"context_length": 64}}, 64),
        ({"model_type": "unknown"}, None),
    ],
)
def test_the_context_of_open_weights(tmp_path: Path, config: dict[str, Any], length: int | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert lengths.context_length(shipped_params(init=str(tmp_path))) == length
    assert lengths.context_length(shipped_params()) == shipped_params().model.context_length


def test_messages_are_limited_by_the_context_too() -> None:
    params = shipped_params()
    assert lengths.finetuning_limits(params)[0] == Limit(128, "finetune_classify.max_length")
    short = params.model_copy(update={"model": params.model.model_copy(update={"context_length": 64})})
    assert lengths.finetuning_limits(short) == (Limit(64, "model.context_length"), Limit(64, "model.context_length"))
