"""Speculative decoding with a draft model (Leviathan et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Set

import torch
from torch import Tensor

from llm.inference.prefill import PrefixCache, prefill
from llm.inference.request import Decoder, Request, eval_mode
from llm.inference.sampling import Sampling, apply_repetition_penalty, probabilities
from llm.model.kv_cache import KVCache

NUM_DRAFT_TOKENS = 4  # tokens that the draft model proposes before the model verifies them


@torch.inference_mode()
def speculative_decode(
    model: Decoder, draft: Decoder, request: Request, sampling: Sampling, stop: Set[int], prefix: PrefixCache | None
) -> Iterator[int]:
    """Yield the new tokens of a request: the draft model proposes some, the model verifies them in one call.

    With p the model's distribution and q the draft's, a proposed token is accepted with probability p / q. The first
    rejected token is replaced by a sample of max(0, p - q), so that each token has distribution p.
    """
    context_length = model.gpt.config.context_length
    capacity = min(context_length, len(request.context) + request.remaining)

    def distribution(logits: Tensor, seen: Tensor | None) -> Tensor:
        """Return the distribution [V] of logits [V]."""
        if seen is not None:
            logits = apply_repetition_penalty(logits, seen, sampling.repetition_penalty)
        return probabilities(logits[None], sampling)[0]

    def draw(weights: Tensor) -> int:
        return int(torch.multinomial(weights, 1, generator=request.generator))

    def propose(cache: KVCache) -> tuple[list[int], list[Tensor]]:
        """Return the draft's tokens, and the distribution [V] that each was drawn from."""
        proposed: list[int] = []
        q: list[Tensor] = []
        seen = None if request.seen is None else request.seen.clone()
        for _ in range(min(NUM_DRAFT_TOKENS, request.remaining - 1, capacity - len(request.context))):
            logits = _last_logits(draft, cache, request.context + proposed, 1)
            q.append(distribution(logits[0], seen))
            proposed.append(draw(q[-1]))
            if seen is not None:
                seen[proposed[-1]] = True
        return proposed, q

    with eval_mode(model.gpt, draft.gpt):
        cache = prefill(model.gpt, [request.context], prefix, capacity)[1]
        draft_cache = prefill(draft.gpt, [request.context], None, capacity)[1]
        while request.remaining > 0:
            read = 0 if request.truncate(context_length) else len(request.context) - 1
            cache.length, draft_cache.length = min(cache.length, read), min(draft_cache.length, read)
            proposed, q = propose(draft_cache)
            all_logits = _last_logits(model, cache, request.context + proposed, len(proposed) + 1)  # [proposed + 1, V]
            for i, logits in enumerate(all_logits):
                p = distribution(logits, request.seen)  # [V]
                weights = _verify(p, q[i], proposed[i], request.generator) if i < len(proposed) else p
                token = proposed[i] if weights is None else draw(weights)
                if token in stop:
                    return
                request.add(token)
                yield token
                if weights is not None:
                    break


def _verify(p: Tensor, q: Tensor, token: int, generator: torch.Generator) -> Tensor | None:
    """Return None for an accepted token, otherwise the weights [V] to draw its replacement with."""
    chance = torch.rand((), device=p.device, generator=generator)
    if chance * q[token] < p[token]:
        return None
    rest = (p - q).clamp(min=0)
    return rest if rest.any() else p  # nothing is left where p equals q


def _last_logits(decoder: Decoder, cache: KVCache, tokens: list[int], n: int) -> Tensor:
    """Return the logits [n, V] at the last n tokens; the cache holds the first ones."""
    gpt = decoder.gpt
    idx = torch.tensor([tokens[cache.length :]], device=gpt.tok_emb.weight.device)  # [1, T]
    logits = decoder(idx, cache)[0] if len(idx[0]) == n else gpt.lm_head(gpt.hidden_states(idx, cache)[0, -n:])
    return logits.float()
