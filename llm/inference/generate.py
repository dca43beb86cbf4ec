"""Text generation: many prompts at a time, or one as a stream, also ahead of a draft.

A text may grow longer than the context. Then the model reads on from the last half of the context: one prefill of half
a context every half context. Dropping one token at a time would cost a prefill for each new token. A prompt longer than
the context is read from its last `context_length` tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Literal

from llm.common.errors import InputError
from llm.inference.batched import decode_batch
from llm.inference.prefill import PrefixCache
from llm.inference.request import Decoder, make_requests
from llm.inference.sampling import GREEDY, Sampling
from llm.inference.speculative import speculative_decode
from llm.tokenizer.bpe import Tokenizer


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop: Collection[int] = (),
    batch_size: int | None = None,
    prefix: PrefixCache | None = None,
) -> list[list[int]]:
    """Return the new tokens of each prompt, which end before the first token of `stop`.

    `model` is a `GPT` or a `CompiledDecoder`, `max_new_tokens` one number or one for each prompt. `batch_size` rows are
    decoded at a time, all if it is None; a waiting prompt takes the row of one that has ended. A common beginning of
    the prompts is read once. Row i samples with seed + i, so that its text does not depend on the other rows. Raises
    `InputError` for an empty prompt and for numbers out of range.

    >>> prompts = [tokenizer.encode("Once"), tokenizer.encode("It was late")]  # doctest: +SKIP
    >>> generate(model, prompts, max_new_tokens=3, stop={tokenizer.eot})  # doctest: +SKIP
    [[310, 257, 640], [287, 262]]
    """
    requests = make_requests(model.gpt, prompts, max_new_tokens, sampling, seed)
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size must be 1 or more, found {batch_size}")
    if prefix is None and len(requests) > 1:
        prefix = PrefixCache()
    answers: list[list[int]] = [[] for _ in prompts]
    for index, token in decode_batch(model, requests, sampling, frozenset(stop), batch_size or len(requests), prefix):
        answers[index].append(token)
    return answers


def stream(
    model: Decoder,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop: Collection[int] = (),
    prefix: PrefixCache | None = None,
    draft: Decoder | Literal["prompt"] | None = None,
) -> Iterator[int]:
    """Return an iterator over the tokens of `generate(model, [prompt], ...)[0]`; errors are raised at the call.

    A `draft` turns on speculative decoding: a smaller model with the same vocabulary, or "prompt" for n-gram lookup in
    the text so far. Greedy text stays the same up to rounding. Sampled text differs, with the same distribution.
    """
    [request] = make_requests(model.gpt, [prompt], max_new_tokens, sampling, seed)
    if draft is None:
        return (token for _, token in decode_batch(model, [request], sampling, frozenset(stop), 1, prefix))
    if not isinstance(draft, str):
        _check_draft(model, draft, len(prompt) + max_new_tokens)
    return speculative_decode(model, draft, request, sampling, frozenset(stop), prefix)


def _check_draft(model: Decoder, draft: Decoder, length: int) -> None:
    """Raise `InputError` for a draft model that cannot draft a text of this length."""
    config, other = model.gpt.config, draft.gpt.config
    if other.vocab_size != config.vocab_size:
        raise InputError(f"the draft has {other.vocab_size} tokens, the model {config.vocab_size}")
    if other.context_length < (needed := min(config.context_length, length)):
        raise InputError(f"the draft reads {other.context_length} tokens, and {needed} are needed")


def stream_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text of a stream of tokens in whole characters; a character may span several tokens."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if piece := decoder.decode(tokenizer.decode_bytes([token])):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest
