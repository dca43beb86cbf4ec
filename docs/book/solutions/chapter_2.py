"""Solutions of chapter 2."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise


def merge(ids: list[int], pair: tuple[int, int], new_id: int) -> list[int]:
    """Return the ids with every occurrence of the neighbours `pair` replaced by `new_id`, from the left."""
    merged: list[int] = []
    i = 0
    while i < len(ids):
        if tuple(ids[i : i + 2]) == pair:
            merged.append(new_id)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


def most_frequent_pair(ids: list[int]) -> tuple[int, int]:
    """Return the two neighbours that occur most often, the smallest of equals."""
    counts = Counter(pairwise(ids))
    return min(counts, key=lambda pair: (-counts[pair], pair))


def windows(tokens: list[int], length: int, stride: int) -> list[tuple[list[int], list[int]]]:
    """Return the inputs and targets that fit, one pair every `stride` tokens."""
    starts = range(0, len(tokens) - length, stride)
    return [(tokens[i : i + length], tokens[i + 1 : i + length + 1]) for i in starts]
