"""The survey of the corpus, its leak-free and book splits, and the text for the vocabulary."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm.common.errors import InputError
from llm.config import SPLITS, CorpusSplit
from llm.preprocess import data_card
from llm.preprocess.chunks import cut_chunks
from llm.preprocess.corpus import Plan, plan_corpus, training_texts
from llm.preprocess.encode import encode_corpus
from llm.preprocess.text import dedup_key
from llm.tokenizer.bpe import Tokenizer
from tests.datasets import disguise, document, folder_digest, read_split, write_corpus
from tests.preprocess.pipeline import ALONE, BOOK, LEAK_FREE, SEED, encode_all, read_texts

# ---- leak-free split -------------------------------------------------------------------------------------------------


def test_every_text_comes_back_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = [document(seed) for seed in range(100)]
    path = write_corpus(tmp_path / "corpus.jsonl", documents)
    meta = encode_all(path, tmp_path / "out", LEAK_FREE, tokenizer).meta
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
    encode_all(path, tmp_path / "empty", params, tokenizer)
    encode_all(write_corpus(path, [document(seed) for seed in (1, 2, 3)]), tmp_path / "full", params, tokenizer)
    assert folder_digest(tmp_path / "empty") == folder_digest(tmp_path / "full")


def test_long_documents_are_cut_and_their_chunks_follow_each_other(tmp_path: Path, tokenizer: Tokenizer) -> None:
    long, short = document(1, paragraphs=150), document(2)
    path = write_corpus(tmp_path / "corpus.jsonl", [long, short])
    encode_all(path, tmp_path / "out", LEAK_FREE, tokenizer)
    texts = {split: read_texts(tmp_path / "out", split, tokenizer) for split in SPLITS}
    assert all(texts.values())
    runs = [text for split in SPLITS for text in texts[split] if text != short]
    assert sum(map(len, runs)) == len(long)
    assert all(run in long for run in runs)
    # A run of chunks in one split is continuous text: the next character of the document is in another split.
    for split in SPLITS:
        ends = {long.index(text) + len(text) for text in texts[split] if text in long}
        assert not ends & {long.index(text) for text in texts[split] if text in long}
    assert max(map(len, runs)) > LEAK_FREE.chunk_chars


def test_equal_documents_stand_in_one_split(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = [document(seed) for seed in range(50)]
    path = write_corpus(tmp_path / "corpus.jsonl", [*documents, *map(disguise, documents)])
    plan = plan_corpus(path, LEAK_FREE, SEED, ALONE)
    assert plan.chunk_split[:50].tolist() == plan.chunk_split[50:].tolist()
    assert set(plan.chunk_split.tolist()) == {0, 1, 2}
    tokenizer.save(tmp_path / "tokenizer")
    encoded = encode_corpus(path, tmp_path / "out", plan, tmp_path / "tokenizer", 10**6, ALONE)
    card = data_card.describe_corpus(plan, encoded, "leak_free")
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
    assert (plan.chunk_document <= 1).sum() > 10
    assert len(set(plan.chunk_split[plan.chunk_document <= 1].tolist())) == 1


def shares(plan: Plan) -> list[float]:
    """Return the share of the characters in each split."""
    chars = np.bincount(plan.chunk_split, weights=plan.chunk_lengths, minlength=len(SPLITS))
    return (chars / chars.sum()).tolist()


@pytest.mark.parametrize("copies", [2, 3])
def test_a_long_document_listed_twice_does_not_tip_the_splits(tmp_path: Path, copies: int) -> None:
    novel, others = document(1, paragraphs=300), [document(seed, paragraphs=60) for seed in (2, 3)]
    path = write_corpus(tmp_path / "corpus.jsonl", [novel, *others, *[novel] * (copies - 1)])
    for seed in range(20):
        plan = plan_corpus(path, LEAK_FREE, seed, ALONE)
        assert shares(plan) == pytest.approx([0.7, 0.1, 0.2], abs=0.06)
        assert set(data_card.corpus_leakage(plan).values()) == {0}
        first, *more = (plan.chunk_split[plan.chunk_document == n].tolist() for n in (0, *range(3, copies + 2)))
        assert all(split == first for split in more)


def test_copies_that_are_cut_elsewhere_are_in_train(tmp_path: Path) -> None:
    novel = document(1, paragraphs=300)
    other = disguise(novel).replace("\n\n", " ")
    path = write_corpus(tmp_path / "corpus.jsonl", [novel, other, *(document(seed, 60) for seed in range(2, 8))])
    for seed in range(20):
        plan = plan_corpus(path, LEAK_FREE, seed, ALONE)
        assert set(plan.chunk_split[plan.chunk_document <= 1].tolist()) == {0}
        assert 0.05 < shares(plan)[1] < 0.15 and 0.1 < shares(plan)[2] < 0.25


def test_a_short_text_that_repeats_very_often_is_in_train(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_corpus(tmp_path / "corpus.jsonl", [document(0)] * 200 + [document(seed) for seed in range(1, 101)])
    for seed in range(20):
        plan = plan_corpus(path, LEAK_FREE, seed, ALONE)
        assert set(plan.chunk_split[:200].tolist()) == {0}
        assert [int((plan.chunk_split[200:] == split).sum()) for split in range(3)] == [70, 10, 20]
    assert "data.corpus: 1 texts repeat so much that they are in train" in caplog.text


def test_a_corpus_of_little_but_copies_still_has_held_out_splits(tmp_path: Path) -> None:
    novel = document(1, paragraphs=300)
    documents = [novel, disguise(novel).replace("\n\n", " "), document(2), document(3)]
    plan = plan_corpus(write_corpus(tmp_path / "corpus.jsonl", documents), LEAK_FREE, SEED, ALONE)
    assert set(plan.chunk_split.tolist()) == {0, 1, 2}
    assert set(data_card.corpus_leakage(plan).values()) == {0}


def test_a_document_written_as_several_records_is_not_cut_unless_it_is_long(tmp_path: Path) -> None:
    whole = CorpusSplit(split="leak_free", val=0.1, test=0.2, chunk_chars=10**6)
    records = [[document(seed), document(seed + 1000), document(seed + 2000)] for seed in range(30)]
    plan = plan_corpus(write_corpus(tmp_path / "corpus.jsonl", records), whole, SEED, ALONE)
    for number in range(30):
        assert len(set(plan.chunk_split[plan.chunk_document == number].tolist())) == 1
    assert plan.chunk_ends.tolist() == [False, False, True] * 30


def test_a_short_document_equal_to_a_chunk_of_a_long_one(tmp_path: Path) -> None:
    long = document(1, paragraphs=100)
    chunks = cut_chunks(long, LEAK_FREE.chunk_chars)
    plan = plan_corpus(write_corpus(tmp_path / "c.jsonl", [long, *map(str.upper, chunks)]), LEAK_FREE, SEED, ALONE)
    assert plan.chunk_split[: len(chunks)].tolist() == plan.chunk_split[len(chunks) :].tolist()


def test_the_seed_decides_and_the_order_does_not(tmp_path: Path) -> None:
    documents = [document(seed) for seed in range(100)]

    def splits(seed: int, order: list[str]) -> dict[str, int]:
        plan = plan_corpus(write_corpus(tmp_path / "corpus.jsonl", order), LEAK_FREE, seed, ALONE)
        return dict(zip(order, plan.chunk_split.tolist(), strict=True))

    assert splits(1, documents) == splits(1, documents[::-1])
    assert splits(1, documents) != splits(2, documents)


@pytest.mark.parametrize("texts", [["one text"], ["one text", "One, text!", "two texts"]])
def test_too_few_different_documents(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(InputError, match=r"too little text to split.*chunk_chars.*split: book") as caught:
        plan_corpus(write_corpus(tmp_path / "corpus.jsonl", texts), LEAK_FREE, SEED, ALONE)
    assert "\n" not in str(caught.value)


def test_three_documents_are_enough(tmp_path: Path) -> None:
    plan = plan_corpus(write_corpus(tmp_path / "c.jsonl", ["one", "two", "three"]), LEAK_FREE, SEED, ALONE)
    assert sorted(plan.chunk_split.tolist()) == [0, 1, 2]


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
    encode_all(path, tmp_path / "out", BOOK, tokenizer)
    train, val = (tokenizer.decode(read_split(tmp_path / "out", split)) for split in ("train", "val"))
    joined = "".join(documents)
    cut = int(0.9 * len(joined))
    assert train.replace("<|endoftext|>", "") == joined[:cut]
    assert val.replace("<|endoftext|>", "") == joined[cut:]
    assert (train + val).split("<|endoftext|>") == documents  # between documents only, not where the text is cut
    assert read_split(tmp_path / "out", "test") == []


def test_book_split_between_two_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    encoded = encode_all(write_corpus(tmp_path / "c.jsonl", ["x" * 9, "y"]), tmp_path / "out", BOOK, tokenizer)
    assert tokenizer.decode(read_split(tmp_path / "out", "train")) == "x" * 9
    assert tokenizer.decode(read_split(tmp_path / "out", "val")) == "y"
    assert [encoded.meta["splits"][split]["documents"] for split in SPLITS] == [1, 1, 0]


def test_book_split_of_one_document_is_the_text_encoded_in_two_parts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = document(3, paragraphs=20)
    encode_all(write_corpus(tmp_path / "corpus.jsonl", [text]), tmp_path / "out", BOOK, tokenizer)
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
    splits = encode_all(write_corpus(tmp_path / "corpus.jsonl", [text]), tmp_path / "out", BOOK, gpt2).meta["splits"]
    # A word lies across the cut, which makes one token more of the two parts.
    assert [(splits[name]["bytes"], splits[name]["tokens"]) for name in SPLITS] == [(18431, 4612), (2048, 534), (0, 0)]


def test_book_split_of_one_character(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="too little"):
        plan_corpus(write_corpus(tmp_path / "corpus.jsonl", ["x"]), BOOK, SEED, ALONE)


# ---- vocabulary -----------------------------------------------------------------------------------------------------


def test_the_vocabulary_sees_the_train_split_only(tmp_path: Path) -> None:
    documents = [f"{document(seed)} marker{seed:03d}" for seed in range(60)]
    path = write_corpus(tmp_path / "corpus.jsonl", documents)
    plan = plan_corpus(path, LEAK_FREE, SEED, ALONE)
    texts = list(training_texts(path, plan, 10**9))
    assert texts == [text for text, split in zip(documents, plan.chunk_split, strict=True) if split == 0]


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
