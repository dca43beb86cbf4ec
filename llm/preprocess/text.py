"""Read records of data/raw, clean text, and compute the dedup keys by which no split leaks.

Two texts are equal here when their dedup keys are: the same letters and digits, whatever case, space and punctuation.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llm.common.errors import InputError
from llm.common.files import parse_json, read_json

LINE_ENDS = re.compile("[\r\v\f\x85\u2028\u2029]")
CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff\ud800-\udfff]")  # also byte order marks and lone surrogates
CLEAN = re.compile("[\t\n -~\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\U0010ffff]*")  # without any of them
NO_LETTERS_OR_DIGITS = re.compile(r"[\W_]+")


def normalise(text: str) -> str:
    r"""Return Unicode NFC, with line feeds as line ends and without control characters; tabs stay.

    >>> normalise("\ufeffcafe\u0301\r\n")
    'café\n'
    """
    if not CLEAN.fullmatch(text):  # most texts are clean, which takes a fifth of the time that mending takes
        text = CONTROLS.sub("", LINE_ENDS.sub("\n", text.replace("\r\n", "\n")))
    return unicodedata.normalize("NFC", text)


def dedup_key(text: str) -> str:
    """Return the same key for texts that differ in case, space and punctuation only.

    A text without letters and digits is its own key.

    >>> dedup_key("Free entry, CALL now!!") == dedup_key("free entry - call NOW")
    True
    """
    return NO_LETTERS_OR_DIGITS.sub("", unicodedata.normalize("NFKC", text).casefold()) or text


def key_hash(key: str | bytes, seed: int) -> int:
    """Return 64 bits that order texts at random, differently for each seed."""
    return int.from_bytes(key_hasher(seed, key.encode() if isinstance(key, str) else key).digest(), "little")


def key_hasher(seed: int, data: bytes = b"") -> hashlib.blake2b:
    """Return the hasher of `key_hash`, for a key that comes in pieces."""
    return hashlib.blake2b(data, digest_size=8, key=str(seed).encode()[:64])


def count_characters(text: str) -> dict[int, int]:
    """Return how often each code point occurs."""
    counts = np.bincount(np.frombuffer(text.encode("utf-32-le"), dtype="<u4"))
    return {int(code): int(counts[code]) for code in np.flatnonzero(counts)}


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    with open_raw(path) as file:
        for number, line in enumerate(file, start=1):
            yield parse_record(line, f"{path}: line {number}")


def open_raw(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise InputError(f"{path}: file not found; run the download stage first") from None


def read_raw_json(path: Path) -> Any:
    return read_json(path, "run the download stage again")


def parse_record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = parse_json(line)
    except ValueError:
        raise InputError(
            f"{where}: expected a JSON object, found {line[:40]!r}; run the download stage again"
        ) from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object, found {line[:40]!r}; run the download stage again")
    return record


def text_field(record: Mapping[str, Any], key: str, where: str) -> str:
    text = record.get(key)
    if not isinstance(text, str):
        raise InputError(f"{where}: expected text under {key!r}, found {text!r}; run the download stage again")
    return normalise(text)
