"""The contest `tokenize`: text to token ids, with one vocabulary for all, trained on that text.

This project does what its stage does: it reads records from a file, encodes them in processes and writes shards. The
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

from llm.bench.contest import OURS, Contest, Turn, apart
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


class Text(NamedTuple):
    """A file's documents, as often as they make up at least so many million bytes."""

    megabytes: int
    vocab: int
    processes: int
    text: str  # the file

    def documents(self) -> list[str]:
        return read_documents(Path(self.text))

    def passes(self, documents: Sequence[str]) -> int:
        return math.ceil(1e6 * self.megabytes / utf8_bytes(documents))


def read_documents(path: Path) -> list[str]:
    """The documents of a text file, or of the records of a download stage; cleaned as that stage cleans them."""
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
    """Those of a `corpus.jsonl`, each whole."""
    documents: dict[int, str] = defaultdict(str)
    for number, piece in read_batch(path, LineBatch(0, path.stat().st_size)):
        documents[number] += piece
    return list(documents.values())


def write_records(path: Path, documents: Iterable[str]) -> None:
    """As the download stage leaves them, each document whole."""
    with path.open("w", encoding="utf-8") as file:
        for number, document in enumerate(documents):
            file.write(json.dumps({"doc": number, "text": document}, ensure_ascii=False) + "\n")


def utf8_bytes(texts: Iterable[str]) -> int:
    return sum(len(text.encode()) for text in texts)


# ---- contestants -----------------------------------------------------------------------------------------------------


def tokenize_ours(sizes: Text, processes: int | None = None) -> Turn:
    """All of the stage's encoding; what the stage does before it, finding out where to split, is done once."""
    documents = sizes.documents()
    passes = sizes.passes(documents)
    folder = Path(tempfile.mkdtemp())
    corpus, vocabulary, shards = folder / "corpus.jsonl", folder / "tokenizer", folder / "shards"
    write_records(corpus, (document for _ in range(passes) for document in documents))
    Tokenizer.train(documents, sizes.vocab).save(vocabulary)
    workers = Workers(processes or sizes.processes)
    plan = plan_corpus(corpus, SPLIT, 0, workers)
    amount = passes * utf8_bytes(documents) / 1e6

    def turn() -> float:
        encode_corpus(corpus, shards, plan, vocabulary, SHARD_TOKENS, workers)
        shutil.rmtree(shards)
        return amount

    return turn


Encode = Callable[[Sequence[str]], Iterator[Sequence[int]]]  # texts to the ids of each


def tokenize_peer(encoder: Callable[[Tokenizer, Sequence[str]], Encode], sizes: Text) -> Turn:
    """A peer that encodes the documents as often as we do. `encoder` gets our vocabulary and what it was trained on."""
    documents = sizes.documents()
    encode = encoder(Tokenizer.train(documents, sizes.vocab), documents)
    passes = sizes.passes(documents)
    amount = passes * utf8_bytes(documents) / 1e6

    def turn() -> float:
        for _ in range(passes):
            for ids in encode(documents):
                del ids
        return amount

    return turn


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
    apart(write_theirs, folder)
    encoding = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda texts: (found.ids for found in encoding.encode_batch_fast(list(texts), add_special_tokens=False))


def write_theirs(folder: Path) -> None:
    """A tokenizer folder in Hugging Face's form too."""
    from llm.tokenizer.hf import write_tokenizer_json

    write_tokenizer_json(folder, Tokenizer.load(folder), None, None)


def rustbpe_encoder(tokenizer: Tokenizer, documents: Sequence[str]) -> Encode:
    """It reads no vocabulary: it trains the same one again."""
    import rustbpe

    encoding = rustbpe.Tokenizer()
    encoding.train_from_iterator(iter(documents), tokenizer.vocab_size - len(SPECIAL_TOKENS), pattern=GPT2_PATTERN)
    return lambda texts: map(encoding.encode, texts)


TOKENIZE = Contest(
    "tokenize",
    "MB/s",
    Text(megabytes=100, vocab=1280, processes=2, text=str(SAMPLE)),
    {
        OURS: tokenize_ours,
        f"{OURS}, one process": partial(tokenize_ours, processes=1),
        "tiktoken, one core": partial(tokenize_peer, tiktoken_encoder),
        "tokenizers, one core": partial(tokenize_peer, tokenizers_encoder),
        "rustbpe, one core": partial(tokenize_peer, rustbpe_encoder),
    },
)
