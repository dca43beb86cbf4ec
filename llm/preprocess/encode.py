"""Encode the planned corpus into token shards, in parallel."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llm.config import SPLITS, TRAIN
from llm.preprocess.chunks import cut_at
from llm.preprocess.corpus import Array, LineBatch, Plan, read_batch
from llm.preprocess.workers import Workers, show_progress
from llm.tokenizer.bpe import FILE_NAME, Tokenizer


class EncodeJob(NamedTuple):
    """A batch with the plan of its records and chunks."""

    batch: LineBatch
    record_chunks: list[int]
    chunk_lengths: list[int]
    chunk_split: list[int]
    chunk_ends: list[bool]


class Encoded(NamedTuple):
    tokens: list[Array]  # for each split
    n_bytes: list[int]  # UTF-8, for each split
    chunk_tokens: list[int]  # without the separator


def encode_batch(job: EncodeJob, path: Path, tokenizer_folder: Path) -> Encoded:
    tokenizer = saved_tokenizer(tokenizer_folder)
    streams: list[list[Array]] = [[np.zeros(0, np.uint32)] for _ in SPLITS]
    n_bytes, chunk_tokens = [0] * len(SPLITS), []
    separator = np.array([tokenizer.eot], np.uint32)
    chunk = 0
    for (_, text), n_chunks in zip(read_batch(path, job.batch), job.record_chunks, strict=True):
        starts = True  # a document, or its first chunk in a split
        for piece in cut_at(text, job.chunk_lengths[chunk : chunk + n_chunks]):
            split = job.chunk_split[chunk]
            ids = tokenizer.encode_array(piece, start=starts)
            starts = job.chunk_ends[chunk]
            streams[split] += [ids, separator] if job.chunk_ends[chunk] else [ids]
            n_bytes[split] += len(piece.encode())
            chunk_tokens.append(len(ids))
            chunk += 1
    dtype = token_dtype(tokenizer.vocab_size)
    return Encoded([np.concatenate(stream).astype(dtype) for stream in streams], n_bytes, chunk_tokens)


def saved_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer, built once in each process and again when its file has changed."""
    return _built_tokenizer(folder, (folder / FILE_NAME).read_bytes())


@lru_cache(maxsize=1)
def _built_tokenizer(folder: Path, content: bytes) -> Tokenizer:
    return Tokenizer.load(folder)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


class ShardWriter:
    """The files of one split, `train-00000.bin` and so on, each with `tokens_per_shard` tokens but the last."""

    def __init__(self, folder: Path, split: str, tokens_per_shard: int) -> None:
        self.shards: list[str] = []
        self.n_tokens = 0
        self._folder, self._split, self._tokens_per_shard = folder, split, tokens_per_shard

    def write(self, tokens: Array) -> None:
        while len(tokens):
            room = -self.n_tokens % self._tokens_per_shard
            if room == 0:
                self.shards.append(f"{self._split}-{len(self.shards):05d}.bin")
                room = self._tokens_per_shard
            with (self._folder / self.shards[-1]).open("ab") as file:
                file.write(tokens[:room].tobytes())
            self.n_tokens += len(tokens[:room])
            tokens = tokens[room:]


class EncodedCorpus(NamedTuple):
    meta: dict[str, Any]  # the content of `meta.json`
    chunk_tokens: Array  # [N]
    used: Array  # [V] how often each token occurs in train


def encode_corpus(
    path: Path, folder: Path, plan: Plan, tokenizer_folder: Path, tokens_per_shard: int, workers: Workers
) -> EncodedCorpus:
    """Write the shards and `meta.json`: the same bytes with any number of workers."""
    vocab_size = Tokenizer.load(tokenizer_folder).vocab_size
    folder.mkdir(parents=True)
    writers = [ShardWriter(folder, split, tokens_per_shard) for split in SPLITS]
    n_bytes, chunk_tokens = np.zeros(len(SPLITS), np.int64), array("q")
    used = np.zeros(vocab_size, np.int64)
    results = workers.in_order(encode_batch, encode_jobs(plan), path, tokenizer_folder)
    for encoded in show_progress(results, [batch.size for batch in plan.batches], "encode"):
        for writer, tokens in zip(writers, encoded.tokens, strict=True):
            writer.write(tokens)
        n_bytes += encoded.n_bytes
        chunk_tokens.extend(encoded.chunk_tokens)
        used += np.bincount(encoded.tokens[TRAIN], minlength=vocab_size)
    starts = np.append(True, (np.diff(plan.chunk_document) != 0) | (np.diff(plan.chunk_split) != 0))
    meta = {
        "dtype": token_dtype(vocab_size).name,
        "vocab_size": vocab_size,
        "splits": {
            split: {
                "shards": writers[i].shards,
                "tokens": writers[i].n_tokens,
                "bytes": int(n_bytes[i]),
                "documents": int((starts & (plan.chunk_split == i)).sum()),
            }
            for i, split in enumerate(SPLITS)
        },
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    return EncodedCorpus(meta, np.array(chunk_tokens), used)


def encode_jobs(plan: Plan) -> Iterator[EncodeJob]:
    first = plan.first_chunks()
    ends = np.cumsum(plan.batch_records)
    for batch, start, end in zip(plan.batches, ends - plan.batch_records, ends, strict=True):
        chunks = slice(first[start], first[end])
        yield EncodeJob(
            batch=batch,
            record_chunks=plan.record_chunks[start:end].tolist(),
            chunk_lengths=plan.chunk_lengths[chunks].tolist(),
            chunk_split=plan.chunk_split[chunks].tolist(),
            chunk_ends=plan.chunk_ends[chunks].tolist(),
        )
