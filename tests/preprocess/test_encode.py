"""Encoding with any number of workers into token shards.

Run as a module it measures instead: seconds, peak memory and a checksum of the output, for so many megabytes made from
the sentences of a text. `python -m tests.preprocess.test_encode data/sample/stories.txt 40 2`: 40 MB, 2 workers.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from llm.config import SPLITS, CorpusSplit
from llm.preprocess import corpus, encode
from llm.preprocess.corpus import plan_corpus, training_texts
from llm.preprocess.encode import encode_corpus
from llm.preprocess.workers import Workers
from llm.tokenizer.bpe import Tokenizer
from tests.datasets import document, folder_digest, read_split, words, write_corpus
from tests.preprocess.pipeline import BOOK, LEAK_FREE, SEED, encode_all, read_texts


def test_shards_are_full_but_the_last(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_corpus(tmp_path / "corpus.jsonl", [document(seed) for seed in range(40)])
    one = encode_all(path, tmp_path / "one", LEAK_FREE, tokenizer).meta
    many = encode_all(path, tmp_path / "many", LEAK_FREE, tokenizer, tokens_per_shard=100).meta
    for split in SPLITS:
        assert read_split(tmp_path / "one", split) == read_split(tmp_path / "many", split)
        sizes = [(tmp_path / "many" / name).stat().st_size for name in many["splits"][split]["shards"]]
        assert set(sizes[:-1]) == {200}
        assert 0 < sizes[-1] <= 200
        assert one["splits"][split]["shards"] == [f"{split}-00000.bin"]


def test_dtype_follows_the_vocabulary() -> None:
    assert encode.token_dtype(65_536) == np.dtype("<u2")
    assert encode.token_dtype(65_537) == np.dtype("<u4")


@pytest.mark.parametrize("params", [LEAK_FREE, BOOK], ids=["leak_free", "book"])
def test_the_bytes_do_not_depend_on_workers_and_batches(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, params: CorpusSplit
) -> None:
    documents = [document(1, paragraphs=60), *([document(seed), document(-seed)] for seed in range(2, 60))]
    path = write_corpus(tmp_path / "corpus.jsonl", documents)
    encode_all(path, tmp_path / "a", params, tokenizer)
    monkeypatch.setattr(corpus, "BATCH_BYTES", 3000)
    assert len(corpus.line_batches(path)) > 10
    encode_all(path, tmp_path / "b", params, tokenizer)
    with Workers(2) as workers:
        encode_all(path, tmp_path / "c", params, tokenizer, workers=workers)
    assert folder_digest(tmp_path / "a") == folder_digest(tmp_path / "b") == folder_digest(tmp_path / "c")


@pytest.mark.parametrize("count", [1, 2])
def test_a_tokenizer_that_is_written_again_is_read_again(tmp_path: Path, tokenizer: Tokenizer, count: int) -> None:
    path = write_corpus(tmp_path / "corpus.jsonl", [document(seed) for seed in range(20)])
    other = Tokenizer.train([document(seed) for seed in range(30)], 300)
    with Workers(count) as workers:
        plan = plan_corpus(path, LEAK_FREE, SEED, workers)
        for name, each in (("a", tokenizer), ("b", other)):
            each.save(tmp_path / "tokenizer")
            encode_corpus(path, tmp_path / name, plan, tmp_path / "tokenizer", 10**6, workers)
    train = [read_texts(tmp_path / name, "train", each) for name, each in (("a", tokenizer), ("b", other))]
    assert train[0] == train[1]
    assert len(read_split(tmp_path / "a", "train")) < len(read_split(tmp_path / "b", "train"))


# ---- measuring -------------------------------------------------------------------------------------------------------


def synthetic_corpus(source: Path, path: Path, n_bytes: int) -> None:
    """Documents of a megabyte: the sentences of the source shuffled, a few of them with words of their own."""
    chooser = random.Random(0)
    sentences = source.read_text(encoding="utf-8", errors="replace").split(". ")
    written = number = 0
    with path.open("w", encoding="utf-8") as file:
        while written < n_bytes:
            chosen = chooser.choices(sentences, k=1_000_000 * len(sentences) // sum(map(len, sentences)))
            text = "".join(f"{s} {words(chooser, 1)}.\n\n" if i % 20 == 0 else f"{s}. " for i, s in enumerate(chosen))
            written += file.write(json.dumps({"doc": number, "text": text}, ensure_ascii=False) + "\n")
            number += 1


def measure(source: Path, megabytes: int, n_workers: int, vocab_size: int = 8192) -> None:
    folder = Path(tempfile.mkdtemp())
    params = CorpusSplit(split="leak_free", val=0.05, test=0.05, chunk_chars=10_000)
    try:
        path = folder / "corpus.jsonl"
        synthetic_corpus(source, path, megabytes * 1_000_000)
        start, times = time.process_time(), [time.perf_counter()]
        with Workers(n_workers) as workers:
            plan = plan_corpus(path, params, SEED, workers)
            times.append(time.perf_counter())
            tokenizer = Tokenizer.train(training_texts(path, plan, 50_000_000), vocab_size)
            times.append(time.perf_counter())
            tokenizer.save(folder / "tokenizer")
            encode_corpus(path, folder / "out", plan, folder / "tokenizer", 2**24, workers)
        times.append(time.perf_counter())
        survey, train, encoding = np.diff(times)
        own, workers_own = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        processor = time.process_time() - start + workers_own.ru_utime + workers_own.ru_stime
        print(f"{megabytes} MB, {n_workers} workers: {times[-1] - times[0]:.1f} s, processor {processor:.1f} s")
        print(f"  survey {survey:.1f} s, vocabulary {train:.1f} s, encoding {encoding:.1f} s")
        print(f"  peak MiB: {own.ru_maxrss // 1024}, largest worker {workers_own.ru_maxrss // 1024}")
        print(f"  {folder_digest(folder / 'out')}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    measure(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
