"""Tokenizers: byte-level byte pair encoding, trained here by rustbpe or read from GPT-2's files, served by tiktoken.

The ids of a vocabulary trained here: first the 256 single bytes, then the merges in the order of merging, then the
special tokens. Open weights may have the special tokens elsewhere and ids without a token, but their merges too are in
the order of the ids, which is what tiktoken goes by. Vocabularies of SentencePiece merge characters; see `Pieces`.
Special tokens never come out of a user's text: one that says "<|endoftext|>" is encoded as those thirteen characters.
"""

from __future__ import annotations

import base64
import json
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import rustbpe

from llm.common.errors import InputError
from llm.common.files import read_json, read_json_object, write_atomic
from llm.tokenizer.added import FLAGS, AddedTokens
from llm.tokenizer.codecs import SPACE_MARK, ByteCodec, Codec, PieceCodec, Pieces, cut_spaces

FILE_NAME = "bpe.json"
END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")  # of a vocabulary trained here
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS) + 1  # all bytes and one merge
MAX_VOCAB_SIZE = 1_000_000  # ids beyond this are a damaged file; known vocabularies end below 300,000

# What a merge never crosses: GPT-2's expression, made possessive. A vocabulary trained here is cut the same way,
# which every other tool knows.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

TRAIN_BUFFER = 64  # texts that rustbpe holds at a time; its default of 8,192 costs much memory when texts are long


Prefix = Literal["never", "first", "always", "prepend"]


class Form(NamedTuple):
    """Differences between a foreign tokenizer and GPT-2's.

    `flags` are those of added tokens. `adds_eos`: texts end with the `eot_token`. `prefix` is the space before a text:
    at its beginning ("first") or also after each added token ("always") unless one is there, or there in any case
    ("prepend"). `strips_space`: that space is left out of a decoded text.
    """

    flags: Mapping[str, Collection[str]] = {}
    adds_eos: bool = False
    prefix: Prefix = "never"
    strips_space: bool = False
    pieces: Pieces | None = None


