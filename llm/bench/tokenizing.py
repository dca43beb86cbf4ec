"""The benchmark `tokenize`: text to token ids, with one vocabulary for all, trained on that text.

This project does the work of its stage: it reads records from a file, encodes them in processes and writes shards. The
peers have the text in memory and drop the ids again, on one core.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from llm.bench.harness import OURS, Benchmark, Workload, run_apart
from llm.common.errors import InputError
from llm.config import CorpusSplit
from llm.preprocess.corpus import LineBatch, plan_corpus, read_batch
from llm.preprocess.encode import encode_corpus
from llm.preprocess.text import normalise
from llm.preprocess.workers import Workers
from llm.tokenizer.bpe import GPT2_PATTERN, SPECIAL_TOKENS, Tokenizer

SAMPLE = Path(__file__).resolve().parents[2] / "data" / "sample" / "stories.txt"
SEPARATOR = "\n\n\n"  # between two documents of the sample
SHARD_TOKENS = 2**24
SPLIT = CorpusSplit(split="leak_free", val=0.05, test=0.05, chunk_chars=10_000)


class TokenizeSizes(NamedTuple):
    """The documents of a file, repeated until they have so many million bytes."""

    megabytes: int
    vocab: int
    processes: int
    text: str  # the file

    def documents(self) -> list[str]:
        return read_documents(Path(self.text))

    def passes(self, documents: Sequence[str]) -> int:
        return math.ceil(1e6 * self.megabytes / utf8_bytes(documents))


def read_documents(path: Path) -> list[str]:
    """Return the cleaned documents of a text file, or of the records of the download stage."""
    try:
        parts = stored_documents(path) if path.suffix == ".jsonl" else path.read_text(encoding="utf-8").split(SEPARATOR)
    except FileNotFoundError:
        raise InputError(f"{path}: not found; name a text file with --text") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not valid UTF-8; convert it first") from None
    if documents := [document for part in parts if (document := normalise(part)).strip()]:
        return documents
    raise InputError(f"{path}: empty; name a file with text")


def stored_documents(path: Path) -> list[str]:
    """Return the documents of a `corpus.jsonl`, each whole."""
    documents: dict[int, str] = defaultdict(str)
    for number, piece in read_batch(path, LineBatch(0, path.stat().st_size)):
        documents[number] += piece
    return list(documents.values())


def write_records(path: Path, documents: Iterable[str]) -> None:
    """Write records as the download stage does, each document whole."""
    with path.open("w", encoding="utf-8") as file:
        for number, document in enumerate(documents):
            file.write(json.dumps({"doc": number, "text": document}, ensure_ascii=False) + "\n")


def utf8_bytes(texts: Iterable[str]) -> int:
    return sum(len(text.encode()) for text in texts)


# ---- implementations -------------------------------------------------------------------------------------------------


def tokenize_ours(sizes: TokenizeSizes, processes: int | None = None) -> Workload:
    """Return the workload of our tokenize stage: all of its encoding. The splits are planned once, before."""
    documents = sizes.documents()
    passes = sizes.passes(documents)
    folder = Path(tempfile.mkdtemp())
    corpus, vocabulary, shards = folder / "corpus.jsonl", folder / "tokenizer", folder / "shards"
    write_records(corpus, (document for _ in range(passes) for document in documents))
    Tokenizer.train(documents, sizes.vocab).save(vocabulary)
    workers = Workers(processes or sizes.processes)
    plan = plan_corpus(corpus, SPLIT, 0, workers)
    amount = passes * utf8_bytes(documents) / 1e6

    def run() -> float:
        encode_corpus(corpus, shards, plan, vocabulary, SHARD_TOKENS, workers)
        shutil.rmtree(shards)
        return amount

    return run


Encode = Callable[[Sequence[str]], Iterator[Sequence[int]]]  # texts to the ids of each


def tokenize_peer(encoder: Callable[[Tokenizer, Sequence[str]], Encode], sizes: TokenizeSizes) -> Workload:
    """Return the workload of a peer; its `encoder` gets our vocabulary and the documents that it was trained on."""
    documents = sizes.documents()
    encode = encoder(Tokenizer.train(documents, sizes.vocab), documents)
    passes = sizes.passes(documents)
    amount = passes * utf8_bytes(documents) / 1e6

    def run() -> float:
        for _ in range(passes):
            for ids in encode(documents):
                del ids
        return amount

    return run


def tiktoken_encoder(tokenizer: Tokenizer, documents: Sequence[str]) -> Encode:
    import tiktoken

    ranks = {token: rank for rank, token in enumerate(tokenizer.ranks) if token is not None}
    encoding = tiktoken.Encoding(
        "bench", pat_str=tokenizer.pattern, mergeable_ranks=ranks, special_tokens=tokenizer.special_tokens
    )
    return lambda texts: map(encoding.encode_ordinary, texts)


def tokenizers_encoder(tokenizer: Tokenizer, documents: Sequence[str]) -> Encode:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import tokenizers

    folder = Path(tempfile.mkdtemp())
    tokenizer.save(folder)
    run_apart(write_tokenizers_form, folder)
    encoding = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda texts: (found.ids for found in encoding.encode_batch_fast(list(texts), add_special_tokens=False))


def write_tokenizers_form(folder: Path) -> None:
    """Write the tokenizer of a folder in Hugging Face's form too."""
    from llm.tokenizer.hf import write_tokenizer_json

    write_tokenizer_json(folder, Tokenizer.load(folder), None, None)


def rustbpe_encoder(tokenizer: Tokenizer, documents: Sequence[str]) -> Encode:
    """Return rustbpe's encoder. It reads no vocabulary, so it trains the same one again."""
    import rustbpe

    encoding = rustbpe.Tokenizer()
    encoding.train_from_iterator(iter(documents), tokenizer.vocab_size - len(SPECIAL_TOKENS), pattern=GPT2_PATTERN)
    return lambda texts: map(encoding.encode, texts)


TOKENIZE = Benchmark(
    "tokenize",
    "MB/s",
    TokenizeSizes(megabytes=100, vocab=1280, processes=2, text=str(SAMPLE)),
    {
        OURS: tokenize_ours,
        f"{OURS}, one process": partial(tokenize_ours, processes=1),
        "tiktoken, one core": partial(tokenize_peer, tiktoken_encoder),
        "tokenizers, one core": partial(tokenize_peer, tokenizers_encoder),
        "rustbpe, one core": partial(tokenize_peer, rustbpe_encoder),
    },
)
