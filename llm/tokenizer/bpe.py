"""Byte-level byte-pair encoding: trained here by rustbpe or read from GPT-2's files, served by tiktoken.

The ids of a vocabulary trained here: first the 256 single bytes, then the merges in the order of merging, then the
special tokens. Open weights may have the special tokens elsewhere and ids without a token, but their merges too are in
the order of the ids, which is what tiktoken goes by. Special tokens never come out of `encode`: a text that says
"<|endoftext|>" is encoded as those thirteen characters.
"""

from __future__ import annotations

import base64
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import regex
import rustbpe
import tiktoken

from llm.common.errors import InputError
from llm.common.files import read_json, read_json_object, write_atomic

FILE_NAME = "bpe.json"
END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")  # of a vocabulary trained here
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS) + 1  # all bytes and one merge
MAX_VOCAB_SIZE = 1_000_000  # ids beyond this are a damaged file; known vocabularies end below 300,000

# What a merge never crosses: GPT-2's expression, made possessive. A vocabulary trained here is cut the same way,
# which every other tool knows.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

MAX_SPACES = 10_000  # white space in one piece; a million of it exhausts the stack of the regular expressions
LONG_SPACES = re.compile(rf"\s{{{MAX_SPACES}}}")
TRAIN_BUFFER = 64  # texts that rustbpe holds at a time; its default of 8,192 costs much memory when texts are long


class Tokenizer:
    """Text to ids and back; `decode(encode(text)) == text` for every text that is valid Unicode.

    Imported ones may lose something: `nfc` composes characters first (Unicode's normalization form C), and
    `missing_bytes`, those without a token, are left out.

    >>> tokenizer = Tokenizer.train(["the cat, the hat"], vocab_size=262)
    >>> tokenizer.vocab_size, tokenizer.decode(tokenizer.encode("the cat"))
    (262, 'the cat')
    """

    def __init__(
        self,
        ranks: Sequence[bytes | None],
        pattern: str,
        special_tokens: dict[str, int],
        eot_token: str = END_OF_TEXT,
        bos_token: str | None = None,
        nfc: bool = False,
        user_defined: Sequence[str] = (),
    ) -> None:
        """Make a tokenizer of `ranks`, the bytes of each id in the order of merging; None for any other id.

        `eot_token` is the special token that stands between texts, `bos_token` the one that a model expects before
        each text, `user_defined` those that other tools show in a model's text, such as Qwen's <think>.
        """
        self.ranks = list(ranks)
        self.pattern = pattern
        self.special_tokens = special_tokens
        self.eot_token, self.bos_token = eot_token, bos_token
        self.nfc, self.user_defined = nfc, list(user_defined)
        self.vocab_size = max(len(self.ranks), *(number + 1 for number in special_tokens.values()))
        mergeable = {token: rank for rank, token in enumerate(ranks) if token is not None}
        self.missing_bytes = bytes(byte for byte in range(256) if bytes([byte]) not in mergeable)
        # tiktoken needs a token for each byte: ids beyond the vocabulary stand for the missing ones while it encodes.
        mergeable |= {bytes([byte]): self.vocab_size + i for i, byte in enumerate(self.missing_bytes)}
        self._encoding = tiktoken.Encoding(
            "llm", pat_str=pattern, mergeable_ranks=mergeable, special_tokens=special_tokens
        )
        self.eot = special_tokens[eot_token]
        self.bos = None if bos_token is None else special_tokens[bos_token]
        named = set(special_tokens.values())
        self._unused = {i for i in range(self.vocab_size) if i not in named and (i >= len(ranks) or ranks[i] is None)}

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, none of them a special token's."""
        ids = []
        for part in self._parts(text):
            new = self._encoding.encode_ordinary(part)
            if self.missing_bytes and any(i >= self.vocab_size for i in new):
                new = self._encode_without_missing(part)
            ids += new
        return ids

    def encode_array(self, text: str) -> np.ndarray[Any, np.dtype[np.uint32]]:
        """Return the ids of `encode` without a Python list: much smaller for long texts."""
        arrays = []
        for part in self._parts(text):
            new = self._encoding.encode_to_numpy(part, disallowed_special=())
            if self.missing_bytes and (new >= self.vocab_size).any():
                new = np.array(self._encode_without_missing(part), np.uint32)
            arrays.append(new)
        return np.concatenate(arrays)

    def _parts(self, text: str) -> list[str]:
        return _parts(unicodedata.normalize("NFC", text) if self.nfc else text)

    def _encode_without_missing(self, text: str) -> list[int]:
        """Return the ids of a text with bytes that have no token; the rest of each piece merges across them."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # as tiktoken does
        pieces = regex.findall(self.pattern, text, flags=regex.VERSION1)
        rest = [piece.encode().translate(None, self.missing_bytes) for piece in pieces]
        return [number for piece in rest if piece for number in self._encoding._encode_single_piece(piece)]

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Return the ids of each text."""
        with ThreadPoolExecutor(threads) as pool:  # tiktoken lets go of the interpreter lock while it encodes
            return list(pool.map(self.encode, texts))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; bytes that are no UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of ids; unused ones, such as spare rows of an open model's embedding, give none."""
        return self._encoding.decode_bytes([i for i in ids if i < self.vocab_size and i not in self._unused])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self._content() == other._content()

    def _content(self) -> dict[str, Any]:
        """Return the content of `bpe.json`, by which tokenizers are equal."""
        return {
            "pattern": self.pattern,
            "special_tokens": self.special_tokens,
            "end": self.eot_token,
            "begin": self.bos_token,
            **({"nfc": True} if self.nfc else {}),
            **({"user_defined": self.user_defined} if self.user_defined else {}),
            **({"missing_bytes": list(self.missing_bytes)} if self.missing_bytes else {}),
            "ranks": [token and base64.b64encode(token).decode("ascii") for token in self.ranks],
        }

    def save(self, folder: Path) -> None:
        """Write `bpe.json`; the same tokenizer gives the same bytes."""
        write_atomic(folder / FILE_NAME, json.dumps(self._content(), ensure_ascii=False, indent=0) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read `bpe.json`; raise `InputError` for a missing or damaged one."""
        path = folder / FILE_NAME
        content = read_json_object(path, "it is written by the tokenize stage")
        try:
            ranks = [token and base64.b64decode(token, validate=True) for token in content["ranks"]]
            special_tokens = {str(token): int(number) for token, number in content["special_tokens"].items()}
            pattern, eot_token = str(content["pattern"]), str(content["end"])
            bos_token = None if content["begin"] is None else str(content["begin"])
            nfc, missing = content.get("nfc") is True, bytes([*content.get("missing_bytes", [])])
            user_defined = [str(name) for name in content.get("user_defined", [])]
            _check(path, ranks, special_tokens, (eot_token, bos_token), missing)
            return cls(ranks, pattern, special_tokens, eot_token, bos_token, nfc, user_defined)
        except InputError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise InputError(f"{path}: not a tokenizer ({_one_line(error)}); write it again") from None

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, exact: bool = True) -> Tokenizer:
        """Train a vocabulary of exactly `vocab_size`, special tokens included; or else of the largest size that fits.

        The same texts in the same order give the same merges, whatever the number of threads.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise InputError(f"vocab_size: expected at least {MIN_VOCAB_SIZE}, found {vocab_size}")
        trainer = rustbpe.Tokenizer()
        parts = (part for text in texts for part in _parts(text))
        trainer.train_from_iterator(parts, vocab_size - len(SPECIAL_TOKENS), TRAIN_BUFFER, GPT2_PATTERN)
        ranks = [bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])]
        possible = len(ranks) + len(SPECIAL_TOKENS)
        if exact and possible < vocab_size:
            raise InputError(
                f"vocab_size: the training text is too small for {vocab_size} tokens; "
                f"it allows at most {possible}: lower vocab_size or add text"
            )
        return cls(ranks, GPT2_PATTERN, {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)})

    @classmethod
    def gpt2(cls, encoder_json: Path, vocab_bpe: Path) -> Tokenizer:
        """Build GPT-2's 50,257 tokens from the two files that OpenAI published."""
        try:
            encoder = read_json(encoder_json, "the download stage fetches it")
            merges = [tuple(line.split(" ")) for line in vocab_bpe.read_text(encoding="utf-8").splitlines()[1:] if line]
        except InputError:
            raise
        except FileNotFoundError:
            raise InputError(f"{vocab_bpe}: missing; the download stage fetches it") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{vocab_bpe}: not GPT-2's merges ({_one_line(error)}); fetch it again") from None
        # The ids follow the merges: 256 bytes, then one token for each merge. tiktoken relies on it.
        byte_of = bytes_to_unicode()
        tokens = [*byte_of, *("".join(pair) for pair in merges), END_OF_TEXT]
        if encoder != {token: number for number, token in enumerate(tokens)}:
            raise InputError(f"{encoder_json}: does not go with {vocab_bpe}; fetch both files again")
        ranks = [bytes(byte_of[character] for character in token) for token in tokens[:-1]]
        return cls(ranks, GPT2_PATTERN, {END_OF_TEXT: len(ranks)})


