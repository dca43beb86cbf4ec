"""Find texts that are nearly equal: MinHash signatures of their pairs of words (Broder 1997), in bands."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

PERMUTATIONS, BANDS = 128, 32
SIMILAR = 0.5  # the share of two texts' pairs of words that both have, from which on they are near duplicates
WORDS = re.compile(r"\w+")


def signature(text: str) -> Any:
    """Return the MinHash of a text's pairs of words; None for less than ten words, of which too little is known."""
    from rensa import RMinHash

    words = WORDS.findall(text.casefold())
    if len(words) < 10:
        return None
    found = RMinHash(num_perm=PERMUTATIONS, seed=1)
    found.update([f"{first} {second}" for first, second in pairwise(words)])
    return found


class NearDuplicates:
    """The texts so far: those that were no near duplicate of an earlier one."""

    def __init__(self) -> None:
        from rensa import RMinHashLSH

        self._bands = RMinHashLSH(SIMILAR, PERMUTATIONS, BANDS)
        self._signatures: list[Any] = []

    def is_duplicate(self, signature: Any) -> bool:
        """Return whether a text is a near duplicate of an earlier one; remember it if not."""
        if signature is None:
            return False
        if any(signature.jaccard(self._signatures[i]) >= SIMILAR for i in self._bands.query(signature)):
            return True
        self._bands.insert(len(self._signatures), signature)
        self._signatures.append(signature)
        return False
