"""What the trainings read: token shards as windows, labelled messages, instruction pairs, and their batches.

Every `batches(step)` made here is a pure function of the seed and the step: a training that stops needs no other memory
of where it was in the data. Shapes: B rows of a batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm.common.errors import InputError
from llm.common.files import parse_json
from llm.config import Template
from llm.tokenizer.bpe import Tokenizer
from llm.tokenizer.prompts import encode_prompt, stop_token

# ---- raw text --------------------------------------------------------------------------------------------------------


# ---- examples --------------------------------------------------------------------------------------------------------


class Message(NamedTuple):
    text: str
    label: str


class Pair(NamedTuple):
    instruction: str
    input: str
    output: str
    task: str


def read_lines(path: Path) -> list[Any]:
    """What the tokenize stage has written, a JSON value a line."""
    try:
        with path.open(encoding="utf-8") as file:
            return [parse_json(line) for line in file]
    except FileNotFoundError:
        raise InputError(f"{path}: missing; run the tokenize stage first") from None
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}); run the tokenize stage again") from None


def read_messages(path: Path) -> list[Message]:
    return [Message(**row) for row in read_lines(path)]


def read_pairs(path: Path) -> list[Pair]:
    return [Pair(**row) for row in read_lines(path)]


def read_labels(folder: Path) -> list[str]:
    """All labels, in the order of the classifier's outputs."""
    [labels] = read_lines(folder / "labels.json")
    return labels


def read_quotable(tokens: Path) -> list[str]:
    """Return the kinds of data whose texts reports may show."""
    [kinds] = read_lines(tokens / "quotable.json")
    return kinds


class Example(NamedTuple):
    """Tokens of one message or pair; `loss_start` is the first position whose next token is a target."""

    ids: list[int]
    loss_start: int
    label: int


def encode_message(tokenizer: Tokenizer, text: str, max_length: int) -> list[int]:
    """A message's tokens, cut to `max_length`; never empty, since the classifier reads the last one."""
    return tokenizer.encode(text)[:max_length] or [tokenizer.eot]


def message_examples(
    messages: Sequence[Message], tokenizer: Tokenizer, labels: Sequence[str], max_length: int
) -> list[Example]:
    ids = {label: i for i, label in enumerate(labels)}
    return [Example(encode_message(tokenizer, m.text, max_length), 0, ids[m.label]) for m in messages]


def class_weights(examples: Sequence[Example], n_labels: int) -> Tensor:
    """Inverse to each label's frequency, 1 on average over the examples: [labels]."""
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
    """Prompt, response and stop token of each pair, cut to `max_length` + 1; pairs without room for a response go."""
    examples = []
    for pair in pairs:
        prompt = encode_prompt(tokenizer, template, pair.instruction, pair.input, system)
        ids = [*prompt, *tokenizer.encode(pair.output), stop_token(tokenizer, template)]
        if len(prompt) <= max_length:
            examples.append(Example(ids[: max_length + 1], len(prompt) - 1 if mask_prompt else 0, 0))
    if pairs and not examples:
        raise InputError(
            f"instructions: every one of {len(pairs)} prompts is longer than the context of {max_length} tokens; "
            "take shorter pairs or a larger model.context_length"
        )
    return examples
