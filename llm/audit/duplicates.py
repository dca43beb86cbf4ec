"""Find held-out texts that the training part holds too: equal, equal in letters and digits, or nearly equal.

A text of a template is near to many training texts, leaked or not. Such texts are counted for themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import regex

from llm.preprocess.near_duplicates import BANDS, PERMUTATIONS, SIMILAR
from llm.preprocess.text import dedup_key

Kind = Literal["exact", "normalised", "near", "template"]
LEAKS: tuple[Kind, ...] = ("exact", "normalised", "near")  # a template is none
NEAR = 0.83  # the share of words that near duplicates have in common: 5 of 6
FEWEST_WORDS = 15  # of a text that may be a near duplicate: fewer say too little
FAMILY = 4  # training texts nearly as near as the nearest one, from which on they are of one template
MARGIN = 0.2  # how much less near these may be
_NO_SPACES = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
WORDS = regex.compile(rf"(?V1){_NO_SPACES}\p{{M}}*|[[\p{{L}}\p{{N}}\p{{M}}_]--{_NO_SPACES}]+")


@lru_cache(maxsize=2**16)
def words(text: str) -> tuple[str, ...]:
    """Return the words of a text without case; of scripts without spaces, the characters.

    >>> words("Don't call 0900!"), words("東京")
    (('don', 't', 'call', '0900'), ('東', '京'))
    """
    return tuple(WORDS.findall(text.casefold()))


class Match(NamedTuple):
    """A held-out text and the training text that is nearest to it, by their numbers."""

    kind: Kind
    test: int
    train: int
    similarity: float  # share of the longer text's words that both have


class Repeats(NamedTuple):
    """Texts of one set that equal an earlier one; near duplicates among the first `looked_at`."""

    exact: int
    normalised: int
    near: int
    looked_at: int


def find_duplicates(train: Sequence[str], test: Sequence[str], most_near: int) -> list[Match]:
    """Return one match for each held-out text that has any, the strongest kind first tried.

    Near duplicates are looked for among the first `most_near` texts of each side.
    """
    exact, keys = _first_places(train), _first_places([dedup_key(text) for text in train])
    matches, others = [], []
    for i, text in enumerate(test):
        if text in exact:
            matches.append(Match("exact", i, exact[text], 1.0))
        elif (key := dedup_key(text)) in keys:
            matches.append(Match("normalised", i, keys[key], 1.0))
        elif i < most_near:
            others.append(i)
    places = [place for place in keys.values() if place < most_near]
    near = _Near()
    for place in places:
        near.add(place, train[place])
    for i in others:
        matches += near.match(i, test[i])
    return sorted(matches, key=lambda match: match.test)


def count_repeats(texts: Sequence[str], most_near: int) -> Repeats:
    """Count the texts that equal an earlier one of the same set."""
    keys = _first_places([dedup_key(text) for text in texts])
    exact = len(texts) - len(set(texts))
    near, found = _Near(), 0
    for place in [place for place in keys.values() if place < most_near]:
        found += any(match.kind == "near" for match in near.match(place, texts[place]))
        near.add(place, texts[place])
    return Repeats(exact, len(texts) - len(keys) - exact, found, min(len(texts), most_near))


def too_short(texts: Sequence[str]) -> int:
    """Count the texts with too few words for a near duplicate."""
    return sum(len(words(text)) < FEWEST_WORDS for text in texts)


def _first_places(texts: Sequence[str]) -> dict[str, int]:
    places: dict[str, int] = {}
    for i, text in enumerate(texts):
        places.setdefault(text, i)
    return places


class _Near:
    """Texts in bands of their MinHash (Broder 1997): alike ones are found, then compared word by word."""

    def __init__(self) -> None:
        from rensa import RMinHashLSH

        self._bands = RMinHashLSH(SIMILAR, PERMUTATIONS, BANDS)
        self._texts: list[tuple[int, Counter[str]]] = []  # place and words

    def add(self, place: int, text: str) -> None:
        if len(found := words(text)) >= FEWEST_WORDS:
            self._bands.insert(len(self._texts), _signature(found))
            self._texts.append((place, Counter(found)))

    def match(self, test: int, text: str) -> Iterator[Match]:
        """Yield the match of a text with the nearest one, if that is near."""
        found = words(text)
        if len(found) < FEWEST_WORDS:
            return
        shares: list[tuple[float, int]] = []
        counts, best, family = Counter(found), (0.0, 0), 0
        for i in self._bands.query(_signature(found)):
            place, other = self._texts[i]
            longer = max(len(found), other.total())
            if min(len(found), other.total()) >= (NEAR - MARGIN) * longer:
                share = (counts & other).total() / longer
                shares.append((share, place))
                best = max(best, (share, -place))
                family += share >= 1 - MARGIN
                if family >= FAMILY and best[0] >= NEAR:
                    break  # a template, whatever the others are
        if best[0] < NEAR:
            return
        family = sum(share >= best[0] - MARGIN for share, _ in shares)
        yield Match("near" if family < FAMILY else "template", test, -best[1], best[0])


def _signature(found: Sequence[str]) -> Any:
    """Return the MinHash of a text's pairs of words."""
    from rensa import RMinHash

    signature = RMinHash(num_perm=PERMUTATIONS, seed=1)
    signature.update([f"{first} {second}" for first, second in pairwise(found)])
    return signature
