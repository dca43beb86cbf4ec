"""Clean a text by the rules of `tokenize.clean`: repair it, judge it, mask personal data in it.

The rules that compare a text with others are in `clean_corpus`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

from llm.common.errors import InputError
from llm.config import CleanParams
from llm.preprocess import quality
from llm.preprocess.mask import mask
from llm.preprocess.near_duplicates import Array, signature
from llm.preprocess.text import dedup_key, normalise

INVISIBLE = re.compile(  # zero-width and bidirectional controls; joiners between letters of scripts that need them stay
    "[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufff9-\ufffb]"
    "|(?<![\u0600-\u0fff\u1000-\u109f\u1780-\u17ff])[\u200c\u200d](?![\u2190-\u21ff\u2600-\u27bf\u2b00-\u2bff\U0001f000-\U0001faff])"
)
LANGUAGE_CHARS = 1000  # of a text that the identifier reads; 200 are enough for 99.9 % of texts


class Cleaned(NamedTuple):
    """A text after the rules for a single text."""

    text: str
    changed: tuple[str, ...]  # by these rules
    removed: str | None  # by this rule
    hash: int  # of the dedup key, before masking
    signature: Array | None  # for near duplicates


def is_on(params: CleanParams) -> bool:
    return bool(active_rules(params))


def active_rules(params: CleanParams) -> list[str]:
    """Return the names of the rules that are on, in the order in which they are applied."""
    return [
        *(["repair"] if params.repair else []),
        *(["invisible"] if params.invisible else []),
        *(["languages"] if params.languages else []),
        *params.quality,
        *({"none": [], "exact": ["exact"], "near": ["exact", "near"]}[params.duplicates]),
        *(f"mask {kind}" for kind in masked_kinds(params)),
    ]


def masked_kinds(params: CleanParams) -> list[str]:
    """Return the kinds of personal data to mask, phone numbers last: parts of account numbers look like them."""
    return sorted(params.mask, key=["mail", "iban", "card", "phone"].index)


def clean_text(text: str, params: CleanParams) -> Cleaned:
    changed = []
    edits: list[tuple[str, Callable[[str], str]]] = []
    if params.repair:
        edits.append(("repair", repair))
    if params.invisible:
        edits.append(("invisible", lambda text: INVISIBLE.sub("", text)))
    for rule, edit in edits:
        if (new := edit(text)) != text:
            text = new
            changed.append(rule)
    if params.languages and language(text) not in params.languages:
        return Cleaned(text, (), "languages", 0, None)
    for rule in params.quality:
        kept = quality.RULES[rule](text, params.languages == ["en"])
        if kept is None:
            return Cleaned(text, (), rule, 0, None)
        if kept != text:
            text = kept
            changed.append(rule)
    key = b"" if params.duplicates == "none" else dedup_key(text).encode()
    signed = signature(text) if params.duplicates == "near" else None
    for kind in masked_kinds(params):
        if (new := mask(text, kind)) != text:
            text = new
            changed.append(f"mask {kind}")
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return Cleaned(text, tuple(changed), None, int.from_bytes(digest, "little"), signed)


def repair(text: str) -> str:
    """Return the text with mojibake and its like undone, and nothing else changed."""
    return normalise("".join(line if line.isascii() else _repair_line(line) for line in text.splitlines(keepends=True)))


def _repair_line(line: str) -> str:
    """Return a line as ftfy mends it, which looks at each line by itself and changes no ASCII one."""
    import ftfy

    return ftfy.fix_text(
        line, unescape_html=False, uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False
    )


def language(text: str) -> str:
    """Return the two-letter code of the most likely language."""
    import py3langid

    code: str = py3langid.classify(text[:LANGUAGE_CHARS])[0]
    return code


@cache
def known_languages() -> frozenset[str]:
    import py3langid

    return frozenset(code for code, _ in py3langid.rank("text"))


def check_packages(params: CleanParams) -> None:
    """Raise `InputError` for a rule whose package is missing, and for a language that the identifier does not know."""
    needed = {
        "repair": "ftfy" if params.repair else "",
        "duplicates": "rensa" if params.duplicates == "near" else "",
        "languages": "py3langid" if params.languages else "",
    }
    for key, name in needed.items():
        if name and find_spec(name) is None:
            raise InputError(f"tokenize.clean.{key}: {name} is missing; pip install 'textmill[clean]'")
    unknown = [code for code in params.languages if code not in known_languages()]
    if unknown:
        known = f"expected some of {', '.join(sorted(known_languages()))}"
        raise InputError(f"tokenize.clean.languages: {unknown[0]!r} is not known ({known}); correct it")