def _parts(text: str) -> list[str]:
    """Split a text inside runs of white space that are too long for the patterns' backtracking."""
    if len(text) <= MAX_SPACES:
        return [text]
    ends = [match.end() for match in LONG_SPACES.finditer(text)]
    return [text[start:end] for start, end in pairwise([0, *ends, len(text)])]


def _check(
    path: Path,
    ranks: list[bytes | None],
    special_tokens: dict[str, int],
    named: tuple[str | None, ...],
    missing: bytes,
) -> None:
    """Raise `InputError` for tokens that do not make a tokenizer."""
    tokens = [token for token in ranks if token]
    alone = {token[0] for token in tokens if len(token) == 1}
    if len(set(tokens)) != len(tokens) or alone != set(range(256)) - set(missing):
        raise InputError(f"{path}: the ranks must hold each byte, and nothing twice; write the tokenizer again")
    ids = list(special_tokens.values())
    if len(set(ids)) != len(ids) or any(not 0 <= i < MAX_VOCAB_SIZE or (i < len(ranks) and ranks[i]) for i in ids):
        raise InputError(
            f"{path}: a special token has the id of another token, or none below {MAX_VOCAB_SIZE:,}; "
            "write the tokenizer again"
        )
    for name in named:
        if name is not None and name not in special_tokens:
            raise InputError(f"{path}: the special token {name} is missing; write the tokenizer again")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def bytes_to_unicode() -> dict[str, int]:
    """Return the character that stands for each byte in GPT-2's files, in the order of the ids.

    Bytes that print stand for themselves; the others are shifted to the characters from 256 on, so that no token holds
    white space: the space is U+0120, a line end U+010A.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
