"""Your solutions of the exercises of chapter 2."""

from __future__ import annotations


def merge(ids: list[int], pair: tuple[int, int], new_id: int) -> list[int]:
    """Return the ids with every occurrence of the neighbours `pair` replaced by `new_id`, from the left."""
    raise NotImplementedError


def most_frequent_pair(ids: list[int]) -> tuple[int, int]:
    """Return the two neighbours that occur most often, the smallest of equals."""
    raise NotImplementedError


def windows(tokens: list[int], length: int, stride: int) -> list[tuple[list[int], list[int]]]:
    """Return the inputs and targets that fit, one pair every `stride` tokens."""
    raise NotImplementedError
