"""Preparing data: normalising, leak-free and book splits, shards, the data card, the tokenize stage.

Run as a module it measures instead: seconds, peak memory and a checksum of the output, for so many megabytes made from
the sentences of a text. `python -m tests.test_prepare data/sample/stories.txt 40 2`: 40 MB, 2 workers.
"""

from __future__ import annotations

import doctest
import hashlib
import json
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from llm import datacard, prepare
from llm.config import CorpusSplit, InputError, LabelledSplit, parse_params
from llm.prepare import SPLITS, cut_sections, leak_key, normalise
from llm.tokenizer import Tokenizer
from stages.tokenize import tokenize

LEAK_FREE = CorpusSplit(split="leak_free", val=0.1, test=0.2, section_chars=2000)
BOOK = CorpusSplit(split="book", val=0.1, test=0.2, section_chars=2000)
ROWS = LabelledSplit(split="leak_free", val=0.1, test=0.2)
SEED = 123
ALONE = prepare.Workers(1)  # without processes


def words(chooser: random.Random, n: int) -> str:
    return " ".join("".join(chooser.choices("abcdefghij", k=chooser.randint(1, 8))) for _ in range(n))


def document(seed: int, paragraphs: int = 2) -> str:
    chooser = random.Random(seed)
    return "\n\n".join(words(chooser, 40) + "." for _ in range(paragraphs))


def write_corpus(path: Path, documents: Sequence[str | Sequence[str]]) -> Path:
    """Each document is a text, or the several texts of the records that it is written as."""
    with path.open("w", encoding="utf-8") as file:
        for number, texts in enumerate(documents):
            for text in [texts] if isinstance(texts, str) else texts:
                file.write(json.dumps({"doc": number, "text": text}, ensure_ascii=False) + "\n")
    return path


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([document(seed) for seed in range(30)], 400)


def encode(
    path: Path, folder: Path, params: CorpusSplit, tokenizer: Tokenizer, **options: Any
) -> prepare.EncodedCorpus:
    workers = options.get("workers", ALONE)
    plan = prepare.plan_corpus(path, params, SEED, workers)
    return prepare.encode_corpus(path, folder, plan, tokenizer, options.get("shard_tokens", 10**6), workers)


def read_split(folder: Path, split: str) -> list[int]:
    meta = json.loads((folder / "meta.json").read_text())
    shards = [np.fromfile(folder / name, dtype=meta["dtype"]) for name in meta["splits"][split]["shards"]]
    return [int(number) for shard in shards for number in shard]


def read_texts(folder: Path, split: str, tokenizer: Tokenizer) -> list[str]:
    """The texts between the separators."""
    text = tokenizer.decode(read_split(folder, split))
    return text.split("<|endoftext|>")[:-1]


@pytest.mark.parametrize("module", [prepare, datacard])
def test_examples(module: ModuleType) -> None:
    assert doctest.testmod(module).failed == 0


# ---- text ------------------------------------------------------------------------------------------------------------


def test_normalise() -> None:
    assert normalise("\ufeffcafe\u0301\r\nb\rc\u2028d\x0ce\tf\x00\x1b[0m") == "café\nb\nc\nd\ne\tf[0m"
    assert normalise("a\ud800b") == "ab"
    assert normalise("👩\u200d👧") == "👩\u200d👧"  # joiners carry meaning


def test_normalise_is_idempotent() -> None:
    chooser = random.Random(0)
    for _ in range(300):
        text = "".join(map(chr, chooser.choices([*range(0x300), 0x301, 0x327, 0x1100, 0x1161, 0x2028, 0xD801], k=30)))
        once = normalise(text)
        assert normalise(once) == once
        assert unicodedata.is_normalized("NFC", once)
        assert not re.search(r"[^\S \n\t\xa0]", once)


def test_leak_key() -> None:
    assert leak_key("Free  entry:\n'CALL' n-o-w_!") == leak_key("free ENTRY call now")
    assert leak_key("STRASSE ﬁn Ⅷ") == leak_key("straße fin viii")
    assert leak_key("one two") != leak_key("one too")
    assert leak_key("日本語。") == leak_key("日本語")
    assert leak_key("?!") == "?!" != leak_key("!!")


