"""The corpus on its way into shards: sections, leak-free and book splits, encoding with any number of workers.

Run as a module it measures instead: seconds, peak memory and a checksum of the output, for so many megabytes made from
the sentences of a text. `python -m tests.test_corpus data/sample/stories.txt 40 2`: 40 MB, 2 workers.
"""

from __future__ import annotations

import doctest
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm.common.errors import InputError
from llm.config import CorpusSplit
from llm.preprocess import corpus
from llm.preprocess import data_card as datacard
from llm.preprocess.corpus import EncodedCorpus, Workers, cut_chunks, encode_corpus, plan_corpus, training_texts
from llm.preprocess.text import SPLITS, dedup_key
from llm.tokenizer.bpe import Tokenizer
from tests.datasets import disguise, document, folder_digest, read_split, words, write_corpus

LEAK_FREE = CorpusSplit(split="leak_free", val=0.1, test=0.2, chunk_chars=2000)
BOOK = CorpusSplit(split="book", val=0.1, test=0.2, chunk_chars=2000)
SEED = 123
ALONE = Workers(1)  # without processes


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([document(seed) for seed in range(30)], 400)


def encode(path: Path, folder: Path, params: CorpusSplit, tokenizer: Tokenizer, **options: Any) -> EncodedCorpus:
    workers = options.get("workers", ALONE)
    plan = plan_corpus(path, params, SEED, workers)
    tokenizer_folder = folder.with_name(f"{folder.name}.tokenizer")
    tokenizer.save(tokenizer_folder)
    return encode_corpus(path, folder, plan, tokenizer_folder, options.get("tokens_per_shard", 10**6), workers)


def read_texts(folder: Path, split: str, tokenizer: Tokenizer) -> list[str]:
    """The texts between the separators."""
    text = tokenizer.decode(read_split(folder, split))
    return text.split("<|endoftext|>")[:-1]


def test_examples() -> None:
    assert doctest.testmod(corpus).failed == 0


# ---- sections --------------------------------------------------------------------------------------------------------


def test_sections_join_to_the_text() -> None:
    for seed in range(5):
        text = document(seed, paragraphs=30)
        pieces = cut_chunks(text, 1000)
        assert "".join(pieces) == text
        assert all(300 < len(piece) <= 1000 for piece in pieces)
        assert all(piece.endswith("\n\n") for piece in pieces[:-1])


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("word.\n" * 13 + "\n  \n" + "word.\n" * 16, "\n  \n"),
        ("word. " * 13 + "\n" + "word. " * 16, "\n"),
        ("word word. " * 18, ". "),
        ("文字。" * 60, "。"),
        ("word " * 36, " "),
        ("x" * 180, "x"),
    ],
)
def test_sections_end_at_the_best_place(text: str, end: str) -> None:
    first, second = cut_chunks(text, 140)
    assert first + second == text
    assert first.endswith(end)


def test_short_and_empty_texts_are_not_cut() -> None:
    assert cut_chunks("a\n\nb", 4) == ["a\n\nb"]
    assert cut_chunks("", 4) == []


# ---- leak-free split -------------------------------------------------------------------------------------------------


def test_every_text_comes_back_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = [document(seed) for seed in range(100)]
    path = write_corpus(tmp_path / "corpus.jsonl", documents)
    meta = encode(path, tmp_path / "out", LEAK_FREE, tokenizer).meta
    found = {split: read_texts(tmp_path / "out", split, tokenizer) for split in SPLITS}
    assert sorted(text for texts in found.values() for text in texts) == sorted(documents)
    assert [len(found[split]) for split in SPLITS] == [70, 10, 20]
    for split in SPLITS:
        assert meta["splits"][split]["documents"] == len(found[split])
        assert meta["splits"][split]["bytes"] == sum(len(text.encode()) for text in found[split])
        assert meta["splits"][split]["tokens"] == len(read_split(tmp_path / "out", split))


@pytest.mark.parametrize("params", [LEAK_FREE, BOOK], ids=["leak_free", "book"])
def test_documents_without_text_are_left_out(tmp_path: Path, tokenizer: Tokenizer, params: CorpusSplit) -> None:
    documents = ["", document(1), "\x00", ["\ufeff", document(2), ""], document(3), ""]
    path = write_corpus(tmp_path / "corpus.jsonl", documents)
    encode(path, tmp_path / "empty", params, tokenizer)
    encode(write_corpus(path, [document(seed) for seed in (1, 2, 3)]), tmp_path / "full", params, tokenizer)
    assert folder_digest(tmp_path / "empty") == folder_digest(tmp_path / "full")


