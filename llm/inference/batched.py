"""Batched decoding: requests share the rows of a KV cache and leave it one by one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llm.inference.prefill import PrefixCache, common_prefix_length, new_kv_cache, pad_tensor, prefill
from llm.inference.request import Decoder, Request, eval_mode
from llm.inference.sampling import Sampling, apply_repetition_penalty, sample
from llm.model.kv_cache import KVCache


@torch.inference_mode()
def decode_batch(
    decoder: Decoder,
    requests: Sequence[Request],
    sampling: Sampling,
    stop: frozenset[int],
    batch_size: int,
    prefix: PrefixCache | None,
) -> Iterator[tuple[int, int]]:
    """Yield the new tokens step by step, each with the index of its prompt."""
    waiting = deque(request for request in requests if request.remaining > 0)
    if not waiting:
        return
    model = decoder.gpt
    context_length = model.config.context_length
    longest = max(len(request.context) for request in waiting) + max(request.remaining for request in waiting)
    batch = _Batch(decoder, new_kv_cache(model, min(batch_size, len(waiting)), min(context_length, longest)))
    with eval_mode(model):
        if prefix is not None and len(waiting) > 1:
            first = waiting[0].context
            if common := min(common_prefix_length(first, request.context) for request in waiting):
                prefill(model, [first[:common]], prefix)
        while True:
            running = [row for row, request in enumerate(batch.requests) if request.remaining > 0]
            if not running and not waiting:
                return
            # A request that outgrew its context enters again with the last half of it, at other positions.
            overlong = [row for row in running if batch.requests[row].truncate(context_length)]
            entering = [batch.requests[row] for row in overlong]
            while waiting and len(running) - len(overlong) + len(entering) < batch_size:
                entering.append(waiting.popleft())
            batch.keep([row for row in running if row not in overlong])
            logits = batch.decode(entering, None if overlong else prefix)
            for request, token in zip(batch.requests, batch.sample(logits, sampling), strict=True):
                if token in stop:
                    request.remaining = 0
                else:
                    request.add(token)
                    yield request.index, token


class _Batch:
    """Requests being decoded: their rows of the KV cache end at the same column, and row i begins at `pads[i]`."""

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self.decoder, self.cache = decoder, cache
        self.requests: list[Request] = []
        self.pads: list[int] = []

    def keep(self, rows: list[int]) -> None:
        """Remove all other rows; the last kept ones fill the gaps, so that few move."""
        if len(rows) == len(self.requests):
            return
        stayers, movers = set(rows), [row for row in rows if row >= len(rows)]
        order = [row if row in stayers else movers.pop() for row in range(len(rows))]
        self.cache.reorder(order)
        self.requests, self.pads = [self.requests[row] for row in order], [self.pads[row] for row in order]

    def decode(self, entering: list[Request], prefix: PrefixCache | None) -> Tensor:
        """Decode one token of each row and prefill the entering requests; return the next logits [B, V]."""
        model, cache = self.decoder.gpt, self.cache
        if not self.requests:
            cache.length = 0
        elif cache.length == cache.max_length:  # no row begins at column 0: it would have been truncated, or ended
            self.shift(-min(self.pads))
        idx = torch.tensor([request.context[-1:] for request in self.requests], device=model.tok_emb.weight.device)
        if not entering:
            return self.decoder(idx, cache, pad_tensor(self.pads, idx))[:, -1]
        hidden = [model.hidden_states(idx, cache, pad_tensor(self.pads, idx))[:, -1]] if self.requests else []  # [B, C]
        last, prompts, pads = prefill(model, [request.context for request in entering], prefix)
        self.shift(max(0, prompts.length - cache.length))
        for row, pad in enumerate(pads):
            begin = cache.length - prompts.length + pad
            cache.write(len(self.requests), begin, *prompts.slice(row, pad, prompts.length))
            self.requests.append(entering[row])
            self.pads.append(begin)
        return model.lm_head(torch.cat([*hidden, last]))  # the output layer is large: last positions only

    def shift(self, columns: int) -> None:
        """Move all rows to the right, or to the left for a negative number."""
        if columns:
            self.cache.shift(columns)
            self.pads = [pad + columns for pad in self.pads]

    def sample(self, logits: Tensor, sampling: Sampling) -> list[int]:
        """Return the next token of each row."""
        logits = logits.float()
        if sampling.repetition_penalty != 1:
            seen = torch.stack([request.seen for request in self.requests if request.seen is not None])  # [B, V]
            logits = apply_repetition_penalty(logits, seen, sampling.repetition_penalty)
        return sample(logits, sampling, [request.generator for request in self.requests]).tolist()