def test_sections_join_to_the_text() -> None:
    for seed in range(5):
        text = document(seed, paragraphs=30)
        pieces = cut_sections(text, 1000)
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
    first, second = cut_sections(text, 140)
    assert first + second == text
    assert first.endswith(end)


def test_short_and_empty_texts_are_not_cut() -> None:
    assert cut_sections("a\n\nb", 4) == ["a\n\nb"]
    assert cut_sections("", 4) == []


# ---- corpus: leak-free -----------------------------------------------------------------------------------------------


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
    assert max(map(len, runs)) > LEAK_FREE.section_chars


def disguise(text: str) -> str:
    return text.upper().replace(" ", "  ").replace(".", " !?")


def test_equal_documents_stand_in_one_split(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = [document(seed) for seed in range(50)]
    path = write_corpus(tmp_path / "corpus.jsonl", [*documents, *map(disguise, documents)])
    plan = prepare.plan_corpus(path, LEAK_FREE, SEED, ALONE)
    assert plan.unit_split[:50].tolist() == plan.unit_split[50:].tolist()
    assert set(plan.unit_split.tolist()) == {0, 1, 2}
    encoded = prepare.encode_corpus(path, tmp_path / "out", plan, tokenizer, 10**6, ALONE)
    card = datacard.describe_corpus(plan, encoded, "leak_free")
    assert card["duplicate_documents"] == card["duplicate_units"] == 50
    assert card["leaked_units"] == {"val": 0, "test": 0}


def test_equal_long_documents_stand_in_one_split_wherever_they_would_be_cut(tmp_path: Path) -> None:
    long = document(1, paragraphs=100)
    other = disguise(long).replace("\n\n", " ")
    halves = [other[: len(other) // 2], other[len(other) // 2 :]]
    path = write_corpus(tmp_path / "corpus.jsonl", [long, halves, *(document(seed) for seed in range(2, 40))])
    plan = prepare.plan_corpus(path, LEAK_FREE, SEED, ALONE)
    assert (plan.unit_document <= 1).sum() > 10
    assert len(set(plan.unit_split[plan.unit_document <= 1].tolist())) == 1


def test_a_document_written_as_several_records_is_not_cut_unless_it_is_long(tmp_path: Path) -> None:
    whole = CorpusSplit(split="leak_free", val=0.1, test=0.2, section_chars=10**6)
    records = [[document(seed), document(seed + 1000), document(seed + 2000)] for seed in range(30)]
    plan = prepare.plan_corpus(write_corpus(tmp_path / "corpus.jsonl", records), whole, SEED, ALONE)
    for number in range(30):
        assert len(set(plan.unit_split[plan.unit_document == number].tolist())) == 1
    assert plan.unit_ends.tolist() == [False, False, True] * 30


def test_a_short_document_equal_to_a_section_of_a_long_one(tmp_path: Path) -> None:
    long = document(1, paragraphs=100)
    sections = cut_sections(long, LEAK_FREE.section_chars)
    plan = prepare.plan_corpus(
        write_corpus(tmp_path / "c.jsonl", [long, *map(str.upper, sections)]), LEAK_FREE, SEED, ALONE
    )
    assert plan.unit_split[: len(sections)].tolist() == plan.unit_split[len(sections) :].tolist()


def test_the_seed_decides_and_the_order_does_not(tmp_path: Path) -> None:
    documents = [document(seed) for seed in range(100)]

    def splits(seed: int, order: list[str]) -> dict[str, int]:
        plan = prepare.plan_corpus(write_corpus(tmp_path / "corpus.jsonl", order), LEAK_FREE, seed, ALONE)
        return dict(zip(order, plan.unit_split.tolist(), strict=True))

    assert splits(1, documents) == splits(1, documents[::-1])
    assert splits(1, documents) != splits(2, documents)


@pytest.mark.parametrize("texts", [["one text"], ["one text", "One, text!", "two texts"]])
def test_too_few_different_documents(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(InputError, match=r"too little text to split.*section_chars.*split: book") as caught:
        prepare.plan_corpus(write_corpus(tmp_path / "corpus.jsonl", texts), LEAK_FREE, SEED, ALONE)
    assert "\n" not in str(caught.value)


def test_three_documents_are_enough(tmp_path: Path) -> None:
    plan = prepare.plan_corpus(write_corpus(tmp_path / "c.jsonl", ["one", "two", "three"]), LEAK_FREE, SEED, ALONE)
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
        prepare.plan_corpus(path, LEAK_FREE, SEED, ALONE)
    assert "\n" not in str(caught.value)


# ---- corpus: the book's split ----------------------------------------------------------------------------------------


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
        prepare.plan_corpus(write_corpus(tmp_path / "corpus.jsonl", ["x"]), BOOK, SEED, ALONE)


# ---- corpus: vocabulary and shards -----------------------------------------------------------------------------------


def test_the_vocabulary_sees_the_train_split_only(tmp_path: Path) -> None:
    documents = [f"{document(seed)} marker{seed:03d}" for seed in range(60)]
    path = write_corpus(tmp_path / "corpus.jsonl", documents)
    plan = prepare.plan_corpus(path, LEAK_FREE, SEED, ALONE)
    texts = list(prepare.training_texts(path, plan, 10**9))
    assert texts == [text for text, split in zip(documents, plan.unit_split, strict=True) if split == 0]


def test_training_text_is_limited_and_taken_from_all_over(tmp_path: Path) -> None:
    documents = [document(1, paragraphs=200), *(document(seed) for seed in range(2, 200))]
    path = write_corpus(tmp_path / "corpus.jsonl", documents)
    plan = prepare.plan_corpus(path, LEAK_FREE, SEED, ALONE)
    limit = 20_000
    texts = list(prepare.training_texts(path, plan, limit))
    assert 0.95 * limit <= sum(map(len, texts)) <= limit
    places = [next(i for i, whole in enumerate(documents) if text in whole) for text in texts]
    assert places == sorted(places)
    assert np.histogram(places, bins=4, range=(1, 200))[0].min() >= 5
    assert "".join(prepare.training_texts(path, plan, 10)) == texts[0][:10]


def test_shards_are_full_but_the_last(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_corpus(tmp_path / "corpus.jsonl", [document(seed) for seed in range(40)])
    one = encode(path, tmp_path / "one", LEAK_FREE, tokenizer).meta
    many = encode(path, tmp_path / "many", LEAK_FREE, tokenizer, shard_tokens=100).meta
    for split in SPLITS:
        assert read_split(tmp_path / "one", split) == read_split(tmp_path / "many", split)
        sizes = [(tmp_path / "many" / name).stat().st_size for name in many["splits"][split]["shards"]]
        assert set(sizes[:-1]) == {200}
        assert 0 < sizes[-1] <= 200
        assert one["splits"][split]["shards"] == [f"{split}-00000.bin"]


def test_dtype_follows_the_vocabulary() -> None:
    assert prepare.token_dtype(65_536) == np.dtype("<u2")
    assert prepare.token_dtype(65_537) == np.dtype("<u4")


def folder_digest(folder: Path) -> str:
    digest = hashlib.md5()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


@pytest.mark.parametrize("params", [LEAK_FREE, BOOK], ids=["leak_free", "book"])
def test_the_bytes_do_not_depend_on_workers_and_batches(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, params: CorpusSplit
) -> None:
    documents = [document(1, paragraphs=60), *([document(seed), document(-seed)] for seed in range(2, 60))]
    path = write_corpus(tmp_path / "corpus.jsonl", documents)
    encode(path, tmp_path / "a", params, tokenizer)
    monkeypatch.setattr(prepare, "BATCH_BYTES", 3000)
    assert len(prepare.batches_of(path)) > 10
    encode(path, tmp_path / "b", params, tokenizer)
    with prepare.Workers(2) as workers:
        encode(path, tmp_path / "c", params, tokenizer, workers=workers)
    assert folder_digest(tmp_path / "a") == folder_digest(tmp_path / "b") == folder_digest(tmp_path / "c")


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

    with prepare.Workers(count) as workers:
        for done, result in enumerate(workers.in_order(double, jobs(), 2)):
            assert result == 2 * done
            assert taken - done <= 2 * count
        assert taken == 100


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_in_a_worker_is_the_same_error(count: int) -> None:
    with prepare.Workers(count) as workers:
        with pytest.raises(InputError, match="negative"):
            list(workers.in_order(double, [1, 2, -3, 4], 2))
        assert list(workers.in_order(double, [5], 3)) == [15]


# ---- messages and instruction pairs ----------------------------------------------------------------------------------


def message_rows(texts: Sequence[tuple[str, str]], splits: Sequence[str | None] | None = None) -> list[prepare.Row]:
    return [
        prepare.Row({"text": text, "label": label}, leak_key(text), text, label, label, split)
        for (text, label), split in zip(texts, splits or [None] * len(texts), strict=True)
    ]


def texts_of(split: prepare.SplitRows, name: str) -> list[str]:
    return [row.fields["text"] for row in split.rows[name]]


def test_messages_are_stratified() -> None:
    rows = message_rows([(f"text {i}", "spam" if i % 5 == 0 else "ham") for i in range(500)])
    split = prepare.split_messages(rows, ["ham", "spam"], ROWS, SEED)
    counts = datacard.counts_per_split(split, "label")
    assert counts["ham"] == {"train": 280, "val": 40, "test": 80}
    assert counts["spam"] == {"train": 70, "val": 10, "test": 20}
    for name in SPLITS:  # the order of the source
        numbers = [int(text.split()[1]) for text in texts_of(split, name)]
        assert numbers == sorted(numbers)
    other = prepare.split_messages(rows, ["ham", "spam"], ROWS, SEED + 1)
    assert texts_of(other, "test") != texts_of(split, "test")


def test_equal_messages_stand_in_one_split_and_count_once_where_held_out() -> None:
    texts = [
        (f"{shown} {i}", "ham" if i % 2 else "spam") for i in range(200) for shown in ("Hello there", "hello THERE!")
    ]
    rows = message_rows(texts)
    split = prepare.split_messages(rows, ["ham", "spam"], ROWS, SEED)
    keys = {name: {row.key for row in split.rows[name]} for name in SPLITS}
    assert not (keys["train"] & keys["val"] or keys["train"] & keys["test"] or keys["val"] & keys["test"])
    assert [len(keys[name]) for name in SPLITS] == [140, 20, 40]
    assert [len(split.rows[name]) for name in SPLITS] == [280, 20, 40]
    assert split.dropped == {"val": 20, "test": 40}
    assert datacard.row_leakage(split) == {name: {"verbatim": 0, "by_key": 0} for name in ("val", "test")}


def test_equal_texts_with_different_labels_stay_and_are_counted(tokenizer: Tokenizer) -> None:
    rows = message_rows([(f"text {i}", label) for i in range(100) for label in ("ham", "spam")])
    split = prepare.split_messages(rows, ["ham", "spam"], ROWS, SEED)
    assert split.dropped == {"val": 0, "test": 0}
    assert [len(split.rows[name]) for name in SPLITS] == [140, 20, 40]
    card = datacard.describe_messages(rows, split, tokenizer, "leak_free")
    assert card["duplicates"]["keys_with_different_answers"] == 100


def test_the_sources_own_split_is_kept_and_the_held_out_one_wins() -> None:
    texts = [(f"text {i}", "ham" if i % 2 else "spam") for i in range(30)]
    splits = ["train"] * 10 + ["val"] * 10 + ["test"] * 10
    clean = prepare.split_messages(message_rows(texts, splits), ["ham", "spam"], ROWS, SEED)
    assert [texts_of(clean, name) for name in SPLITS] == [[t for t, _ in texts[i : i + 10]] for i in (0, 10, 20)]
    assert clean.moved == 0

    texts[0], texts[1], texts[11] = ("TEXT 20!", "spam"), ("TEXT 15!", "ham"), ("TEXT 25!", "ham")
    split = prepare.split_messages(message_rows(texts, splits), ["ham", "spam"], ROWS, SEED)
    assert split.moved == 3
    assert len(split.rows["train"]) == 8
    assert {row.key for row in split.rows["val"]} == {leak_key(f"text {i}") for i in range(10, 20) if i != 11}
    assert {row.key for row in split.rows["test"]} == {leak_key(f"text {i}") for i in range(20, 30)}
    assert split.dropped == {"val": 1, "test": 2}


def test_a_missing_split_is_taken_from_the_sources_train() -> None:
    texts = [(f"text {i}", "ham" if i % 2 else "spam") for i in range(200)]
    splits = ["train"] * 150 + ["test"] * 50
    split = prepare.split_messages(message_rows(texts, splits), ["ham", "spam"], ROWS, SEED)
    assert texts_of(split, "test") == [text for text, _ in texts[150:]]
    assert [len(split.rows[name]) for name in SPLITS] == [135, 15, 50]


def test_a_split_for_some_records_only() -> None:
    rows = message_rows([("a", "ham"), ("b", "spam")], ["train", None])
    with pytest.raises(InputError, match=r"data\.messages: some records have a split and some have none"):
        prepare.split_messages(rows, ["ham", "spam"], ROWS, SEED)


def test_an_empty_split_and_a_label_that_train_lacks() -> None:
    with pytest.raises(InputError, match=r"data\.messages: too few different records .* val would be empty"):
        prepare.split_messages(message_rows([("a", "ham"), ("b", "spam")]), ["ham", "spam"], ROWS, SEED)
    rows = message_rows([(f"text {i}", "ham") for i in range(100)])
    with pytest.raises(InputError, match="no record with label 'spam' in train"):
        prepare.split_messages(rows, ["ham", "spam"], ROWS, SEED)


def test_a_rare_label_goes_to_train_first() -> None:
    rows = message_rows([(f"text {i}", "ham") for i in range(100)] + [("only one", "spam")])
    for seed in range(10):
        assert "only one" in texts_of(prepare.split_messages(rows, ["ham", "spam"], ROWS, seed), "train")


def test_book_split_of_messages_has_the_books_counts() -> None:
    """The counts of the SMS collection: 4,827 ham and 747 spam give 1,045, 149 and 300."""
    chooser = random.Random(0)
    labels = ["ham"] * 4827 + ["spam"] * 747
    chooser.shuffle(labels)
    rows = message_rows([(f"text {i}", label) for i, label in enumerate(labels)])
    split = prepare.split_messages(rows, ["ham", "spam"], LabelledSplit(split="book", val=0.1, test=0.2), seed=7)
    assert [len(split.rows[name]) for name in SPLITS] == [1045, 149, 300]
    assert sum(row.answer == "spam" for name in SPLITS for row in split.rows[name]) == 747
    # The book's own lines.
    pd = pytest.importorskip("pandas")
    df = pd.DataFrame([row.fields for row in rows])
    ham = df[df["label"] == "ham"].sample(747, random_state=123)
    balanced = pd.concat([ham, df[df["label"] == "spam"]]).sample(frac=1, random_state=123)
    assert [text for name in SPLITS for text in texts_of(split, name)] == balanced["text"].tolist()


def pair_rows(n: int) -> list[prepare.Row]:
    return [
        prepare.Row(
            {"instruction": f"do {i}", "input": "", "output": "x", "task": ""}, f"do{i}", f"do {i}", "x", "", None
        )
        for i in range(n)
    ]


def test_book_split_of_instructions_has_the_books_counts() -> None:
    rows = pair_rows(1100)
    split = prepare.split_instructions(rows, LabelledSplit(split="book", val=0.1, test=0.2), SEED)
    assert [len(split.rows[name]) for name in SPLITS] == [935, 55, 110]
    assert split.rows["train"] + split.rows["test"] + split.rows["val"] == rows


def test_leak_free_split_of_instructions() -> None:
    split = prepare.split_instructions(pair_rows(200), ROWS, SEED)
    assert [len(split.rows[name]) for name in SPLITS] == [140, 20, 40]


def write_lines(path: Path, records: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_pairs_with_equal_questions_have_one_key(tmp_path: Path) -> None:
    rows = prepare.read_instructions(
        write_lines(
            tmp_path / "instructions.jsonl",
            [
                {"instruction": "Sort: b, a", "input": "", "output": "a, b", "task": "sorting", "split": "test"},
                {"instruction": "sort", "input": "B A", "output": "A B."},
                {"instruction": "Sort: b, a", "input": "c", "output": "a, b, c"},
            ],
        )
    )
    assert rows[0].key == rows[1].key != rows[2].key
    assert rows[0].answer == rows[1].answer
    assert rows[0].verbatim != rows[1].verbatim
    assert (rows[0].own_split, rows[1].own_split) == ("test", None)
    assert rows[0].fields == {"instruction": "Sort: b, a", "input": "", "output": "a, b", "task": "sorting"}
    assert rows[1].fields["task"] == ""


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a", "label": "eggs"}, "expected one of the labels ham, spam, found 'eggs'"),
        ({"text": "\x00 ", "label": "ham"}, "no text is left after cleaning"),
        ({"label": "ham"}, "expected text under 'text'"),
        ({"text": "a", "label": "ham", "split": "dev"}, "expected split train, val or test, found 'dev'"),
    ],
)
def test_bad_messages(tmp_path: Path, record: object, message: str) -> None:
    path = write_lines(tmp_path / "messages.jsonl", [{"text": "a", "label": "ham"}, record])
    with pytest.raises(InputError, match=f"messages.jsonl: line 2: {message}"):
        prepare.read_messages(path, ["ham", "spam"])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"instruction": "a"}, "expected text under 'output'"),
        ({"instruction": "a", "output": " "}, "instruction or output is empty"),
        ({"instruction": "a", "output": "b", "input": 5}, "expected text under 'input', found 5"),
    ],
)
def test_bad_instructions(tmp_path: Path, record: object, message: str) -> None:
    path = write_lines(tmp_path / "instructions.jsonl", [record])
    with pytest.raises(InputError, match=f"instructions.jsonl: line 1: {message}"):
        prepare.read_instructions(path)


