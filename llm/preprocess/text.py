"""Read records of data/raw, clean text, and compute the dedup keys by which no split leaks.

Two texts are equal here when their dedup keys are: the same letters, combining marks, digits and signs of code and
mathematics, whatever case, space and punctuation.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llm.common.errors import InputError
from llm.common.files import parse_json, read_json

LINE_ENDS = re.compile("[\r\v\f\x85\u2028\u2029]")
CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff\ud800-\udfff]")  # also byte order marks and lone surrogates
CLEAN = re.compile("[\t\n -~\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\U0010ffff]*")  # without any of them
NO_LETTERS_OR_DIGITS = re.compile(r"[\W_]+")

ASCII = frozenset(map(chr, range(128)))
PLAIN = {digit: f"^{n}" for n, digit in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")} | {"−": "-"}
NOT_PLAIN = re.compile(f"[{''.join(PLAIN)}]")
ASCII_SIGNS = r"+<=>|~^#%&/@$\\"  # count in a dedup key wherever they stand
DECORATION = re.compile(rf"([{ASCII_SIGNS}])\1{{3,}}")
LETTER, OPERATOR = r"[^\W\d_]", r"[-+*/%^=<>|&~]"
SIGNS = re.compile(  # punctuation that is a sign at its place
    rf"""[.,:] (?<=\d.) (?=\d)                                                   # 3.5, 12:30
    | \. (?<![\w.].) (?=\d)                                                      # .5
    | - (?<![\w-].) (?=\d | {LETTER}(?![\w-]))                                   # -5, -x
    | - (?: (?<=[\d)\]].) | (?<=[\d)\]]\s.) | (?<={LETTER}.)(?<![\w-]..) | (?<={LETTER}\s.)(?<![\w-]...) )
        (?=\s?(?: \d | [(\[] | {LETTER}(?![\w-]) ))                              # 5 - 3, a-b; not n-o-w
    | - (?: (?<=[+*/%^=<>|&(\[,].) | (?<=[+*/%^=<>|&(\[,]\s.) ) (?=[\w(\[])      # y = -x
    | --(?=\s?[;)])                                                              # i--;
    | \*\*? (?: (?<=[\w)\]]\*)(?=[\w(\[]) | (?<=[\w)\]]\s\*)(?=\s[\w(\[]) )        # a*b, a * b; not *now*
    | \*\* (?: (?<=[\w)\]]\*\*)(?=[\w(\[]) | (?<=[\w)\]]\s\*\*)(?=\s[\w(\[]) )     # a**b
    | ! (?: (?==) | (?<![\w!?.'")]!)(?=[\w(]) )                                  # !=, !x
    | _ (?<=\w.) (?=\w)
    | [(\[{{] (?: (?<=\w.) | (?<={OPERATOR}.) | (?<={OPERATOR}\s.) )             # f(x), a * (b + c)
    | [)\]}}] (?=\s?{OPERATOR})                                                  # (a + b) * c
    """,
    re.VERBOSE,
)
KEPT = 0xF000  # where these stand while the rest is removed: private use


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

    Signs of code and mathematics count, and a text of nothing that counts is its own key.

    >>> dedup_key("Free entry, CALL now!!") == dedup_key("free entry - call NOW")
    True
    >>> dedup_key("a + b") == dedup_key("A+B"), dedup_key("a + b") == dedup_key("a - b")
    (True, False)
    """
    # Powers come first: NFKC makes a digit of a superscript. Casefolding may undo the composition.
    folded = unicodedata.normalize("NFKC", NOT_PLAIN.sub(lambda match: PLAIN[match[0]], text)).casefold()
    folded = unicodedata.normalize("NFKC", folded).replace("i\u0307", "i")  # the small form of Turkish İ
    marked = SIGNS.sub(lambda match: "".join(chr(KEPT + ord(sign)) for sign in match[0]), folded)
    others = "" if folded.isascii() else "".join(sorted(set(folded) - ASCII))
    return no_count(others).sub("", DECORATION.sub("", marked).replace("_", " ")) or text


@lru_cache(maxsize=10_000)
def no_count(others: str) -> re.Pattern[str]:
    """Return the expression of what does not count in a dedup key of a text with these characters beyond ASCII."""
    return _no_count("".join(filter(is_mark_or_sign, others)))


@cache
def _no_count(signs: str) -> re.Pattern[str]:
    return re.compile(rf"[^\w{ASCII_SIGNS}{signs}{chr(KEPT)}-{chr(KEPT + 0x7F)}]+")


def is_mark_or_sign(character: str) -> bool:
    selects_glyph = "\ufe00" <= character <= "\ufe0f"
    return unicodedata.category(character) in ("Mn", "Mc", "Me", "Sm", "Sc") and not selects_glyph


class TextHasher:
    """A 64-bit hash of a dedup key that may come in pieces; hashes order texts at random, differently for each seed.

    48 bits are of its letters and digits, the last 16 of all of it: texts that differ in signs only are neighbours.
    """

    def __init__(self, seed: int) -> None:
        key = str(seed).encode()[:64]
        self._letters, self._all = (hashlib.blake2b(digest_size=8, key=key) for _ in range(2))
        self._has_letters = False

    def update(self, key: str) -> None:
        letters = NO_LETTERS_OR_DIGITS.sub("", key)
        self._has_letters = self._has_letters or bool(letters)
        self._letters.update(letters.encode())
        self._all.update(key.encode())

    def value(self) -> int:
        letters, whole = (int.from_bytes(hasher.digest(), "little") for hasher in (self._letters, self._all))
        return letters >> 16 << 16 | whole & 0xFFFF if self._has_letters else whole


def key_hash(key: str | bytes, seed: int) -> int:
    """Return the hash of a whole key."""
    hasher = TextHasher(seed)
    hasher.update(key if isinstance(key, str) else key.decode())
    return hasher.value()


def differ_in_signs(one: int, other: int) -> bool:
    """Return whether two hashes are of texts with the same letters and digits."""
    return one >> 16 == other >> 16


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
