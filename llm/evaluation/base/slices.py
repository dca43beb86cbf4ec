"""Split the bits per byte of a held-out text by kind of text and by position in the context.

Shapes: N tokens, G documents or blocks of long ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from llm.evaluation.intervals import bootstrap_interval
from llm.evaluation.metrics import Interval
from llm.inference.score import token_nats
from llm.model.gpt import GPT
from llm.tokenizer.bpe import Tokenizer

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

POSITION_TOKENS = 100_000  # of the beginning, which is read once more to see each position
BLOCK_TOKENS = 2048  # a longer document is resampled in blocks of so many
FEWEST_BLOCKS = 10  # from which there is an interval
FEWEST_LETTERS = 0.6  # of a line's characters, white space aside; fewer are numbers and signs
KINDS = ("prose", "title", "speech", "question", "list", "numbers_and_signs")
ITEM = r"(?:an? |the )?\b\w[\w'’-]*"
TITLE = re.compile(r"(?:\A|(?<=\n\n))[^\n]*[^\s.!?…:;,\"”»’)\]](?=\n\n|\Z)")  # a line alone that ends without a mark
SPEECH = re.compile(
    r"\"(?:[^\"\n]|\n(?!\n))+\"|“(?:[^”\n]|\n(?!\n))+”|«(?:[^»\n]|\n(?!\n))+»|„(?:[^“”\n]|\n(?!\n))+[“”]"
)
SENTENCE = re.compile(r"(?:[^.!?…\"“”«»„\n]|\n(?!\n))+(\?)?")
LIST = re.compile(rf"(?m)^ *(?:[-*•]|\d+[.)]) [^\n]+|{ITEM}(?:, {ITEM})+(?:,? (?:and|or) {ITEM}|, {ITEM})")


class Slice(NamedTuple):
    """The bits per byte of some of a text's tokens, by model; without an interval where there is too little text."""

    name: str
    n_bytes: int
    bpb: dict[str, Interval | float]


class Slices(NamedTuple):
    """The bits per byte of a whole text and of its parts."""

    whole: Slice
    kinds: list[Slice]  # of text; they share out all bits
    positions: list[Slice]  # in the context


def slice_text(model: GPT, tokenizer: Tokenizer, ids: Ints, nats: Mapping[str, Floats]) -> Slices:
    """Return the slices of a text's tokens [N], given each model's losses of all but the first [N - 1].

    Positions are those of windows side by side: windows that overlap score their second half alone.
    """
    text = _Tokens(token_sizes(tokenizer, ids), block_numbers(ids == tokenizer.eot), _with_first(nats))
    kinds = [text.measure(*each) for each in kind_ranges(tokenizer, ids).items()]
    beginning = ids[:POSITION_TOKENS]
    positions, own = position_nats(model, beginning)
    windows = text.beginning(len(beginning), gpt=own)
    return Slices(
        whole=text.measure("all", np.ones(len(ids), dtype=bool)),
        kinds=[each for each in kinds if each.n_bytes],
        positions=[
            each for each in (windows.measure(*found) for found in position_ranges(positions).items()) if each.n_bytes
        ],
    )


class _Tokens(NamedTuple):
    """The bytes, the blocks and each model's losses of all tokens [N]; the first one costs nothing."""

    sizes: Ints
    blocks: Ints
    nats: dict[str, Floats]

    def beginning(self, n: int, **replaced: Floats) -> _Tokens:
        """Return the first tokens, with other losses of a model."""
        nats = {name: values[:n] for name, values in self.nats.items()} | replaced
        return _Tokens(self.sizes[:n], self.blocks[:n], nats)

    def measure(self, name: str, inside: NDArray[np.bool_]) -> Slice:
        sizes, blocks = self.sizes[inside], self.blocks[inside]
        bpb = {model: bpb_interval(values[inside], sizes, blocks) for model, values in self.nats.items()}
        return Slice(name, int(sizes.sum()), bpb)


def _with_first(nats: Mapping[str, Floats]) -> dict[str, Floats]:
    return {name: np.concatenate(([0.0], values)) for name, values in nats.items()}


def position_nats(model: GPT, ids: Ints) -> tuple[Ints, Floats]:
    """Return the position of each token in its window, windows side by side, and its loss there: [N], [N].

    The first token of a window has no context and costs nothing.
    """
    length = model.config.context_length
    losses = [np.zeros(0)]
    for start in range(0, len(ids), length):
        losses += [np.zeros(1), token_nats(model, torch.from_numpy(ids[start : start + length]))]
    return np.arange(len(ids)) % length, np.concatenate(losses)