# ---- data card -------------------------------------------------------------------------------------------------------


def test_scripts() -> None:
    shares = datacard.scripts(prepare.count_characters("abcд漢字かハ देव 12.\n€"))
    n = len("abcд漢字かハ देव 12.\n€")
    expected = {"Latin": 3, "Cyrillic": 1, "CJK": 2, "Hiragana": 1, "Katakana": 1, "Devanagari": 3, "digits": 2}
    expected |= {"punctuation": 1, "symbols": 1, "white space": 3}
    assert shares == {name: round(count / n, 6) for name, count in Counter(expected).most_common()}


def test_spread() -> None:
    assert datacard.spread(np.arange(1, 102)) == {"mean": 51.0, "median": 51.0, "p95": 96.0, "max": 101}


def test_leakage_is_measured_where_the_book_split_has_it(tokenizer: Tokenizer) -> None:
    texts = [f"text {i}" for i in range(100)]
    texts[90], texts[91], texts[97] = "text 1", "TEXT 2!", "text 3"
    rows = message_rows([(text, "ham") for text in texts])
    split = prepare.split_instructions_by_book(rows)  # train 0-84, test 85-94, val 95-99
    assert datacard.row_leakage(split) == {"val": {"verbatim": 1, "by_key": 1}, "test": {"verbatim": 1, "by_key": 2}}
    card = datacard.describe_messages(rows, split, tokenizer, "book")
    assert card["duplicates"]["verbatim"] == 2
    assert card["duplicates"]["by_key"] == 3
    assert card["most_repeated"] == [{"text": "text 1", "times": 2}, {"text": "text 3", "times": 2}]
    assert card["splits"] == {"train": {"records": 85}, "val": {"records": 5}, "test": {"records": 10}}


