"""Batched decoding: requests share the rows of a KV cache and leave it one by one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch

from llm.inference.prefill import Prefix, _cache, _common, _read, _tensor
from llm.inference.request import _evaluating, _Row
from llm.inference.sampling import Sampling, penalise, sample
from llm.model.gpt import GPT
from llm.model.kv_cache import KVCache


@torch.inference_mode()
def _batched(
    model: GPT, rows: list[_Row], sampling: Sampling, stop: frozenset[int], batch_size: int, prefix: Prefix | None
) -> Iterator[tuple[int, int]]:
    """Each new token with the number of its prompt, step by step.

    All rows of the cache end at the same column, and row i begins at column `pads[i]`.
    """
    waiting = deque(row for row in rows if row.left > 0)
    if not waiting:
        return
    context_length = model.config.context_length
    longest = max(len(row.context) for row in waiting) + max(row.left for row in waiting)
    cache = _cache(model, min(batch_size, len(waiting)), min(context_length, longest))
    active: list[_Row] = []
    pads: list[int] = []
    with _evaluating(model):
        if prefix is not None and len(waiting) > 1:
            first = waiting[0].context
            if common := min(_common(first, row.context) for row in waiting):
                _read(model, [first[:common]], prefix)
        while waiting or any(row.left > 0 for row in active):
            # A row that outgrew its context enters again with the last half of it, at other positions.
            entering = [row for row in active if row.left > 0 and row.cut(context_length)]
            known = None if entering else prefix
            staying = [i for i, row in enumerate(active) if row.left > 0 and row not in entering]
            while waiting and len(staying) + len(entering) < batch_size:
                entering.append(waiting.popleft())
            if len(staying) < len(active):
                staying = _close_ranks(staying)
                cache.keep(staying)
                active, pads = [active[i] for i in staying], [pads[i] for i in staying]

            if not active:
                cache.length = 0
            elif cache.length == cache.max_length:  # then no row begins at column 0: it would have been cut, or ended
                pads = _shifted(cache, pads, -min(pads))
            idx = torch.tensor([row.context[-1:] for row in active], device=model.tok_emb.weight.device)  # [B, 1]
            if not entering:
                logits = model(idx, cache, _tensor(pads, idx))[:, -1]  # [B, V]
            else:
                hidden = [model.hidden(idx, cache, _tensor(pads, idx))[:, -1]] if active else []  # [B, C]
                last, read, new_pads = _read(model, [row.context for row in entering], known)
                logits = model.lm_head(torch.cat([*hidden, last]))  # the output layer is large: last positions only
                pads = _shifted(cache, pads, max(0, read.length - cache.length))
                for i, pad in enumerate(new_pads):
                    begin = cache.length - read.length + pad
                    cache.put(len(active), begin, *read.part(i, pad, read.length))
                    active.append(entering[i])
                    pads.append(begin)

            logits = logits.float()
            if sampling.repetition_penalty != 1:
                seen = torch.stack([row.seen for row in active if row.seen is not None])  # [B, V]
                logits = penalise(logits, seen, sampling.repetition_penalty)
            tokens = sample(logits, sampling, [row.generator for row in active]).tolist()
            for row, token in zip(active, tokens, strict=True):
                if token in stop:
                    row.left = 0
                else:
                    row.add(token)
                    yield row.number, token


def _close_ranks(kept: list[int]) -> list[int]:
    """The kept rows with as few as possible of them at another place than before: the last ones fill the gaps."""
    movers = [row for row in kept if row >= len(kept)]
    stayers = set(kept)
    return [row if row in stayers else movers.pop() for row in range(len(kept))]


def _shifted(cache: KVCache, pads: list[int], columns: int) -> list[int]:
    """Moves what the cache holds to the right, to the left where `columns` is negative; returns the new padding."""
    if columns:
        cache.shift(columns)
    return [pad + columns for pad in pads]