def bpb_interval(nats: Floats, sizes: Ints, blocks: Ints) -> Interval | float:
    """Return the bits per byte of tokens [N], with the interval of a bootstrap of whole blocks."""
    summands: Floats = np.column_stack((nats / math.log(2), sizes)).astype(np.float64)
    if len(np.unique(blocks)) < FEWEST_BLOCKS:
        return float(_ratio(summands.sum(axis=0)))
    return bootstrap_interval(summands, blocks, _ratio)


def _ratio(sums: Floats) -> Floats:
    return np.asarray(sums[..., 0] / np.maximum(sums[..., 1], 1))


def token_sizes(tokenizer: Tokenizer, ids: Ints) -> Ints:
    """Return the bytes of each token, 0 for a separator: [N]."""
    unique, places = np.unique(ids, return_inverse=True)
    sizes = [0 if i == tokenizer.eot else len(tokenizer.decode_bytes([i])) for i in unique.tolist()]
    return np.array(sizes, dtype=np.int64)[places]


def block_numbers(ends: NDArray[np.bool_]) -> Ints:
    """Return the number of each token's document, or block of a long one, given where documents end: [N]."""
    document: Ints = np.cumsum(ends, dtype=np.int64) - ends
    starts = np.flatnonzero(np.diff(document, prepend=-1))
    within = np.arange(len(ends)) - starts[document]
    return np.cumsum(within % BLOCK_TOKENS == 0) - 1


def position_ranges(positions: Ints) -> dict[str, NDArray[np.bool_]]:
    """Return which tokens are in each range of positions; the first has none in front of it and is in no range."""
    bounds = [1, 16, 64]
    while bounds[-1] <= positions.max(initial=0):
        bounds.append(2 * bounds[-1])
    return {f"{low}-{high - 1}": (positions >= low) & (positions < high) for low, high in pairwise(bounds)}


def kind_ranges(tokenizer: Tokenizer, ids: Ints) -> dict[str, NDArray[np.bool_]]:
    """Return which tokens are in each kind of text. A token's kind is that of its last letter or sign.

    White space and separators belong to what stands before them.
    """
    pieces = [b"" if i == tokenizer.eot else tokenizer.decode_bytes([i]) for i in ids.tolist()]
    kinds = np.zeros(len(ids), dtype=np.int64)
    ends = [*np.flatnonzero(ids == tokenizer.eot).tolist(), len(ids)]
    start = 0
    for end in ends:
        if start < end:
            kinds[start:end] = _token_kinds(pieces[start:end])
        start = end + 1
    before = np.maximum.accumulate(np.where(ids == tokenizer.eot, 0, np.arange(len(ids))))
    kinds = kinds[before]
    return {name: kinds == number for number, name in enumerate(KINDS)}


def _token_kinds(pieces: list[bytes]) -> Ints:
    """Return the number of the kind of each token of one document: [N]."""
    text = b"".join(pieces).decode("utf-8", "surrogateescape")
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    escaped = (points >= 0xDC80) & (points <= 0xDCFF)  # a byte that is no UTF-8
    widths = np.where(escaped, 1, 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000))
    blank = np.array([character.isspace() for character in text], dtype=bool)
    last = np.maximum.accumulate(np.where(blank, 0, np.arange(len(text))))  # the last letter or sign up to each place
    of_bytes = np.repeat(text_kinds(text)[last], widths)
    ends = np.cumsum([len(piece) for piece in pieces])
    return of_bytes[np.maximum(ends - 1, 0)] if len(of_bytes) else np.zeros(len(pieces), dtype=np.int64)


def text_kinds(text: str) -> Ints:
    """Return the number of the kind of each character."""
    kinds = np.zeros(len(text), dtype=np.int64)

    def mark(kind: str, found: Iterable[re.Match[str]]) -> None:
        for match in found:
            kinds[match.start() : match.end()] = KINDS.index(kind)

    mark("title", TITLE.finditer(text))
    mark("speech", SPEECH.finditer(text))
    mark("question", (match for match in SENTENCE.finditer(text) if match[1]))
    mark("list", LIST.finditer(text))
    mark("numbers_and_signs", (line for line in re.finditer(r"[^\n]+", text) if not _is_wordy(line[0])))
    return kinds


def _is_wordy(line: str) -> bool:
    signs = [character for character in line if not character.isspace()]
    return sum(map(str.isalpha, signs)) >= FEWEST_LETTERS * len(signs)
