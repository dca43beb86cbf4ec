"""Read labelled messages and instruction pairs, and encode them as training examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from llm.common.errors import InputError
from llm.common.files import parse_json, read_json
from llm.config import Template
from llm.tokenizer.bpe import Tokenizer
from llm.tokenizer.prompts import encode_prompt, stop_token

Row = TypeVar("Row")
TOKENIZE = "run the tokenize stage again"


class Message(NamedTuple):
    text: str
    label: str


class Pair(NamedTuple):
    instruction: str
    input: str
    output: str
    task: str


def read_lines(path: Path) -> list[Any]:
    """Read JSON Lines of the tokenize stage."""
    try:
        with path.open(encoding="utf-8") as file:
            return [parse_json(line) for line in file]
    except FileNotFoundError:
        raise InputError(f"{path}: missing; {TOKENIZE}") from None
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}); {TOKENIZE}") from None


def read_messages(path: Path) -> list[Message]:
    return [Message(**row) for row in read_lines(path)]


def read_pairs(path: Path) -> list[Pair]:
    return [Pair(**row) for row in read_lines(path)]


def read_labels(folder: Path) -> list[str]:
    """Return all labels, in the order of the classifier's outputs."""
    return read_json(folder / "labels.json", TOKENIZE)


def read_quotable(tokens: Path) -> list[str]:
    """Return the kinds of data whose texts reports may show."""
    return read_json(tokens / "quotable.json", TOKENIZE)


def first_filled(splits: Mapping[str, Sequence[Row]], folder: Path) -> tuple[str, Sequence[Row]]:
    """Return the name and the rows of the first split that has any."""
    for name, rows in splits.items():
        if rows:
            return name, rows
    raise InputError(f"{folder}: neither {' nor '.join(splits)} holds a row to evaluate on; add data")


class Example(NamedTuple):
    """Tokens of one message or pair; `loss_start` is the first position whose next token is a target."""

    ids: list[int]
    loss_start: int
    label: int


def encode_message(tokenizer: Tokenizer, text: str, max_length: int) -> list[int]:
    """Return a message's tokens, cut to `max_length`; never empty, since the classifier reads the last one."""
    return tokenizer.encode(text)[:max_length] or [tokenizer.eot]


def message_examples(
    messages: Sequence[Message], tokenizer: Tokenizer, labels: Sequence[str], max_length: int
) -> list[Example]:
    ids = {label: i for i, label in enumerate(labels)}
    return [Example(encode_message(tokenizer, m.text, max_length), 0, ids[m.label]) for m in messages]


def too_long_pairs(examples: Sequence[Example], pairs: Sequence[Pair], stop: int) -> str:
    """Describe how many pairs were cut before their stop token, and how many dropped; nothing for none."""
    cut, dropped = sum(example.ids[-1] != stop for example in examples), len(pairs) - len(examples)
    counts = [f"{n:,} {what}" for n, what in ((cut, "cut without their stop token"), (dropped, "dropped")) if n]
    return f"{' and '.join(counts)} of {len(pairs):,}" if counts else ""


def read_too_long(tokens: Path) -> dict[str, Any]:
    """Return the counts of texts that their training cuts or drops, by kind of data; there may be none."""
    path = tokens / "too_long.json"
    return read_json(path, TOKENIZE) if path.exists() else {}


def class_weights(examples: Sequence[Example], n_labels: int) -> Tensor:
    """Return weights inverse to each label's frequency, 1 on average over the examples: [labels]."""
    counts = torch.bincount(torch.tensor([example.label for example in examples]), minlength=n_labels)
    if not counts.all():
        raise InputError(f"messages: label {int(counts.argmin())} has no training message, so no class weight")
    return len(examples) / (n_labels * counts)


def pair_examples(
    pairs: Sequence[Pair],
    tokenizer: Tokenizer,
    template: Template,
    mask_prompt: bool,
    max_length: int,
    system: str | None = None,
) -> list[Example]:
    """Encode prompt, response and stop token, cut to `max_length` + 1; drop pairs without room for a response."""
    examples = []
    for pair in pairs:
        prompt = encode_prompt(tokenizer, template, pair.instruction, pair.input, system)
        ids = [*prompt, *tokenizer.encode_after(prompt, pair.output), stop_token(tokenizer, template)]
        if len(prompt) <= max_length:
            examples.append(Example(ids[: max_length + 1], len(prompt) - 1 if mask_prompt else 0, 0))
    if pairs and not examples:
        raise InputError(
            f"instructions: every one of {len(pairs)} prompts is longer than the context of {max_length} tokens; "
            "take shorter pairs or a larger model.context_length"
        )
    return examples
