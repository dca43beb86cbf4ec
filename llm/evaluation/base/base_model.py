"""Evaluate the base model on held-out text, beside an n-gram model and two compressors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from llm.checkpoint.folder import Checkpoint
from llm.common.errors import InputError
from llm.config import EvaluateParams
from llm.data.shards import TokenShards
from llm.evaluation.base.slices import Slices, slice_text
from llm.evaluation.baselines import NGram, ppm_bytes, xz_bytes
from llm.inference.generate import generate, stream_text
from llm.inference.sampling import GREEDY, Sampling
from llm.inference.score import Score, token_nats
from llm.model.gpt import GPT
from llm.tokenizer.bpe import Tokenizer

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Completion(NamedTuple):
    prompt: str
    greedy: str
    sampled: str


class DocumentScore(NamedTuple):
    """The loss of one held-out document and its separator."""

    n_bytes: int
    nats: dict[str, float]  # by model: gpt, ngram


class BaseResult(NamedTuple):
    split: str  # the scored one: test, or val where there is no test
    n_bytes: int  # of the held-out text in UTF-8, without separators
    train_bytes: int  # of the training text
    baseline_bytes: int  # the part of it that the n-gram model and xz read
    parameters: int
    gpt: Score
    ngram: Score
    xz_bytes: int
    completions: list[Completion]
    documents: Sequence[DocumentScore] = ()
    ppm_bytes: int | None = None
    slices: Slices | None = None

    def bpb(self) -> dict[str, float]:
        bits = {
            "gpt": self.gpt.bpb(self.n_bytes),
            "ngram": self.ngram.bpb(self.n_bytes),
            "xz": 8 * self.xz_bytes / max(self.n_bytes, 1),
        }
        return bits if self.ppm_bytes is None else {**bits, "ppm": 8 * self.ppm_bytes / max(self.n_bytes, 1)}


def evaluate_base(folder: Checkpoint, corpus: Path, params: EvaluateParams, seed: int) -> BaseResult:
    """Score a base model, an n-gram model, xz and PPM on the same held-out text; complete prompts with the model."""
    model, tokenizer, _ = folder
    assert isinstance(model, GPT)
    train = TokenShards(corpus, "train")
    split, held_out = next(
        ((s, shards) for s in ("test", "val") if (shards := TokenShards(corpus, s)).n_tokens > 1), (None, None)
    )
    if split is None or held_out is None:
        raise InputError(f"{corpus}: neither test nor val holds text to score; raise tokenize.corpus.test")
    n_tokens = min(held_out.n_tokens, params.test_tokens)
    n_train = min(train.n_tokens, round(params.baseline_bytes * train.n_tokens / max(train.n_bytes, 1)))
    held_out_ids, train_ids = held_out.read(0, n_tokens), train.read(0, n_train)
    text, train_text = text_bytes(tokenizer, held_out_ids), text_bytes(tokenizer, train_ids)

    nats = {
        "gpt": token_nats(model, torch.from_numpy(held_out_ids)),
        "ngram": NGram(train_ids, params.ngram_order, tokenizer.vocab_size).nats(held_out_ids),
    }
    return BaseResult(
        split=split,
        n_bytes=sum(map(len, text)),
        train_bytes=train.n_bytes,
        baseline_bytes=sum(map(len, train_text)),
        parameters=sum(p.numel() for p in model.parameters()),
        gpt=Score(float(nats["gpt"].sum()), n_tokens - 1),
        ngram=Score(float(nats["ngram"].sum()), n_tokens - 1),
        xz_bytes=xz_bytes(b"\0".join(train_text), b"\0".join(text)),
        ppm_bytes=ppm_bytes(b"\0".join(train_text), b"\0".join(text)),
        completions=complete(model, tokenizer, params, seed),
        documents=score_documents(held_out_ids == tokenizer.eot, [len(document) for document in text], nats),
        slices=slice_text(model, tokenizer, held_out_ids, nats),
    )


def score_documents(ends: NDArray[np.bool_], sizes: Sequence[int], nats: Mapping[str, Floats]) -> list[DocumentScore]:
    """Return the loss of each document, given the losses of all tokens but the first."""
    number: Ints = (np.cumsum(ends) - ends)[1:]  # of the document that each scored token is in
    sums = {name: np.bincount(number, values, len(sizes)) for name, values in nats.items()}
    kept = sizes[:-1] if len(sizes) and not sizes[-1] else sizes  # a separator at the end has nothing behind it
    return [DocumentScore(size, {name: float(sums[name][i]) for name in sums}) for i, size in enumerate(kept)]


def text_bytes(tokenizer: Tokenizer, ids: Ints) -> list[bytes]:
    """Return the documents in UTF-8; a separator token at the end leaves an empty one behind it."""
    ends = np.flatnonzero(ids == tokenizer.eot)
    documents = np.split(ids, ends + 1)
    return [tokenizer.decode_bytes(document[document != tokenizer.eot].tolist(), start=True) for document in documents]


def complete(model: GPT, tokenizer: Tokenizer, params: EvaluateParams, seed: int) -> list[Completion]:
    """Complete each prompt greedily and by a sample at temperature 0.8."""
    prompts = [tokenizer.encode(prompt) or [tokenizer.eot] for prompt in params.prompts]
    greedy, sampled = (
        generate(
            model, prompts, max_new_tokens=params.max_new_tokens, sampling=sampling, seed=seed, stop=(tokenizer.eot,)
        )
        for sampling in (GREEDY, Sampling(temperature=0.8))
    )
    return [
        Completion(prompt, "".join(stream_text(tokenizer, g)), "".join(stream_text(tokenizer, s)))
        for prompt, g, s in zip(params.prompts, greedy, sampled, strict=True)
    ]
