"""Continuous batching: requests enter and leave the decode batch at any step.

A step decodes one token of every running request and prefills about one chunk of the prompts that wait, so that a
long prompt does not stop the others. Prompts take the beginnings that they share with earlier requests from the prefix
cache. `step` belongs to one thread, the one that `start` makes or a test's own; the other methods are for any thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm.common.errors import InputError
from llm.common.sanitize import error_text
from llm.inference.prefill import common_prefix_length, new_kv_cache
from llm.inference.rows import Step, decode_rows, invariant_rows
from llm.model.gpt import GPT
from llm.model.kv_cache import KVCache
from llm.serving.generation import Generation
from llm.serving.prefix_store import PrefixStore
from llm.serving.text_stream import Piece, TokenInfo
from llm.tokenizer.bpe import Tokenizer

log = logging.getLogger("llm")


class QueueFullError(Exception):
    """The queue has no place for a request."""


class ClosedError(Exception):
    """The engine takes no more requests; another one has its place."""


@dataclass(frozen=True)
class Limits:
    """Sizes of an engine."""

    batch_size: int = 16  # requests that are decoded together
    queue: int = 64  # requests that wait beyond those
    chunk: int = 256  # tokens of prompts that a step reads
    cache_tokens: int = 2**16  # of all KV caches, those of the prefix cache included
    deterministic: bool = False  # equal bits for a request whatever runs beside it


class Engine:
    """The decode loop of a model."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        limits: Limits | None = None,
        step: Step | None = None,
        observe: Callable[[str, float], None] = lambda name, value: None,
    ) -> None:
        """Make an engine; `step` decodes in place of the model, `observe` receives what happens, for the metrics."""
        self.model, self.tokenizer, self.step_of_rows, self.observe = model.eval(), tokenizer, step, observe
        self.limits = limits or Limits()
        self.rows = invariant_rows(model, self.limits.batch_size, step) if self.limits.deterministic else []
        self.prefixes = PrefixStore(
            self.limits.cache_tokens // 2, unit=self.limits.chunk if self.limits.deterministic else 1
        )
        self.waiting: deque[Generation] = deque()
        self.entering: deque[Generation] = deque()  # being prefilled
        self.running: list[Generation] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    # ---- any thread --------------------------------------------------------------------------------------------------

    def check(self, generation: Generation) -> None:
        """Raise `InputError` for a request that can never run."""
        longest = self.model.config.context_length
        if not generation.prompt:
            raise InputError("the prompt is empty; give at least one token to continue")
        if generation.capacity > longest:
            raise InputError(
                f"{len(generation.prompt)} tokens of prompt and {generation.max_new_tokens} of answer exceed the "
                f"context (expected at most {longest} together); shorten the prompt or lower max_tokens"
            )
        if generation.capacity > self.limits.cache_tokens:
            raise InputError(
                f"{generation.capacity} tokens of prompt and answer exceed the cache (expected at most "
                f"{self.limits.cache_tokens}); lower max_tokens"
            )

    def submit(self, generations: Sequence[Generation]) -> None:
        """Queue requests, all or none; raise `QueueFullError` or `ClosedError` where there is no place for them."""
        for generation in generations:
            self.check(generation)
        with self._changed:
            if self._closed:
                raise ClosedError
            free = self.limits.batch_size - len(self.running) - len(self.entering)
            if len(self.waiting) + len(generations) > self.limits.queue + max(0, free):
                raise QueueFullError
            self.waiting.extend(generations)
            self._changed.notify_all()

    def cancel(self, generations: Sequence[Generation]) -> None:
        """End requests that nobody waits for; their places are free with the next step."""
        for generation in generations:
            generation.cancelled = True
        with self._changed:
            self._changed.notify_all()

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.entering or self.running)

    def start(self) -> None:
        """Run the steps in a thread of their own."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def close(self, wait: bool = True) -> None:
        """Take no more requests; the thread ends when those at hand are answered."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if wait and self._thread is not None:
            self._thread.join()

    # ---- the engine's thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self.busy and not self._closed:
                    self._changed.wait()
            if not self.busy:
                return
            self.step()

    @torch.inference_mode()
    def step(self) -> None:
        """Decode one token of each running request and prefill about one chunk."""
        try:
            self._drop()
            self._admit()
            self._prefill()
            self._decode()
        except Exception as error:  # of memory, say: whoever was in the batch is told, and the server goes on
            log.error("a step failed, its requests end: %s", error_text(error))
            self.prefixes.shrink(0)
            for generation in [*self.entering, *self.running]:
                self._end(generation, "error")
            self.entering.clear()
            self.running.clear()

    def _drop(self) -> None:
        """Remove requests that were cancelled or are out of time."""
        now = time.monotonic()
        for group in (self.waiting, self.entering, self.running):
            for generation in [each for each in group if each.cancelled or each.deadline < now]:
                with self._changed:
                    group.remove(generation)
                self._end(generation, "expired" if generation.cache is None else "length", keep=group is self.running)

    def _admit(self) -> None:
        """Let waiting requests enter while rows and cache memory last."""
        while self.waiting and len(self.running) + len(self.entering) < self.limits.batch_size:
            used = sum(each.capacity for each in (*self.running, *self.entering))
            room = self.limits.cache_tokens - used - self.waiting[0].capacity
            if room < 0:
                return
            self.prefixes.shrink(room)
            with self._changed:
                generation = self.waiting.popleft()
            self.entering.append(generation)

    def _prefill(self) -> None:
        """Read about one chunk of the entering prompts, in turns."""
        budget = self.limits.chunk
        for _ in range(len(self.entering)):
            if budget <= 0:
                return
            generation = self.entering.popleft()
            if generation.cache is None and self._shares_with_another(generation):
                self.entering.append(generation)
                continue
            read, logits = self._read_chunk(generation)
            budget -= read
            if logits is None:
                self.entering.append(generation)
                continue
            self.prefixes.save(generation.prompt, _cache(generation))
            self.running.append(generation)
            self._advance(generation, logits)
            self.observe("time_to_first_token", time.monotonic() - generation.arrived)

    def _shares_with_another(self, generation: Generation) -> bool:
        """Tell whether a prompt being read will soon offer a longer beginning than the prefix cache does."""
        found, _ = self.prefixes.match(generation.prompt)
        unit = self.prefixes.unit
        others = (each.prompt for each in self.entering if each.cache is not None)
        return any(common_prefix_length(other, generation.prompt[:-1]) // unit * unit > found for other in others)

    def _read_chunk(self, generation: Generation) -> tuple[int, Tensor | None]:
        """Prefill the next chunk of a prompt; return its length and, at the end, the logits [V] behind the prompt."""
        if generation.cache is None:
            capacity = -(-generation.capacity // 16) * 16  # all caches equally aligned in memory
            generation.start(new_kv_cache(self.model, 1, capacity), self.model.config.vocab_size)
            found = self.prefixes.load(generation.prompt, _cache(generation))
            self.observe("prompt_tokens", len(generation.prompt))
            self.observe("prefix_hit_tokens", found)
        cache = _cache(generation)
        begin = cache.length
        end = min(len(generation.prompt), begin + self.limits.chunk - begin % self.limits.chunk)
        idx = torch.tensor([generation.prompt[begin:end]], device=self.model.tok_emb.weight.device)  # [1, T]
        hidden = self.model.hidden_states(idx, cache)  # [1, T, C]
        if end < len(generation.prompt):
            return end - begin, None
        return end - begin, self.model.lm_head(hidden[:, -1])[0].float()

    def _decode(self) -> None:
        """Decode a token of each running request."""
        batch = list(self.running)
        if not batch:
            return
        self.observe("batch_size", len(batch))
        one_by_one = self.rows == [1]
        for group in [[each] for each in batch] if one_by_one else [batch]:
            rows = next((rows for rows in self.rows if rows >= len(group)), 0)
            tokens, caches = [each.answer[-1] for each in group], [_cache(each) for each in group]
            logits = decode_rows(self.model, tokens, caches, rows, self.step_of_rows).float()  # [B, V]
            likeliest = logits.argmax(-1).tolist()
            for generation, row, token in zip(group, logits, likeliest, strict=True):
                self._advance(generation, row, token)

    def _advance(self, generation: Generation, logits: Tensor, likeliest: int | None = None) -> None:
        """Add the next token to an answer, chosen from logits [V], and end the answer where it is complete."""
        try:
            plain = likeliest is not None and generation.choice.plain and generation.constraint is None
            info = TokenInfo(likeliest, 0.0) if plain and likeliest is not None else generation.choose(logits)
            complete = generation.constraint is not None and generation.constraint.accept(info.token)
        except (RuntimeError, ValueError) as error:  # of its own grammar or settings: the others go on
            log.error("a request ends: %s", error_text(error))
            self._finish(generation, "error")
            return
        if info.token in generation.stop_ids:
            self._finish(generation, "stop")
            return
        self.observe("generated_tokens", 1)
        piece = generation.add(info, self.tokenizer.decode_bytes([info.token]))
        if piece.text or piece.tokens:
            generation.emit(piece)
        if generation.text.stopped or complete:
            self._finish(generation, "stop")
        elif len(generation.answer) >= generation.max_new_tokens:
            self._finish(generation, "length")

    def _finish(self, generation: Generation, reason: str) -> None:
        self.running.remove(generation)
        self._end(generation, reason, keep=True)

    def _end(self, generation: Generation, reason: str, keep: bool = False) -> None:
        """Emit the last piece of an answer; keep its cache as the beginning of a conversation's next prompt."""
        if generation.cache is not None and keep and not self.limits.deterministic:
            self.prefixes.save(generation.prompt + generation.answer, generation.cache)
        started = generation.cache is not None
        generation.cache = None
        self.observe("cancelled" if generation.cancelled else f"finished_{reason}", 1)
        if not generation.cancelled:
            generation.emit(generation.text.finish(reason) if started else Piece(finish_reason=reason))


def _cache(generation: Generation) -> KVCache:
    assert generation.cache is not None
    return generation.cache