def test_corpus_card(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = [document(seed) for seed in range(98)] + [document(0), disguise(document(1))]
    path = write_corpus(tmp_path / "corpus.jsonl", documents)
    plan = prepare.plan_corpus(path, BOOK, SEED, ALONE)
    encoded = prepare.encode_corpus(path, tmp_path / "out", plan, tokenizer, 10**6, ALONE)
    card = datacard.describe_corpus(plan, encoded, "book")
    assert card["documents"] == 100
    assert card["duplicate_documents"] == 2
    assert card["leaked_units"] == {"val": 2, "test": 0}
    assert card["characters"] == sum(map(len, documents))
    assert card["document_lengths"]["characters"]["max"] == max(map(len, documents))
    train = card["splits"]["train"]
    n_tokens = len([token for token in read_split(tmp_path / "out", "train") if token != tokenizer.eot])
    assert train["bytes_per_token"] == round(train["bytes"] / n_tokens, 4)
    assert card["splits"]["test"]["bytes_per_token"] is None


# ---- the stage -------------------------------------------------------------------------------------------------------


class FakeRun:
    """What the stage uses of a run."""

    def __init__(self, **changes: Any) -> None:
        values = yaml.safe_load((Path(__file__).parent.parent / "params.yaml").read_text())
        values["tokenize"]["tokenizer"].update(kind="bpe", vocab_size=300)
        values["tokenize"].update(changes)
        self.params = parse_params(values)
        self.metrics: dict[str, Any] = {}

    def write_metrics(self, values: dict[str, Any]) -> None:
        self.metrics = values

    def artifact(self, path: Path) -> None:
        assert path.exists()


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small `data/raw`, in the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "raw"
    folder.mkdir(parents=True)
    write_corpus(folder / "corpus.jsonl", [document(seed) for seed in range(40)])
    messages = [{"text": f"text {i}", "label": "spam" if i % 2 else "ham"} for i in range(50)]
    write_lines(folder / "messages.jsonl", messages)
    pairs = [{"instruction": f"do {i}", "input": "", "output": f"done {i}", "task": "doing"} for i in range(50)]
    write_lines(folder / "instructions.jsonl", pairs)
    (folder / "labels.json").write_text('["ham", "spam"]')
    sources = {kind: {"source": "tiny", "licence": "MIT"} for kind in ("corpus", "messages", "instructions")}
    (folder / "sources.json").write_text(json.dumps(sources))
    return folder


def test_the_stage_writes_everything_and_the_same_again(raw: Path) -> None:
    run: Any = FakeRun()
    tokenize(run)
    tokens, reports = Path("data/tokens"), Path("reports")
    first = folder_digest(tokens), folder_digest(reports)
    assert sorted(path.relative_to(tokens).as_posix() for path in tokens.rglob("*.*")) == [
        *(f"corpus/{name}" for name in ("meta.json", "test-00000.bin", "train-00000.bin", "val-00000.bin")),
        *(f"instructions/{name}.jsonl" for name in ("test", "train", "val")),
        *(f"messages/{name}" for name in ("labels.json", "test.jsonl", "train.jsonl", "val.jsonl")),
        "tokenizer/bpe.json",
    ]
    assert Tokenizer.load(tokens / "tokenizer").vocab_size == 300
    n_messages = [len((tokens / "messages" / f"{name}.jsonl").read_text().splitlines()) for name in SPLITS]
    assert [run.metrics["messages"][name] for name in SPLITS] == n_messages == [35, 5, 10]
    card = json.loads((reports / "data_card.json").read_text())
    assert card["sources"]["corpus"] == {"source": "tiny", "licence": "MIT"}
    assert card["instructions"]["tasks"]["doing"] == {name: run.metrics["instructions"][name] for name in SPLITS}
    assert run.metrics["corpus"]["train_tokens"] == card["corpus"]["splits"]["train"]["tokens"]
    markdown = (reports / "data_card.md").read_text()
    assert "| corpus | tiny | MIT | leak_free |" in markdown
    assert "| ham | 17 |" in markdown or "| ham | 18 |" in markdown
    tokenize(run)
    assert (folder_digest(tokens), folder_digest(reports)) == first


def test_a_stage_that_fails_leaves_nothing_behind(raw: Path) -> None:
    run: Any = FakeRun(tokenizer={"kind": "bpe", "vocab_size": 100_000, "train_chars": 1000})
    with pytest.raises(InputError, match="too small for 100000 tokens; it allows at most"):
        tokenize(run)
    assert [path.name for path in Path("data").iterdir()] == ["raw"]
    assert not Path("reports").exists()


def test_gpt2_files_that_are_missing(raw: Path) -> None:
    run: Any = FakeRun(tokenizer={"kind": "gpt2", "vocab_size": 300, "train_chars": 1000})
    with pytest.raises(InputError, match=r"encoder\.json: file not found"):
        tokenize(run)


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
    params = CorpusSplit(split="leak_free", val=0.05, test=0.05, section_chars=10_000)
    try:
        path = folder / "corpus.jsonl"
        synthetic_corpus(source, path, megabytes * 1_000_000)
        start, times = time.process_time(), [time.perf_counter()]
        with prepare.Workers(n_workers) as workers:
            plan = prepare.plan_corpus(path, params, SEED, workers)
            times.append(time.perf_counter())
            tokenizer = Tokenizer.train(prepare.training_texts(path, plan, 50_000_000), vocab_size)
            times.append(time.perf_counter())
            prepare.encode_corpus(path, folder / "out", plan, tokenizer, 2**24, workers)
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
