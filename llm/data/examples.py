"""Read labelled messages and instruction pairs, and encode them as training examples."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from llm.common.errors import InputError
from llm.common.files import parse_json, read_json
from llm.tokenizer.bpe import Tokenizer
from llm.tokenizer.conversation import ConversationEncoder, as_messages
from llm.tokenizer.prompts import Message as ChatMessage
from llm.tokenizer.prompts import Span

Row = TypeVar("Row")
TOKENIZE = "run the tokenize stage again"


class Message(NamedTuple):
    text: str
    label: str
    slices: Mapping[str, str] = {}  # values of the source's own columns, which the report tells apart


class Pair(NamedTuple):
    """An instruction with its output: of a conversation the last question and the last answer."""

    instruction: str
    input: str
    output: str
    task: str
    messages: Sequence[ChatMessage] = ()  # all of a conversation, where there is more than a question and an answer
    tools: Sequence[Mapping[str, Any]] | None = None  # JSON schemas of functions that it may call


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
    """Tokens of one message, pair or conversation; `loss_start` is the first position whose next token is a target."""

    ids: list[int]
    loss_start: int
    label: int
    gaps: Sequence[Span] = ()  # positions from there on whose next token is no target
    is_cut: bool = False  # before the end of an answer or of the conversation
    parts: Sequence[int] = ()  # lengths of the examples that are packed in this one


def encode_message(tokenizer: Tokenizer, text: str, max_length: int) -> list[int]:
    """Return a message's tokens, cut to `max_length`; never empty, since the classifier reads the last one."""
    return tokenizer.encode(text)[:max_length] or [tokenizer.eot]


def message_examples(
    messages: Sequence[Message], tokenizer: Tokenizer, labels: Sequence[str], max_length: int
) -> list[Example]:
    ids = {label: i for i, label in enumerate(labels)}
    return [Example(encode_message(tokenizer, m.text, max_length), 0, ids[m.label]) for m in messages]


def too_long_pairs(examples: Sequence[Example], pairs: Sequence[Pair]) -> str:
    """Describe how many pairs and conversations were cut before their end, and how many dropped; nothing for none."""
    cut, dropped = sum(example.is_cut for example in examples), len(pairs) - len(examples)
    counts = [f"{n:,} {what}" for n, what in ((cut, "cut before their end"), (dropped, "dropped")) if n]
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
    encoder: ConversationEncoder,
    max_length: int,
    *,
    mask_prompt: bool = True,
    loss_on: Literal["all", "last"] = "all",
) -> list[Example]:
    """Encode pairs and conversations, as far as `max_length` + 1 tokens hold them.

    Those without room for an answer are dropped. The loss counts `all` answers, each with its end, or the `last` one;
    without `mask_prompt` it counts everything.
    """
    examples = []
    for pair in pairs:
        whole = encoder.encode_answers(as_messages(pair._asdict()), pair.tools)
        if (found := whole.cut(max_length)) is None:
            continue
        spans = found.spans if loss_on == "all" else found.spans[-1:]
        gaps = [(end - 1, start - 1) for (_, end), (start, _) in pairwise(spans)] if mask_prompt else []
        is_cut = len(found.ids) < len(whole.ids)
        examples.append(Example(found.ids, spans[0][0] - 1 if mask_prompt else 0, 0, gaps, is_cut))
    if pairs and not examples:
        raise InputError(
            f"instructions: every one of {len(pairs)} prompts is longer than the context of {max_length} tokens; "
            "take shorter pairs or a larger model.context_length"
        )
    return examples


def pack(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Pack examples into few of at most `max_length` + 1 tokens: the longest first, each where it fits most tightly."""
    bins: list[list[Example]] = []
    room: list[tuple[int, int]] = []  # of each bin, and its number, in order
    for example in sorted(examples, key=lambda example: -len(example.ids)):
        size = len(example.ids)
        i = bisect.bisect_left(room, (size, 0))
        left, number = room.pop(i) if i < len(room) else (max_length + 1, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(example)
        bisect.insort(room, (left - size, number))
    return [_packed(chosen) for chosen in bins]


def _packed(examples: Sequence[Example]) -> Example:
    """Return examples as one, in whose gaps no token of one predicts the next one's first."""
    ids: list[int] = []
    gaps: list[Span] = []
    for example in examples:
        if ids:
            gaps.append((len(ids) - 1, len(ids) + example.loss_start))
        gaps += [(len(ids) + start, len(ids) + end) for start, end in example.gaps]
        ids += example.ids
    return Example(ids, examples[0].loss_start, 0, gaps, parts=[len(example.ids) for example in examples])