GPT2_FORM = Form()


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
        form: Form = GPT2_FORM,
    ) -> None:
        """Make a tokenizer of `ranks`, the bytes of each id in the order of merging; None for any other id.

        `special_tokens` are all added tokens. `eot_token` is the one that stands between texts, `bos_token` the one
        that a model expects before each text. `user_defined` are not special: they are found in any text, as Qwen's
        <think> is. The `pattern` is not used for `form.pieces`.
        """
        self.ranks = list(ranks)
        self.pattern = pattern
        self.special_tokens = special_tokens
        self.eot_token, self.bos_token = eot_token, bos_token
        self.nfc, self.user_defined, self.form = nfc, list(user_defined), form
        byte_ids = form.pieces.byte_ids if form.pieces else ()
        self.vocab_size = 1 + max(len(self.ranks) - 1, *special_tokens.values(), *byte_ids)
        self._codec: Codec
        if form.pieces is None:
            codec = ByteCodec(self.ranks, pattern, self.vocab_size)
            self._codec, self.missing_bytes = codec, codec.missing_bytes
        else:
            self._codec, self.missing_bytes = PieceCodec(self.ranks, form.pieces), b""
        self.eot = special_tokens[eot_token]
        self.bos = None if bos_token is None else special_tokens[bos_token]
        self._added = AddedTokens(special_tokens, self.user_defined, form.flags, self._normalize)
        self._added_ids = frozenset(special_tokens.values())
        self._bytes = self._bytes_of_ids()

    def encode(
        self, text: str, *, start: bool = True, parse_special: bool = False, add_special_tokens: bool = False
    ) -> list[int]:
        """Return the ids of a text, none of them a special token's unless asked for.

        `start` is False for the rest of a text of which some is encoded already. `parse_special` finds special tokens
        in the text: for rendered chat templates, never for what a user wrote. `add_special_tokens` puts the tokens
        before and behind it that the model expects there.
        """
        ids: list[int] = []
        for part in self._parts(text, start, parse_special):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._codec.encode(part)
        if add_special_tokens:
            return [*self.bos_ids, *ids, *([self.eot] if self.form.adds_eos else [])]
        return ids

    def encode_rendered(self, text: str, breaker: str, before: Sequence[int] = ()) -> list[int]:
        """Return the ids of a rendered chat template, or of a part behind other ids, special tokens among them.

        `breaker` is a character that is left out after the added tokens are found, so that a name which holds it stays
        text.
        """
        ids: list[int] = []
        for part in self._parts(text, start=not before or self._starts_behind(before), parse_special=True):
            ids += [part] if isinstance(part, int) else self._codec.encode(part.replace(breaker, ""))
        return ids

    @property
    def bos_ids(self) -> list[int]:
        """The ids before each text: one or none."""
        return [] if self.bos is None else [self.bos]

    def encode_parts(self, parts: Iterable[int | str]) -> list[int]:
        """Return the ids of a prompt of tokens and texts; neighbouring texts are one. No text holds a special token."""
        ids: list[int] = []
        text = ""
        for part in [*parts, -1]:
            if isinstance(part, str):
                text += part
                continue
            ids += self.encode_after(ids, text)
            ids, text = [*ids, part], ""
        return ids[:-1]

    def encode_after(self, ids: Sequence[int], text: str) -> list[int]:
        """Return the ids of a text that goes on behind others; it gets a space only where another text would."""
        return self.encode(text, start=not ids or self._starts_behind(ids))

    def _starts_behind(self, ids: Sequence[int]) -> bool:
        """Return whether a text behind these ids begins as one that stands alone."""
        return ids[-1] in self._added_ids and self.form.prefix != "first"

    def encode_array(self, text: str, *, start: bool = True) -> np.ndarray[Any, np.dtype[np.uint32]]:
        """Return the ids of `encode` without a Python list: much smaller for long texts."""
        arrays = [
            np.array([part], np.uint32) if isinstance(part, int) else self._codec.encode_array(part)
            for part in self._parts(text, start)
        ]
        return np.concatenate(arrays) if arrays else np.zeros(0, np.uint32)

    def _parts(self, text: str, start: bool, parse_special: bool = False) -> Iterator[int | str]:
        """Yield the added tokens of a text, and the text between them as the codec takes it."""
        prefix, space = self.form.prefix, " " if self.form.pieces is None else SPACE_MARK
        begins = start
        for part in self._added.split(text, start=start, parse_special=parse_special):
            if isinstance(part, int):
                yield part
                begins = prefix == "always"
            else:
                text = part if self.form.pieces is None else part.replace(" ", SPACE_MARK)
                yield space + text if begins and prefix in ("first", "always") and text[:1] != space else text
                begins = False

    def _normalize(self, text: str, start: bool) -> str:
        if self.form.pieces is not None and self.form.prefix in ("prepend", "never"):
            text = text.replace(" ", SPACE_MARK)
        if self.form.prefix == "prepend" and start:
            text = SPACE_MARK + text
        return unicodedata.normalize("NFC", text) if self.nfc else text

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; bytes that are no UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids, start=True).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int], *, start: bool = False) -> bytes:
        """Return the bytes of ids; unused ones, such as spare rows of an open model's embedding, give none.

        `start`: a text begins with them, so a space that the tokenizer put there is left out.
        """
        text = b"".join([self._bytes[i] for i in ids if i < self.vocab_size])
        return text[1:] if start and self.form.strips_space and text.startswith(b" ") else text

    def _bytes_of_ids(self) -> list[bytes]:
        """Return the bytes of each id: [vocab_size]."""
        table = [token or b"" for token in self.ranks] + [b""] * (self.vocab_size - len(self.ranks))
        for name, number in self.special_tokens.items():
            found = self._normalize(name, True) if "normalized" in self.form.flags.get(name, ()) else name
            table[number] = found.encode()
        if self.form.pieces is not None:
            table = [token.replace(SPACE_MARK.encode(), b" ") for token in table]
            for byte, number in enumerate(self.form.pieces.byte_ids):
                table[number] = bytes([byte])
        return table

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self._content() == other._content()

    def _content(self) -> dict[str, Any]:
        """Return the content of `bpe.json`, by which tokenizers are equal."""
        form = self.form
        flags = {name: sorted(form.flags[name]) for name in self.special_tokens if form.flags.get(name)}
        return {
            "pattern": self.pattern,
            "special_tokens": self.special_tokens,
            "end": self.eot_token,
            "begin": self.bos_token,
            **({"nfc": True} if self.nfc else {}),
            **({"user_defined": self.user_defined} if self.user_defined else {}),
            **({"missing_bytes": list(self.missing_bytes)} if self.missing_bytes else {}),
            **({"flags": flags} if flags else {}),
            **({"adds_eos": True} if form.adds_eos else {}),
            **({"prefix": form.prefix} if form.prefix != "never" else {}),
            **({"strips_space": True} if form.strips_space else {}),
            **({"pieces": form.pieces._asdict()} if form.pieces else {}),
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
            form = _form(path, content)
            _check(path, ranks, special_tokens, (eot_token, bos_token), None if form.pieces else missing)
            return cls(ranks, pattern, special_tokens, eot_token, bos_token, nfc, user_defined, form)
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
        parts = (part for text in texts for part in cut_spaces(text))
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
        encoder = read_json(encoder_json, "the download stage fetches it")
        merges = read_merges(vocab_bpe)
        # The ids follow the merges: 256 bytes, then one token for each merge. tiktoken relies on it.
        byte_of = bytes_to_unicode()
        tokens = [*byte_of, *("".join(pair) for pair in merges), END_OF_TEXT]
        if encoder != {token: number for number, token in enumerate(tokens)}:
            raise InputError(f"{encoder_json}: does not go with {vocab_bpe}; fetch both files again")
        ranks = [bytes(byte_of[character] for character in token) for token in tokens[:-1]]
        return cls(ranks, GPT2_PATTERN, {END_OF_TEXT: len(ranks)})


def read_merges(path: Path) -> list[tuple[str, str]]:
    """Read the pairs of a merges.txt, or of GPT-2's vocab.bpe; the first line may name a version."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        return [(left, right) for left, right in pairs]
    except FileNotFoundError:
        raise InputError(f"{path}: missing; the download stage fetches it") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no list of merges ({_one_line(error)}); fetch it again") from None


def _form(path: Path, content: Mapping[str, Any]) -> Form:
    """Return the form in `bpe.json`; raise `InputError` for values that are none of it."""
    flags = {str(name): [str(flag) for flag in found] for name, found in content.get("flags", {}).items()}
    prefix, pieces = content.get("prefix", "never"), content.get("pieces")
    if prefix not in get_args(Prefix) or not {flag for found in flags.values() for flag in found} <= {*FLAGS}:
        raise InputError(f"{path}: unknown prefix or flags; write the tokenizer again")
    if pieces is not None:
        pieces = Pieces([*map(int, pieces["byte_ids"])], [*map(int, pieces["order"])], pieces["split"] is True)
        ids = [*pieces.byte_ids, *pieces.order]
        if len(pieces.byte_ids) != 256 or not all(0 <= number < MAX_VOCAB_SIZE for number in ids):
            raise InputError(f"{path}: the pieces need a token for each of 256 bytes; write the tokenizer again")
    return Form(flags, content.get("adds_eos") is True, prefix, content.get("strips_space") is True, pieces)


def _check(
    path: Path,
    ranks: list[bytes | None],
    special_tokens: dict[str, int],
    named: tuple[str | None, ...],
    missing: bytes | None,
) -> None:
    """Raise `InputError` for tokens that do not make a tokenizer; `missing` is None where characters merge."""
    tokens = [token for token in ranks if token]
    alone = {token[0] for token in tokens if len(token) == 1}
    if len(set(tokens)) != len(tokens) or (missing is not None and alone != set(range(256)) - set(missing)):
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
