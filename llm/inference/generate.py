"""Text from a model: how the next token is chosen, and rows continued with a key-value cache, many at a time or ahead
of a draft.

Shapes: B rows being continued, T tokens of this call, C emb_dim, K n_kv_heads, D head_dim, V vocab_size.

A row may grow longer than the context. When it does, the model reads on from the last half of the context: one prefill
of half a context every half context, where dropping one token at a time would cost a prefill for each new token. A
prompt that is longer than the context is read from its last `context_length` tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterable, Iterator, Sequence

from llm.common.errors import InputError
from llm.inference.batched import decode_batch
from llm.inference.prefill import PrefixCache
from llm.inference.request import make_requests
from llm.inference.sampling import GREEDY, Sampling
from llm.inference.speculative import speculative_decode
from llm.model.gpt import GPT
from llm.tokenizer.bpe import Tokenizer


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop: Collection[int] = (),
    batch_size: int | None = None,
    prefix: PrefixCache | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, up to `max_new_tokens` and ending before the first token of `stop`.

    `max_new_tokens` is one number or one for each prompt. `batch_size` rows are continued at a time, all if it is None;
    where one ends the next prompt takes its place. What the prompts begin with in common is read once. Row i samples
    with seed + i and from its own logits only, so its text does not depend on the rows beside it. Raises `InputError`
    for an empty prompt and for numbers out of range.

    >>> prompts = [tokenizer.encode("Once"), tokenizer.encode("It was late")]  # doctest: +SKIP
    >>> generate(model, prompts, max_new_tokens=3, stop={tokenizer.eot})  # doctest: +SKIP
    [[310, 257, 640], [287, 262]]
    """
    rows = make_requests(model, prompts, max_new_tokens, sampling, seed)
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size must be 1 or more, found {batch_size}")
    if prefix is None and len(rows) > 1:
        prefix = PrefixCache()
    answers: list[list[int]] = [[] for _ in prompts]
    for number, token in decode_batch(model, rows, sampling, frozenset(stop), batch_size or len(rows), prefix):
        answers[number].append(token)
    return answers


def stream(
    model: GPT,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop: Collection[int] = (),
    prefix: PrefixCache | None = None,
    draft: GPT | None = None,
) -> Iterator[int]:
    """The same tokens as `generate(model, [prompt], ...)[0]`, each as soon as it is known; errors come at the call.

    A `draft`, a smaller model of the same vocabulary, guesses tokens ahead, which the model then reads at once
    (Leviathan et al. 2023): greedy text stays the same up to rounding, sampled text is another from the same
    distribution.
    """
    rows = make_requests(model, [prompt], max_new_tokens, sampling, seed)
    if draft is None:
        return (token for _, token in decode_batch(model, rows, sampling, frozenset(stop), 1, prefix))
    if draft.config.vocab_size != model.config.vocab_size:
        raise InputError(f"the draft has {draft.config.vocab_size} tokens, the model {model.config.vocab_size}")
    if draft.config.context_length < (needed := min(model.config.context_length, len(prompt) + max_new_tokens)):
        raise InputError(f"the draft reads {draft.config.context_length} tokens, and {needed} are needed")
    return speculative_decode(model, draft, rows[0], sampling, frozenset(stop), prefix)


def stream_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of a stream of tokens, in pieces of whole characters: a character may be spread over several tokens."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if piece := decoder.decode(tokenizer.decode_bytes([token])):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest


# ---- rows ------------------------------------------------------------------------------------------------------------


# ---- many rows at a time ---------------------------------------------------------------------------------------------


# ---- one row and a draft ---------------------------------------------------------------------------------------------