def test_long_documents_are_cut_and_their_sections_follow_each_other(tmp_path: Path, tokenizer: Tokenizer) -> None:
    long, short = document(1, paragraphs=150), document(2)
    path = write_corpus(tmp_path / "corpus.jsonl", [long, short])
    encode(path, tmp_path / "out", LEAK_FREE, tokenizer)
    texts = {split: read_texts(tmp_path / "out", split, tokenizer) for split in SPLITS}
    assert all(texts.values())
    runs = [text for split in SPLITS for text in texts[split] if text != short]
    assert sum(map(len, runs)) == len(long)
    assert all(run in long for run in runs)
    # A run of sections in one split is continuous text: the next character of the document is in another split.
    for split in SPLITS:
        ends = {long.index(text) + len(text) for text in texts[split] if text in long}
        assert not ends & {long.index(text) for text in texts[split] if text in long}
    assert max(map(len, runs)) > LEAK_FREE.chunk_chars


def test_equal_documents_stand_in_one_split(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = [document(seed) for seed in range(50)]
    path = write_corpus(tmp_path / "corpus.jsonl", [*documents, *map(disguise, documents)])
    plan = plan_corpus(path, LEAK_FREE, SEED, ALONE)
    assert plan.unit_split[:50].tolist() == plan.unit_split[50:].tolist()
    assert set(plan.unit_split.tolist()) == {0, 1, 2}
    tokenizer.save(tmp_path / "tokenizer")
    encoded = encode_corpus(path, tmp_path / "out", plan, tmp_path / "tokenizer", 10**6, ALONE)
    card = datacard.describe_corpus(plan, encoded, "leak_free")
    assert card["duplicate_documents"] == card["duplicate_units"] == 50
    assert card["leaked_units"] == {"val": 0, "test": 0}


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chosen=st.lists(st.tuples(st.integers(0, 30), st.booleans()), min_size=1, max_size=40), seed=st.integers(0, 99))
def test_no_document_stands_in_two_splits_and_every_one_in_one(
    tmp_path: Path, tokenizer: Tokenizer, chosen: list[tuple[int, bool]], seed: int
) -> None:
    documents = [disguise(document(n, paragraphs=1)) if loud else document(n, paragraphs=1) for n, loud in chosen]
    path = write_corpus(tmp_path / "corpus.jsonl", documents)
    try:
        plan = plan_corpus(path, LEAK_FREE, seed, ALONE)
    except InputError as error:
        assert len({n for n, _ in chosen}) < 3, error
        return
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    tokenizer.save(tmp_path / "tokenizer")
    encode_corpus(path, tmp_path / "out", plan, tmp_path / "tokenizer", 10**6, ALONE)
    found = {split: read_texts(tmp_path / "out", split, tokenizer) for split in SPLITS}
    keys = {split: set(map(dedup_key, texts)) for split, texts in found.items()}
    assert not (keys["train"] & keys["val"] or keys["train"] & keys["test"] or keys["val"] & keys["test"])
    assert sorted(text for texts in found.values() for text in texts) == sorted(documents)


