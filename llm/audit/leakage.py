"""Audit held-out texts for leaks: duplicates of training texts, and passages of the pretraining corpus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from llm.audit.duplicates import LEAKS, Match, Repeats, count_repeats, find_duplicates, too_short
from llm.audit.overlap import CorpusIndex, Overlap

MOST_REPEATS = 1000  # texts of a split that are compared with one another as near duplicates


class Part(NamedTuple):
    """The audit of one held-out split: `test` against `train`, and against the corpus where there is one."""

    name: str  # of the set
    split: str
    train: Sequence[str]
    test: Sequence[str]
    repeats: Repeats  # within `test`
    matches: list[Match]
    overlaps: list[Overlap]
    short: int  # texts with too few words for a near duplicate
    short_for_corpus: int  # with neither a run of words nor one of characters
    most_near: int  # texts of each side that were compared as near duplicates

    def counts(self) -> dict[str, int]:
        """Return how many held-out texts were found by each rule."""
        kinds = Counter(match.kind for match in self.matches)
        named: dict[str, int] = {kind: kinds[kind] for kind in (*LEAKS, "template")}
        return {**named, "corpus": len(self.overlaps), "leaked": len(self.leaked())}

    def leaked(self) -> set[int]:
        """Return the numbers of the texts that training has seen; those of a template are not among them."""
        return {match.test for match in self.matches if match.kind in LEAKS} | {found.test for found in self.overlaps}

    def templates(self) -> set[int]:
        return {match.test for match in self.matches if match.kind == "template"}


class Audit(NamedTuple):
    parts: list[Part]
    train_repeats: dict[str, Repeats]  # within the training part of each set
    corpus_documents: int
    corpus_bytes: int  # that were searched
    corpus_total: int

    def part(self, name: str, split: str) -> Part | None:
        return next((part for part in self.parts if (part.name, part.split) == (name, split)), None)


def audit_sets(
    sets: Mapping[str, Mapping[str, Sequence[str]]],
    corpus: Sequence[str] = (),
    *,
    most_near: int,
    corpus_total: int | None = None,
) -> Audit:
    """Audit each set's held-out splits against its split `train` and against the corpus.

    `corpus` may be the beginning of a longer one of `corpus_total` bytes.
    """
    index = CorpusIndex(corpus) if corpus else None
    parts, repeats = [], {}
    for name, splits in sets.items():
        train = splits["train"]
        repeats[name] = count_repeats(train, MOST_REPEATS)
        held_out = {split: texts for split, texts in splits.items() if split != "train"}
        found = find_duplicates(train, [text for texts in held_out.values() for text in texts], most_near)
        start = 0
        for split, texts in held_out.items():
            matches = [m._replace(test=m.test - start) for m in found if start <= m.test < start + len(texts)]
            overlaps, short = ([], 0) if index is None else index.find(texts)
            parts.append(
                Part(
                    name=name,
                    split=split,
                    train=train,
                    test=texts,
                    repeats=count_repeats(texts, MOST_REPEATS),
                    matches=matches,
                    overlaps=overlaps,
                    short=too_short(texts),
                    short_for_corpus=short,
                    most_near=most_near,
                )
            )
            start += len(texts)
    n_bytes = sum(len(document.encode("utf-8", "replace")) for document in corpus)
    return Audit(parts, repeats, len(corpus), n_bytes, n_bytes if corpus_total is None else corpus_total)
