"""Batched decoding: requests share the rows of a KV cache and leave it one by one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch

from llm.inference.prefill import PrefixCache, common_prefix_length, new_kv_cache, pad_tensor, prefill
from llm.inference.request import Request, eval_mode
from llm.inference.sampling import Sampling, apply_repetition_penalty, sample
from llm.model.gpt import GPT
from llm.model.kv_cache import KVCache


@torch.inference_mode()
def decode_batch(
    model: GPT,
    rows: list[Request],
    sampling: Sampling,
    stop: frozenset[int],
    batch_size: int,
    prefix: PrefixCache | None,
) -> Iterator[tuple[int, int]]:
    """Each new token with the number of its prompt, step by step.

    All rows of the cache end at the same column, and row i begins at column `pads[i]`.
    """
    waiting = deque(row for row in rows if row.left > 0)
    if not waiting:
        return
    context_length = model.config.context_length
    longest = max(len(row.context) for row in waiting) + max(row.left for row in waiting)
    cache = new_kv_cache(model, min(batch_size, len(waiting)), min(context_length, longest))
    active: list[Request] = []
    pads: list[int] = []
    with eval_mode(model):
        if prefix is not None and len(waiting) > 1:
            first = waiting[0].context
            if common := min(common_prefix_length(first, row.context) for row in waiting):
                prefill(model, [first[:common]], prefix)
        while waiting or any(row.left > 0 for row in active):
            # A row that outgrew its context enters again with the last half of it, at other positions.
            entering = [row for row in active if row.left > 0 and row.cut(context_length)]
            known = None if entering else prefix
            staying = [i for i, row in enumerate(active) if row.left > 0 and row not in entering]
            while waiting and len(staying) + len(entering) < batch_size:
                entering.append(waiting.popleft())
            if len(staying) < len(active):
                staying = _close_ranks(staying)
                cache.reorder(staying)
                active, pads = [active[i] for i in staying], [pads[i] for i in staying]

            if not active:
                cache.length = 0
            elif cache.length == cache.max_length:  # then no row begins at column 0: it would have been cut, or ended
                pads = _shifted(cache, pads, -min(pads))
            idx = torch.tensor([row.context[-1:] for row in active], device=model.tok_emb.weight.device)  # [B, 1]
            if not entering:
                logits = model(idx, cache, pad_tensor(pads, idx))[:, -1]  # [B, V]
            else:
                hidden = [model.hidden_states(idx, cache, pad_tensor(pads, idx))[:, -1]] if active else []  # [B, C]
                last, read, new_pads = prefill(model, [row.context for row in entering], known)
                logits = model.lm_head(torch.cat([*hidden, last]))  # the output layer is large: last positions only
                pads = _shifted(cache, pads, max(0, read.length - cache.length))
                for i, pad in enumerate(new_pads):
                    begin = cache.length - read.length + pad
                    cache.write(len(active), begin, *read.slice(i, pad, read.length))
                    active.append(entering[i])
                    pads.append(begin)

            logits = logits.float()
            if sampling.repetition_penalty != 1:
                seen = torch.stack([row.seen for row in active if row.seen is not None])  # [B, V]
                logits = apply_repetition_penalty(logits, seen, sampling.repetition_penalty)
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
