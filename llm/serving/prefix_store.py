"""A bounded prefix cache across requests: keys and values of prompts and answers, the least recently used go first."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor

from llm.inference.prefill import common_prefix_length
from llm.model.kv_cache import KVCache


class PrefixStore:
    """KV caches of past requests, up to `capacity` tokens in all.

    With a `unit`, only whole units of tokens are stored and found: those that a prefill in chunks of that size computed
    at fixed places, so that their bits never depend on the request that they come from.
    """

    def __init__(self, capacity: int, unit: int = 1) -> None:
        self.capacity, self.unit = capacity, unit
        self.entries: OrderedDict[tuple[int, ...], tuple[Tensor, Tensor]] = OrderedDict()  # 2 x [layers, K, n, E]
        self.n_tokens = 0

    def match(self, prompt: list[int]) -> tuple[int, tuple[int, ...] | None]:
        """Return the longest stored prefix of a prompt without its last token: its length and its entry."""
        best: tuple[int, tuple[int, ...] | None] = (0, None)
        for tokens in self.entries:
            if best[0] < len(tokens) and tokens[: best[0]] == tuple(prompt[: best[0]]):
                n = min(common_prefix_length(tokens, prompt), len(prompt) - 1)
                n -= n % self.unit
                if n > best[0]:
                    best = n, tokens
        return best

    def load(self, prompt: list[int], cache: KVCache) -> int:
        """Write the longest stored prefix of a prompt into an empty KV cache; return its length."""
        n, entry = self.match(prompt)
        if entry is not None:
            self.entries.move_to_end(entry)
            keys, values = self.entries[entry]
            cache.write(0, 0, keys[:, :, :n], values[:, :, :n])
            cache.length = n
        return n

    def save(self, tokens: list[int], cache: KVCache) -> None:
        """Store the first tokens of a KV cache, in place of the entries that they begin with."""
        n = min(len(tokens), cache.length)
        n -= n % self.unit
        key = tuple(tokens[:n])
        if not 0 < n <= self.capacity:
            return
        for other in list(self.entries):
            if len(other) >= n and other[:n] == key:
                self.entries.move_to_end(other)
                return
            if other == key[: len(other)]:
                self._remove(other)
        self.shrink(self.capacity - n)
        keys, values = cache.slice(0, 0, n)
        self.entries[key] = keys.clone(), values.clone()
        self.n_tokens += n

    def shrink(self, n_tokens: int) -> None:
        """Remove the least recently used entries until at most `n_tokens` are left."""
        while self.n_tokens > max(0, n_tokens):
            self._remove(next(iter(self.entries)))

    def _remove(self, key: tuple[int, ...]) -> None:
        del self.entries[key]
        self.n_tokens -= len(key)
