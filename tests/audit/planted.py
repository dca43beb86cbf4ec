"""Texts of one genre, and copies of them with some words changed."""

from __future__ import annotations

import json
import math
import random
import re
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@lru_cache
def stories() -> list[str]:
    """The documents of the sample, in the order of a fixed shuffle."""
    documents = (ROOT / "data/sample/stories.txt").read_text(encoding="utf-8").split("\n\n\n")
    random.Random(1).shuffle(documents)
    return [text.strip() for text in documents if len(text.split()) >= 40]


@lru_cache
def messages(split: str) -> list[str]:
    lines = (ROOT / "data/sample/messages.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["text"] for row in map(json.loads, lines) if row["split"] == split]


def changed(text: str, share: float, rng: random.Random, vocabulary: list[str]) -> str:
    """Replace a share of a text's words, rounded up, by others of the genre."""
    pieces = re.split(r"(\w+)", text)
    places = range(1, len(pieces), 2)
    for place in rng.sample(places, math.ceil(share * len(places))):
        pieces[place] = rng.choice([word for word in rng.sample(vocabulary, 3) if word != pieces[place]])
    return "".join(pieces)


def vocabulary(texts: list[str]) -> list[str]:
    return sorted({word for text in texts for word in re.findall(r"\w+", text)})