def test_equal_long_documents_stand_in_one_split_wherever_they_would_be_cut(tmp_path: Path) -> None:
    long = document(1, paragraphs=100)
    other = disguise(long).replace("\n\n", " ")
    halves = [other[: len(other) // 2], other[len(other) // 2 :]]
    path = write_corpus(tmp_path / "corpus.jsonl", [long, halves, *(document(seed) for seed in range(2, 40))])
    plan = plan_corpus(path, LEAK_FREE, SEED, ALONE)
    assert (plan.unit_document <= 1).sum() > 10
    assert len(set(plan.unit_split[plan.unit_document <= 1].tolist())) == 1


def test_a_document_written_as_several_records_is_not_cut_unless_it_is_long(tmp_path: Path) -> None:
    whole = CorpusSplit(split="leak_free", val=0.1, test=0.2, chunk_chars=10**6)
    records = [[document(seed), document(seed + 1000), document(seed + 2000)] for seed in range(30)]
    plan = plan_corpus(write_corpus(tmp_path / "corpus.jsonl", records), whole, SEED, ALONE)
    for number in range(30):
        assert len(set(plan.unit_split[plan.unit_document == number].tolist())) == 1
    assert plan.unit_ends.tolist() == [False, False, True] * 30


def test_a_short_document_equal_to_a_section_of_a_long_one(tmp_path: Path) -> None:
    long = document(1, paragraphs=100)
    sections = cut_chunks(long, LEAK_FREE.chunk_chars)
    plan = plan_corpus(write_corpus(tmp_path / "c.jsonl", [long, *map(str.upper, sections)]), LEAK_FREE, SEED, ALONE)
    assert plan.unit_split[: len(sections)].tolist() == plan.unit_split[len(sections) :].tolist()


def test_the_seed_decides_and_the_order_does_not(tmp_path: Path) -> None:
    documents = [document(seed) for seed in range(100)]

    def splits(seed: int, order: list[str]) -> dict[str, int]:
        plan = plan_corpus(write_corpus(tmp_path / "corpus.jsonl", order), LEAK_FREE, seed, ALONE)
        return dict(zip(order, plan.unit_split.tolist(), strict=True))

    assert splits(1, documents) == splits(1, documents[::-1])
    assert splits(1, documents) != splits(2, documents)


@pytest.mark.parametrize("texts", [["one text"], ["one text", "One, text!", "two texts"]])
def test_too_few_different_documents(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(InputError, match=r"too little text to split.*chunk_chars.*split: book") as caught:
        plan_corpus(write_corpus(tmp_path / "corpus.jsonl", texts), LEAK_FREE, SEED, ALONE)
    assert "\n" not in str(caught.value)


def test_three_documents_are_enough(tmp_path: Path) -> None:
    plan = plan_corpus(write_corpus(tmp_path / "c.jsonl", ["one", "two", "three"]), LEAK_FREE, SEED, ALONE)
    assert sorted(plan.unit_split.tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "file not found; run the download stage"),
        ("", "no text is left"),
        ('{"doc": 0, "text": "\\u0000"}\n', "no text is left"),
        ("<html>\n", "expected a JSON object"),
        ("[]\n", "expected a JSON object"),
        ('{"doc": 0}\n', "expected text under 'text', found None"),
        ('{"text": "a"}\n', "expected a number under 'doc', found None"),
    ],
)
def test_bad_corpus_files(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "corpus.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        plan_corpus(path, LEAK_FREE, SEED, ALONE)
    assert "\n" not in str(caught.value)


# ---- the book's split ------------------------------------------------------------------------------------------------


def test_book_split_is_nine_tenths_of_the_characters(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = [document(seed) for seed in range(10)]
    path = write_corpus(tmp_path / "corpus.jsonl", documents)
    encode(path, tmp_path / "out", BOOK, tokenizer)
    train, val = (tokenizer.decode(read_split(tmp_path / "out", split)) for split in ("train", "val"))
    joined = "".join(documents)
    cut = int(0.9 * len(joined))
    assert train.replace("<|endoftext|>", "") == joined[:cut]
    assert val.replace("<|endoftext|>", "") == joined[cut:]
    assert (train + val).split("<|endoftext|>") == documents  # between documents only, not where the text is cut
    assert read_split(tmp_path / "out", "test") == []


def test_book_split_between_two_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    encoded = encode(write_corpus(tmp_path / "c.jsonl", ["x" * 9, "y"]), tmp_path / "out", BOOK, tokenizer)
    assert tokenizer.decode(read_split(tmp_path / "out", "train")) == "x" * 9
    assert tokenizer.decode(read_split(tmp_path / "out", "val")) == "y"
    assert [encoded.meta["splits"][split]["documents"] for split in SPLITS] == [1, 1, 0]


def test_book_split_of_one_document_is_the_text_encoded_in_two_parts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = document(3, paragraphs=20)
    encode(write_corpus(tmp_path / "corpus.jsonl", [text]), tmp_path / "out", BOOK, tokenizer)
    cut = int(0.9 * len(text))
    assert read_split(tmp_path / "out", "train") == tokenizer.encode(text[:cut])
    assert read_split(tmp_path / "out", "val") == tokenizer.encode(text[cut:])


def test_the_verdict(tmp_path: Path) -> None:
    folder = Path(os.environ.get("LLM_TEST_MIRROR", "nowhere"))
    if not (folder / "the-verdict.txt").exists():
        pytest.skip("the-verdict.txt is not here: set LLM_DATA_MIRROR to a folder that holds it")
    text = (folder / "the-verdict.txt").read_text(encoding="utf-8")
    gpt2 = Tokenizer.gpt2(folder / "encoder.json", folder / "vocab.bpe")
    assert (len(text), len(gpt2.encode(text))) == (20_479, 5_145)
    splits = encode(write_corpus(tmp_path / "corpus.jsonl", [text]), tmp_path / "out", BOOK, gpt2).meta["splits"]
    # A word lies across the cut, which makes one token more of the two parts.
    assert [(splits[name]["bytes"], splits[name]["tokens"]) for name in SPLITS] == [(18431, 4612), (2048, 534), (0, 0)]


def test_book_split_of_one_character(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="too little"):
        plan_corpus(write_corpus(tmp_path / "corpus.jsonl", ["x"]), BOOK, SEED, ALONE)


# ---- vocabulary and shards -------------------------------------------------------------------------------------------


def test_the_vocabulary_sees_the_train_split_only(tmp_path: Path) -> None:
    documents = [f"{document(seed)} marker{seed:03d}" for seed in range(60)]
    path = write_corpus(tmp_path / "corpus.jsonl", documents)
    plan = plan_corpus(path, LEAK_FREE, SEED, ALONE)
    texts = list(training_texts(path, plan, 10**9))
    assert texts == [text for text, split in zip(documents, plan.unit_split, strict=True) if split == 0]


def test_training_text_is_limited_and_taken_from_all_over(tmp_path: Path) -> None:
    documents = [document(1, paragraphs=200), *(document(seed) for seed in range(2, 200))]
    path = write_corpus(tmp_path / "corpus.jsonl", documents)
    plan = plan_corpus(path, LEAK_FREE, SEED, ALONE)
    limit = 20_000
    texts = list(training_texts(path, plan, limit))
    assert 0.95 * limit <= sum(map(len, texts)) <= limit
    places = [next(i for i, whole in enumerate(documents) if text in whole) for text in texts]
    assert places == sorted(places)
    assert np.histogram(places, bins=4, range=(1, 200))[0].min() >= 5
    assert "".join(training_texts(path, plan, 10)) == texts[0][:10]


def test_shards_are_full_but_the_last(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_corpus(tmp_path / "corpus.jsonl", [document(seed) for seed in range(40)])
    one = encode(path, tmp_path / "one", LEAK_FREE, tokenizer).meta
    many = encode(path, tmp_path / "many", LEAK_FREE, tokenizer, tokens_per_shard=100).meta
    for split in SPLITS:
        assert read_split(tmp_path / "one", split) == read_split(tmp_path / "many", split)
        sizes = [(tmp_path / "many" / name).stat().st_size for name in many["splits"][split]["shards"]]
        assert set(sizes[:-1]) == {200}
        assert 0 < sizes[-1] <= 200
        assert one["splits"][split]["shards"] == [f"{split}-00000.bin"]


def test_dtype_follows_the_vocabulary() -> None:
    assert corpus.token_dtype(65_536) == np.dtype("<u2")
    assert corpus.token_dtype(65_537) == np.dtype("<u4")


@pytest.mark.parametrize("params", [LEAK_FREE, BOOK], ids=["leak_free", "book"])
def test_the_bytes_do_not_depend_on_workers_and_batches(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, params: CorpusSplit
) -> None:
    documents = [document(1, paragraphs=60), *([document(seed), document(-seed)] for seed in range(2, 60))]
    path = write_corpus(tmp_path / "corpus.jsonl", documents)
    encode(path, tmp_path / "a", params, tokenizer)
    monkeypatch.setattr(corpus, "BATCH_BYTES", 3000)
    assert len(corpus.batches_of(path)) > 10
    encode(path, tmp_path / "b", params, tokenizer)
    with Workers(2) as workers:
        encode(path, tmp_path / "c", params, tokenizer, workers=workers)
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


# ---- processes -------------------------------------------------------------------------------------------------------


def double(number: int, factor: int) -> int:
    if number < 0:
        raise InputError("negative")
    return factor * number


@pytest.mark.parametrize("count", [1, 2])
def test_few_jobs_are_under_way_at_a_time(count: int) -> None:
    taken = 0

    def jobs() -> Iterator[int]:
        nonlocal taken
        for number in range(100):
            taken += 1
            yield number

    with Workers(count) as workers:
        for done, result in enumerate(workers.in_order(double, jobs(), 2)):
            assert result == 2 * done
            assert taken - done <= 2 * count
        assert taken == 100


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_in_a_worker_is_the_same_error(count: int) -> None:
    with Workers(count) as workers:
        with pytest.raises(InputError, match="negative"):
            list(workers.in_order(double, [1, 2, -3, 4], 2))
        assert list(workers.in_order(double, [5], 3)) == [15]


def end_at(number: int, last: int) -> int:
    if number == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_worker_that_is_killed_is_one_line() -> None:
    with Workers(2) as workers, pytest.raises(InputError, match=r"^runtime.workers: one of the processes was killed"):
        list(workers.in_order(end_at, range(20), 5))


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
