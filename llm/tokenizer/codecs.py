"""Byte pair encoding of plain text by tiktoken: over bytes, and over characters as SentencePiece does it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import regex
import tiktoken

Array = np.ndarray[Any, np.dtype[np.uint32]]

MAX_SPACES = 10_000  # white space in one piece; a million of it exhausts the stack of the regular expressions
LONG_SPACES = re.compile(rf"\s{{{MAX_SPACES}}}")
SPACE_MARK = "▁"  # SentencePiece's space, U+2581
BYTE_NAMES = [f"<0x{byte:02X}>" for byte in range(256)]  # SentencePiece's tokens of single bytes


def cut_spaces(text: str) -> list[str]:
    """Split a text inside runs of white space that are too long for the patterns' backtracking."""
    if len(text) <= MAX_SPACES:
        return [text]
    ends = [match.end() for match in LONG_SPACES.finditer(text)]
    return [text[start:end] for start, end in pairwise([0, *ends, len(text)])]


class Codec(Protocol):
    """A vocabulary for text without added tokens."""

    def encode(self, text: str) -> list[int]: ...

    def encode_array(self, text: str) -> Array: ...


class ByteCodec:
    """Merges over the bytes of a text; `vocab_size` and the ids from it on are no tokens of the tokenizer's."""

    def __init__(self, ranks: Sequence[bytes | None], pattern: str, vocab_size: int) -> None:
        """Make the codec of `ranks`, the bytes of each id in the order of merging."""
        self._pattern, self._vocab_size = pattern, vocab_size
        mergeable = {token: rank for rank, token in enumerate(ranks) if token is not None}
        self.missing_bytes = bytes(byte for byte in range(256) if bytes([byte]) not in mergeable)
        # tiktoken needs a token for each byte: ids beyond the vocabulary stand for the missing ones while it encodes.
        mergeable |= {bytes([byte]): vocab_size + i for i, byte in enumerate(self.missing_bytes)}
        self._encoding = tiktoken.Encoding("llm", pat_str=pattern, mergeable_ranks=mergeable, special_tokens={})

    def encode(self, text: str) -> list[int]:
        ids = []
        for part in cut_spaces(text):
            new = self._encoding.encode_ordinary(part)
            if self.missing_bytes and any(i >= self._vocab_size for i in new):
                new = self._encode_without_missing(part)
            ids += new
        return ids

    def encode_array(self, text: str) -> Array:
        arrays = []
        for part in cut_spaces(text):
            new = self._encoding.encode_to_numpy(part, disallowed_special=())
            if self.missing_bytes and (new >= self._vocab_size).any():
                new = np.array(self._encode_without_missing(part), np.uint32)
            arrays.append(new)
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def _encode_without_missing(self, text: str) -> list[int]:
        """Return the ids of a text with bytes that have no token; the rest of each piece merges across them."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # as tiktoken does
        pieces = regex.findall(self._pattern, text, flags=regex.VERSION1)
        rest = [piece.encode().translate(None, self.missing_bytes) for piece in pieces]
        return [number for piece in rest if piece for number in self._encoding._encode_single_piece(piece)]


class Pieces(NamedTuple):
    """The further part of a vocabulary of SentencePiece: characters merge, and one without a token becomes its bytes.

    `byte_ids` are the tokens of single bytes, `order` the ids of the merged pieces, the first merge first. `split` cuts
    a text before each space, so that no merge crosses one.
    """

    byte_ids: Sequence[int]
    order: Sequence[int]
    split: bool = False


class PieceCodec:
    """Merges over the characters of a text whose spaces are U+2581, made of merges over bytes.

    tiktoken merges bytes. So the bytes of each known character merge first, which gives the character wherever it
    stands, since no character's bytes begin within another's. What then is left of others are bytes.
    """

    def __init__(self, ranks: Sequence[bytes | None], pieces: Pieces) -> None:
        """Make the codec of `ranks`, the UTF-8 of each id's piece."""
        number_of = {piece: number for number, piece in enumerate(ranks) if piece is not None}
        merged = [piece for number in pieces.order if (piece := ranks[number]) is not None]
        texts = [piece.decode() for piece in merged]
        characters = {character.encode() for text in texts for character in text}
        characters |= {piece for piece in number_of if len(piece) <= 4 and len(piece.decode()) == 1}
        starts = {character[:n] for character in characters for n in range(2, len(character) + 1)}
        merges = [
            *(bytes([byte]) for byte in range(256)),
            *sorted(starts, key=lambda start: (len(start), start)),
            *merged,
        ]
        self._outputs = [
            [number_of[merge]] if merge in number_of else [pieces.byte_ids[byte] for byte in merge] for merge in merges
        ]
        self._single = np.array([output[0] for output in self._outputs], np.uint32)
        self._has_several = np.array([len(output) > 1 for output in self._outputs])
        if pieces.split:
            pattern = rf"{SPACE_MARK}?+[^{SPACE_MARK}]++|{SPACE_MARK}"
        elif any(re.search(f"[^{SPACE_MARK}]{SPACE_MARK}", text) for text in texts):
            pattern = r"(?s:.+)"
        else:  # no merge crosses the place before a space
            pattern = rf"{SPACE_MARK}*+[^{SPACE_MARK}]++|{SPACE_MARK}++"
        ranks_of = {merge: rank for rank, merge in enumerate(merges)}
        self._encoding = tiktoken.Encoding("llm", pat_str=pattern, mergeable_ranks=ranks_of, special_tokens={})

    def encode(self, text: str) -> list[int]:
        return self._outputs_of(self._encoding.encode_ordinary(text))

    def encode_array(self, text: str) -> Array:
        new = self._encoding.encode_to_numpy(text, disallowed_special=())
        if self._has_several[new].any():
            return np.array(self._outputs_of(new.tolist()), np.uint32)
        return self._single[new]

    def _outputs_of(self, merges: Iterable[int]) -> list[int]:
        return [*chain.from_iterable(map(self._outputs.__getitem__, merges))]
