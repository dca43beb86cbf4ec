"""Speculative decoding with a draft model (Leviathan et al. 2023), or with what followed the last tokens before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Set
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.inference.prefill import PrefixCache, prefill
from llm.inference.request import Decoder, Request, eval_mode
from llm.inference.sampling import Sampling, apply_repetition_penalty, probabilities
from llm.model.kv_cache import KVCache

PROMPT: Literal["prompt"] = "prompt"  # in place of a draft model: n-gram lookup in the text so far
NUM_DRAFT_TOKENS = 4  # tokens that the draft model proposes before the model verifies them
NUM_LOOKUP_TOKENS = 8  # the same of a lookup, which costs nothing
NGRAMS = (3, 2)  # lengths of the ends that are looked up, the longest first

Proposal = tuple[list[int], list[Tensor]]  # tokens, and the distribution [V] that each was drawn from


@torch.inference_mode()
def speculative_decode(
    model: Decoder,
    draft: Decoder | Literal["prompt"],
    request: Request,
    sampling: Sampling,
    stop: Set[int],
    prefix: PrefixCache | None,
) -> Iterator[int]:
    """Yield the new tokens of a request: the draft proposes some, the model verifies them in one call.

    With p the model's distribution and q the draft's, a proposed token is accepted with probability p / q. The first
    rejected token is replaced by a sample of max(0, p - q), so that each token has distribution p. The q of a lookup is
    1 for its token.
    """
    context_length = model.gpt.config.context_length
    capacity = min(context_length, len(request.context) + request.remaining)
    with contextlib.ExitStack() as modes:
        modes.enter_context(eval_mode(model.gpt))
        cache = prefill(model.gpt, [request.context], prefix, capacity)[1]
        drafter: _Drafter
        if isinstance(draft, str):
            drafter = _Lookup(model.gpt.config.vocab_size, model.gpt.tok_emb.weight.device)
        else:
            modes.enter_context(eval_mode(draft.gpt))
            drafter = _DraftModel(draft, request, sampling, capacity)
        while request.remaining > 0:
            read = 0 if request.truncate(context_length) else len(request.context) - 1
            cache.length = min(cache.length, read)
            proposed, q = drafter.propose(read, min(request.remaining - 1, capacity - len(request.context)), request)
            all_logits = _last_logits(model, cache, request.context + proposed, len(proposed) + 1)  # [proposed + 1, V]
            for i, logits in enumerate(all_logits):
                p = _distribution(logits, request.seen, sampling)  # [V]
                weights = _verify(p, q[i], proposed[i], request.generator) if i < len(proposed) else p
                token = proposed[i] if weights is None else _draw(weights, request)
                if token in stop:
                    return
                request.add(token)
                yield token
                if weights is not None:
                    break


class _Drafter(Protocol):
    def propose(self, read: int, limit: int, request: Request) -> Proposal:
        """Return at most `limit` tokens to follow the context, the first `read` tokens of which it has had before."""
        ...


class _DraftModel:
    """A smaller model, with a KV cache of its own."""

    def __init__(self, draft: Decoder, request: Request, sampling: Sampling, capacity: int) -> None:
        self.draft, self.sampling = draft, sampling
        self.cache = prefill(draft.gpt, [request.context], None, capacity)[1]

    def propose(self, read: int, limit: int, request: Request) -> Proposal:
        self.cache.length = min(self.cache.length, read)
        proposed: list[int] = []
        q: list[Tensor] = []
        seen = None if request.seen is None else request.seen.clone()
        for _ in range(min(NUM_DRAFT_TOKENS, limit)):
            logits = _last_logits(self.draft, self.cache, request.context + proposed, 1)
            q.append(_distribution(logits[0], seen, self.sampling))
            proposed.append(_draw(q[-1], request))
            if seen is not None:
                seen[proposed[-1]] = True
        return proposed, q


class _Lookup:
    """The places behind each n-gram of the context: what followed the last one may follow again."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size, self.device = vocab_size, device
        self.places: dict[tuple[int, ...], int] = {}
        self.length = 0  # tokens of the context whose n-grams are known

    def propose(self, read: int, limit: int, request: Request) -> Proposal:
        context = request.context
        if not read:  # another context
            self.places.clear()
            self.length = 0
        for place in range(self.length, len(context)):
            self.places |= {tuple(context[place - n : place]): place for n in NGRAMS if place >= n}
        self.length = len(context)
        known = (self.places.get(tuple(context[-n:])) for n in NGRAMS)
        source = next((place for place in known if place is not None), None)
        if source is None or limit < 1:
            return [], []
        text = list(context)
        for i in range(min(NUM_LOOKUP_TOKENS, limit)):
            text.append(text[source + i])  # a short period goes on in what is proposed
        proposed = text[len(context) :]
        tokens = torch.tensor(proposed, device=self.device)
        return proposed, list(F.one_hot(tokens, self.vocab_size).float())


def _distribution(logits: Tensor, seen: Tensor | None, sampling: Sampling) -> Tensor:
    """Return the distribution [V] of logits [V]."""
    if seen is not None:
        logits = apply_repetition_penalty(logits, seen, sampling.repetition_penalty)
    return probabilities(logits[None], sampling)[0]


def _draw(weights: Tensor, request: Request) -> int:
    return int(torch.multinomial(weights, 1, generator=request.generator))


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
