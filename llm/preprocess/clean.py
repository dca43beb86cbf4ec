"""Clean the corpus before it is split: repair and filter its texts by the rules of `tokenize.clean`.

A text is a record of the corpus: a document, or a part of a million characters of a longer one. Workers repair, judge
and mask texts; duplicates are found among those that are left, in the order of the corpus.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from llm.common.errors import InputError
from llm.config import CleanParams
from llm.preprocess import quality
from llm.preprocess.corpus import LineBatch, line_batches, read_batch
from llm.preprocess.mask import mask
from llm.preprocess.near_duplicates import NearDuplicates, signature
from llm.preprocess.text import dedup_key, normalise
from llm.preprocess.workers import Workers, show_progress

INVISIBLE = re.compile(  # zero-width and bidirectional controls; joiners between letters of scripts that need them stay
    "[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufff9-\ufffb]"
    "|(?<![\u0600-\u0fff\u1000-\u109f\u1780-\u17ff])[\u200c\u200d](?![\u2190-\u21ff\u2600-\u27bf\u2b00-\u2bff\U0001f000-\U0001faff])"
)
LANGUAGE_CHARS = 2000  # of a text that the identifier reads
SAMPLES, SAMPLE_CHARS = 3, 100  # texts of each rule in the data card


class Cleaned(NamedTuple):
    """A text after the workers' rules."""

    document: int
    text: str
    changed: tuple[str, ...]  # by these rules
    removed: str | None  # by this rule
    hash: bytes  # of the dedup key, before masking
    signature: Any  # for near duplicates


class Funnel(NamedTuple):
    """Texts and characters before the rules, and their effect rule by rule, in their order."""

    texts: int
    characters: int
    changed: dict[str, int]
    removed: dict[str, int]
    samples: dict[str, list[str]]
    left: int
    left_characters: int

    def card(self) -> dict[str, Any]:
        return self._asdict()


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
        *(f"mask {kind}" for kind in params.mask),
    ]


def clean_corpus(path: Path, out: Path, params: CleanParams, workers: Workers) -> Funnel:
    """Write the cleaned corpus to `out`, and return the funnel; memory holds a hash and a signature of each text."""
    _check_packages(params)
    rules = active_rules(params)
    changed, removed = Counter(dict.fromkeys(rules, 0)), Counter(dict.fromkeys(rules, 0))
    samples: dict[str, list[str]] = {rule: [] for rule in rules}
    texts = characters = left = left_characters = 0
    seen: set[bytes] = set()
    near = NearDuplicates() if params.duplicates == "near" else None
    batches = line_batches(path)
    results = workers.in_order(clean_batch, batches, path, params)
    with out.open("w", encoding="utf-8", newline="\n") as file:
        for batch in show_progress(results, [batch.size for batch in batches], "clean"):
            for original_length, item in batch:
                texts, characters = texts + 1, characters + original_length
                rule = item.removed
                if rule is None and params.duplicates != "none":
                    rule = "exact" if item.hash in seen else None
                    seen.add(item.hash)
                    if rule is None and near is not None and near.is_duplicate(item.signature):
                        rule = "near"
                for name in (rule,) if rule else item.changed:
                    (removed if rule else changed)[name] += 1
                    if len(samples[name]) < SAMPLES:
                        samples[name].append(item.text[:SAMPLE_CHARS])
                if rule is None:
                    left, left_characters = left + 1, left_characters + len(item.text)
                    file.write(json.dumps({"doc": item.document, "text": item.text}, ensure_ascii=False) + "\n")
    return Funnel(texts, characters, dict(changed), dict(removed), samples, left, left_characters)


def clean_batch(batch: LineBatch, path: Path, params: CleanParams) -> list[tuple[int, Cleaned]]:
    """Return the length of each text of a batch before cleaning, and the text after it."""
    return [(len(text), clean_text(document, text, params)) for document, text in read_batch(path, batch)]


def clean_text(document: int, text: str, params: CleanParams) -> Cleaned:
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
        return Cleaned(document, text, (), "languages", b"", None)
    for rule in params.quality:
        kept = quality.RULES[rule](text, params.languages == ["en"])
        if kept is None:
            return Cleaned(document, text, (), rule, b"", None)
        if kept != text:
            text = kept
            changed.append(rule)
    key = b"" if params.duplicates == "none" else dedup_key(text).encode()
    signed = signature(text) if params.duplicates == "near" else None
    for kind in params.mask:
        if (new := mask(text, kind)) != text:
            text = new
            changed.append(f"mask {kind}")
    return Cleaned(document, text, tuple(changed), None, hashlib.blake2b(key, digest_size=8).digest(), signed)


def repair(text: str) -> str:
    """Return the text with mojibake and its like undone, and nothing else changed."""
    import ftfy

    fixed = ftfy.fix_text(
        text, unescape_html=False, uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False
    )
    return normalise(fixed)


def language(text: str) -> str:
    """Return the two-letter code of the most likely language."""
    import py3langid

    code: str = py3langid.classify(text[:LANGUAGE_CHARS])[0]
    return code


@cache
def known_languages() -> frozenset[str]:
    import py3langid

    return frozenset(code for code, _ in py3langid.rank("text"))


def _check_packages(params: CleanParams) -> None:
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


def sentence(funnel: Funnel) -> str:
    """Return the effect of the rules in a line, for the terminal."""
    effects = chain(
        (f"{n:,} removed by {rule}" for rule, n in funnel.removed.items() if n),
        (f"{n:,} changed by {rule}" for rule, n in funnel.changed.items() if n),
    )
    return f"data.corpus: cleaning left {funnel.left:,} of {funnel.texts:,} texts: {', '.join(effects) or 'no change'}"
