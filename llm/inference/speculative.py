"""Speculative decoding with a draft model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llm.inference.prefill import PrefixCache, prefill
from llm.inference.request import Request, eval_mode
from llm.inference.sampling import Sampling, apply_repetition_penalty, probabilities
from llm.model.gpt import GPT
from llm.model.kv_cache import KVCache

NUM_DRAFT_TOKENS = 4  # tokens that a draft proposes before the model reads them


@torch.inference_mode()
def speculative_decode(
    model: GPT, draft: GPT, row: Request, sampling: Sampling, stop: frozenset[int], prefix: PrefixCache | None
) -> Iterator[int]:
    """The draft guesses from its distribution q; the model accepts a guess with probability p / q of its own p.

    In place of the first guess that it does not accept it draws from what p has more than q, so that each token has
    distribution p.
    """
    capacity = min(model.config.context_length, len(row.context) + row.left)

    def distributions(of: GPT, cache: KVCache, tokens: list[int], n: int) -> Tensor:
        """Logits [n, V] at the last n of the tokens; the cache holds some of the others."""
        idx = torch.tensor([tokens[cache.length :]], device=of.tok_emb.weight.device)  # [1, T]
        logits = of(idx, cache)[0] if len(idx[0]) == n else of.lm_head(of.hidden_states(idx, cache)[0, -n:])
        return logits.float()

    def chances(logits: Tensor, seen: Tensor | None) -> Tensor:
        """The distribution [V] that logits [V] give."""
        if seen is not None:
            logits = apply_repetition_penalty(logits, seen, sampling.repetition_penalty)
        return probabilities(logits[None], sampling)[0]

    def draw(weights: Tensor) -> int:
        return int(torch.multinomial(weights, 1, generator=row.generator))

    with eval_mode(model, draft):
        caches = [prefill(each, [row.context], kept, capacity)[1] for each, kept in ((model, prefix), (draft, None))]
        while row.left > 0:
            read = 0 if row.cut(model.config.context_length) else len(row.context) - 1
            for cache in caches:
                cache.length = min(cache.length, read)
            guesses: list[int] = []
            q: list[Tensor] = []
            seen = None if row.seen is None else row.seen.clone()
            for _ in range(min(NUM_DRAFT_TOKENS, row.left - 1, capacity - len(row.context))):
                logits = distributions(draft, caches[1], row.context + guesses, 1)
                q.append(chances(logits[0], seen))  # [V]
                guesses.append(draw(q[-1]))
                if seen is not None:
                    seen[guesses[-1]] = True
            all_logits = distributions(model, caches[0], row.context + guesses, len(guesses) + 1)  # [guesses + 1, V]
            for i, logits in enumerate(all_logits):
                p = chances(logits, row.seen)  # [V]
                accepted = False
                if i < len(guesses):
                    guess = guesses[i]
                    chance = torch.rand((), device=p.device, generator=row.generator)
                    accepted = bool(chance * q[i][guess] < p[guess])
                    if not accepted and (rest := (p - q[i]).clamp(min=0)).any():  # none is left where they are equal
                        p = rest
                token = guesses[i] if accepted else draw(p)
                if token in stop:
                    return
                row.add(token)
                yield token
                if not accepted:
                    break
