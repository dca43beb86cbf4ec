"""Find texts that stand in a corpus, by runs of 13 words (GPT-3, Brown 2020) and of 50 characters (GPT-4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm.audit.duplicates import words

WORDS_RUN, CHARS_RUN = 13, 50
COVERED = 0.9  # the share of a text that lies in runs of the corpus, of either kind, from which on it stands there
SHOWN_WORDS = 60
MOST_PLACES = 50  # of one run that are looked at: a frequent run tells little

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]


class Overlap(NamedTuple):
    """A held-out text that stands in the corpus, and the passage where it begins there."""

    test: int
    words: float | None  # share of its words in runs of the corpus; None for fewer than a run
    characters: float | None
    document: int
    passage: str


class CorpusIndex:
    """All runs of words and of characters of a corpus, as sorted hashes."""

    def __init__(self, documents: Sequence[str]) -> None:
        self._numbers: dict[str, int] = {}
        self._documents = [words(document) for document in documents]
        self._words = _Runs([self._number(document) for document in self._documents], WORDS_RUN)
        self._characters = _Runs([_characters(document) for document in documents], CHARS_RUN)

    def find(self, texts: Sequence[str]) -> tuple[list[Overlap], int]:
        """Return the texts that stand in the corpus, and how many of all are too short to tell."""
        found, short = [], 0
        for i, text in enumerate(texts):
            numbers, characters = self._number(words(text)), _characters(text)
            short += len(numbers) < WORDS_RUN and len(characters) < CHARS_RUN
            covers = self._words.cover(numbers), self._characters.cover(characters)
            if (known := [cover for cover in covers if cover]) and all(cover.share >= COVERED for cover in known):
                by_words, by_characters = (cover.share if cover else None for cover in covers)
                document, start = known[0].document, known[0].start if covers[0] else 0
                passage = " ".join(self._documents[document][start : start + SHOWN_WORDS])
                found.append(Overlap(i, by_words, by_characters, document, passage))
        return found, short

    def _number(self, text: Sequence[str]) -> Ints:
        return np.array([self._numbers.setdefault(word, len(self._numbers) + 1) for word in text], dtype=np.int64)


def _characters(text: str) -> Ints:
    """Return the code points of a text, without case, runs of white space as one space."""
    return np.frombuffer(" ".join(text.casefold().split()).encode("utf-32-le", "replace"), dtype="<u4").astype(np.int64)


class _Cover(NamedTuple):
    share: float
    document: int
    start: int  # of the first run in the document


class _Runs:
    """The hashes of all runs of `length` numbers in each of several sequences."""

    def __init__(self, sequences: Sequence[Ints], length: int) -> None:
        self._length = length
        self._starts = np.cumsum([0, *(len(sequence) for sequence in sequences)])
        whole = np.concatenate([np.zeros(0, np.int64), *sequences])
        hashes = run_hashes(whole, length)
        ends = np.searchsorted(self._starts, np.arange(len(hashes)), side="right")  # the sequence after that of each
        places = np.flatnonzero(np.arange(len(hashes)) + length <= self._starts[np.minimum(ends, len(sequences))])
        order = np.argsort(hashes[places], kind="stable")
        self._places, self._hashes = places[order], hashes[places][order]

    def cover(self, sequence: Ints) -> _Cover | None:
        """Return the share of a sequence that lies in runs that are known; None for less than a run."""
        hashes = run_hashes(sequence, self._length)
        if not len(hashes):
            return None
        if not len(self._hashes):
            return _Cover(0.0, 0, 0)
        at = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        hits = np.flatnonzero(self._hashes[at] == hashes)
        if not len(hits):
            return _Cover(0.0, 0, 0)
        if self._share(hits, len(sequence)) < COVERED:  # nor is any document's share more
            return _Cover(0.0, 0, 0)
        return max(self._by_document(hashes, hits, len(sequence)), key=lambda cover: cover.share)

    def _share(self, hits: Ints, length: int) -> float:
        """Return the share of a sequence of this length in the runs that begin at `hits`."""
        change = np.zeros(length + 1, dtype=np.int64)
        change[hits] += 1
        change[hits + self._length] -= 1
        return float(np.mean(np.cumsum(change)[:-1] > 0))

    def _by_document(self, hashes: Hashes, hits: Ints, length: int) -> Iterator[_Cover]:
        """Yield the share in each document's own runs: the pieces of a template stand in many documents."""
        found: dict[int, list[tuple[int, int]]] = {}
        for hit in hits.tolist():
            low, high = (int(np.searchsorted(self._hashes, hashes[hit], side)) for side in ("left", "right"))
            for place in self._places[low : min(high, low + MOST_PLACES)].tolist():
                document = int(np.searchsorted(self._starts, place, side="right")) - 1
                found.setdefault(document, []).append((hit, place - int(self._starts[document])))
        for document, places in found.items():
            own = np.unique([hit for hit, _ in places])
            yield _Cover(self._share(own, length), document, min(places)[1])


def run_hashes(sequence: Ints, length: int) -> Hashes:
    """Return a 64-bit hash of each run of `length` numbers, polynomial in their mixed bits: [N - length + 1]."""
    if len(sequence) < length:
        return np.zeros(0, np.uint64)
    mixed = sequence.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    power, found, done = 0x100000001B3, np.zeros(len(sequence) + 1, np.uint64), 0
    for bit in f"{length:b}":  # runs of 1, then twice as many, and one more where the bit is set
        if done:
            factor = np.uint64(pow(power, done, 2**64))
            found = found[: len(sequence) - 2 * done + 1] * factor + found[done : len(sequence) - done + 1]
            done *= 2
        if bit == "1":
            found = found[: len(sequence) - done] * np.uint64(power) + mixed[done:]
            done += 1
    return found
