"""Find texts that are nearly equal: MinHash signatures of their pairs of words (Broder 1997), in bands.

The signatures are on disk, and memory holds a few numbers for each text: the bands are sorted one after the other, so
that only texts that share a band with another one are compared.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

PERMUTATIONS, BANDS = 128, 32
SIMILAR = 0.5  # the share of two texts' pairs of words that both have, from which on they are near duplicates
WORDS = re.compile(r"\w+")
ODD = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)  # multipliers of a hash
BANDS_AT_ONCE = 4  # of all texts, in memory

Array = np.ndarray[Any, np.dtype[Any]]


def signature(text: str) -> Array | None:
    """Return the MinHash of a text's pairs of words; None for less than ten words, of which too little is known."""
    from rensa import RMinHash

    words = WORDS.findall(text.casefold())
    if len(words) < 10:
        return None
    found = RMinHash(num_perm=PERMUTATIONS, seed=1)
    found.update([f"{first} {second}" for first, second in pairwise(words)])
    return np.array(found.digest(), np.uint32)


def find_near_duplicates(files: list[Path], rows: Array) -> Array:
    """Return which texts are near duplicates of an earlier one that is none: [N], for N rows of the signatures.

    `rows` counts through all files, in rising order.
    """
    found = np.zeros(len(rows), dtype=bool)
    if not found.size:
        return found
    signatures = _Signatures(files)
    members, groups = _shared_bands(files, rows)
    kept, n_kept = np.zeros_like(groups), np.zeros_like(groups)  # of each group, from its place on
    cuts = np.flatnonzero(np.diff(members, prepend=-1, append=-1)).tolist()
    for start, end in pairwise(cuts):
        text, places = int(members[start]), groups[start:end].tolist()
        own = signatures[rows[text]]
        others = np.unique(np.concatenate([kept[place : place + n_kept[place]] for place in places]))
        if any(np.mean(own == signatures[row]) >= SIMILAR for row in rows[others].tolist()):
            found[text] = True
            continue
        for place in places:
            kept[place + n_kept[place]] = text
            n_kept[place] += 1
    return found


def _shared_bands(files: list[Path], rows: Array) -> tuple[Array, Array]:
    """Return the M texts of all groups that share a band, in order, and the place of each one's group: [M], [M].

    A group has as many places as texts.
    """
    members, groups = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    n_places = 0
    for first in range(0, BANDS, BANDS_AT_ONCE):
        keys = np.concatenate([_band_keys(file, first) for file in files], axis=1)
        for key in keys[:, rows]:
            order = np.argsort(key, kind="stable")
            equal = key[order][1:] == key[order][:-1]
            inside = np.append(False, equal) | np.append(equal, False)
            begins = np.append(True, ~equal)[inside]
            places = n_places + np.arange(len(begins))
            members.append(order[inside])
            groups.append(np.maximum.accumulate(np.where(begins, places, 0)))
            n_places += len(begins)
    member, group = np.concatenate(members), np.concatenate(groups)
    order = np.argsort(member, kind="stable")
    return member[order], group[order]


def open_signatures(file: Path) -> Array:
    """Return the rows of a file, which stay on disk."""
    return np.asarray(np.load(file, mmap_mode="r"))


def _band_keys(file: Path, first: int) -> Array:
    """Return the hashes of some bands of the signatures in a file: [BANDS_AT_ONCE, N]."""
    width = PERMUTATIONS // BANDS
    rows = open_signatures(file)[:, first * width : (first + BANDS_AT_ONCE) * width]
    halves = np.ascontiguousarray(rows).view(np.uint64).reshape(len(rows), BANDS_AT_ONCE, width // 2)
    mixed: Array = (halves * ODD) ^ (halves * ODD >> np.uint64(29))
    return np.ascontiguousarray(np.bitwise_xor.reduce(mixed * ODD[::-1], axis=2).T)


class _Signatures:
    """The rows of all files."""

    def __init__(self, files: list[Path]) -> None:
        self._files = [open_signatures(file) for file in files]
        self._starts = [0, *accumulate(map(len, self._files))]

    def __getitem__(self, row: int) -> Array:
        file = bisect_right(self._starts, row) - 1
        found: Array = self._files[file][row - self._starts[file]]
        return found
