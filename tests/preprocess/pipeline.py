"""A small corpus on its way into shards and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm.config import CorpusSplit
from llm.preprocess.corpus import plan_corpus
from llm.preprocess.encode import EncodedCorpus, encode_corpus
from llm.preprocess.workers import Workers
from llm.tokenizer.bpe import Tokenizer
from tests.datasets import read_split

LEAK_FREE = CorpusSplit(split="leak_free", val=0.1, test=0.2, chunk_chars=2000)
BOOK = CorpusSplit(split="book", val=0.1, test=0.2, chunk_chars=2000)
SEED = 123
ALONE = Workers(1)  # without processes


def encode_all(path: Path, folder: Path, params: CorpusSplit, tokenizer: Tokenizer, **options: Any) -> EncodedCorpus:
    workers = options.get("workers", ALONE)
    plan = plan_corpus(path, params, SEED, workers)
    tokenizer_folder = folder.with_name(f"{folder.name}.tokenizer")
    tokenizer.save(tokenizer_folder)
    return encode_corpus(path, folder, plan, tokenizer_folder, options.get("tokens_per_shard", 10**6), workers)


def read_texts(folder: Path, split: str, tokenizer: Tokenizer) -> list[str]:
    """Return the texts between the separators."""
    text = tokenizer.decode(read_split(folder, split))
    return text.split("<|endoftext|>")[:-1]
