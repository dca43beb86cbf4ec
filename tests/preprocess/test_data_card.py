"""The data card: what it counts, held against counts made by hand."""

from __future__ import annotations

import doctest
from collections import Counter
from pathlib import Path

import numpy as np

from llm.config import CorpusSplit
from llm.preprocess import data_card
from llm.preprocess.corpus import plan_corpus
from llm.preprocess.encode import encode_corpus
from llm.preprocess.supervised import SplitRows, split_instructions_by_book
from llm.preprocess.text import count_characters
from llm.preprocess.workers import Workers
from tests.datasets import disguise, document, message_rows, read_split, write_corpus
from tests.helpers import tiny_tokenizer


def test_examples() -> None:
    assert doctest.testmod(data_card).failed == 0


def test_scripts() -> None:
    shares = data_card.scripts(count_characters("abcд漢字かハ देव 12.\n€"))
    n = len("abcд漢字かハ देव 12.\n€")
    expected = {"Latin": 3, "Cyrillic": 1, "CJK": 2, "Hiragana": 1, "Katakana": 1, "Devanagari": 3, "digits": 2}
    expected |= {"punctuation": 1, "symbols": 1, "white space": 3}
    assert shares == {name: round(count / n, 6) for name, count in Counter(expected).most_common()}


def test_length_summary() -> None:
    assert data_card.length_summary(np.arange(1, 102)) == {"mean": 51.0, "median": 51.0, "p95": 96.0, "max": 101}


def test_leakage_is_measured_where_the_book_split_has_it() -> None:
    texts = [f"text {i}" for i in range(100)]
    texts[90], texts[91], texts[97] = "text 1", "TEXT 2!", "text 3"
    rows = message_rows([(text, "ham") for text in texts])
    split = split_instructions_by_book(rows)  # train 0-84, test 85-94, val 95-99
    assert data_card.row_leakage(split) == {"val": {"verbatim": 1, "by_key": 1}, "test": {"verbatim": 1, "by_key": 2}}
    card = data_card.describe_messages(rows, split, tiny_tokenizer(), "book")
    assert card["duplicates"]["verbatim"] == 2
    assert card["duplicates"]["by_key"] == 3
    assert card["most_repeated"] == [{"text": "text 1", "times": 2}, {"text": "text 3", "times": 2}]
    assert card["splits"] == {"train": {"records": 85}, "val": {"records": 5}, "test": {"records": 10}}


def test_corpus_card(tmp_path: Path) -> None:
    documents = [document(seed) for seed in range(98)] + [document(0), disguise(document(1))]
    path = write_corpus(tmp_path / "corpus.jsonl", documents)
    tiny_tokenizer().save(tmp_path / "tokenizer")
    with Workers(1) as alone:
        params = CorpusSplit(split="book", val=0.1, test=0.2, chunk_chars=2000)
        plan = plan_corpus(path, params, 123, alone)
        encoded = encode_corpus(path, tmp_path / "out", plan, tmp_path / "tokenizer", 10**6, alone)
    card = data_card.describe_corpus(plan, encoded, "book")
    assert card["documents"] == 100
    assert card["duplicate_documents"] == 2
    assert card["leaked_units"] == {"val": 2, "test": 0}
    assert card["characters"] == sum(map(len, documents))
    assert card["document_lengths"]["characters"]["max"] == max(map(len, documents))
    train = card["splits"]["train"]
    n_tokens = len([token for token in read_split(tmp_path / "out", "train") if token != tiny_tokenizer().eot])
    assert train["bytes_per_token"] == round(train["bytes"] / n_tokens, 4)
    assert card["splits"]["test"]["bytes_per_token"] is None


def test_text_from_data_cannot_become_markup() -> None:
    evil = "a|b\n\n# c <script>alert(1)</script> ![x](javascript:y) `d` \x1b[31m"
    rows = message_rows([(evil, evil)] * 2 + [(f"text {i}", "ham") for i in range(50)])
    split = SplitRows({"train": rows[:40], "val": rows[40:44], "test": rows[44:]}, 0, {"val": 0, "test": 0})
    part = data_card.describe_messages(rows, split, tiny_tokenizer(), "book")
    instructions = {**part, "tasks": part["labels"]}
    del instructions["labels"]
    sources = {kind: {"source": "mine", "licence": evil} for kind in ("corpus", "messages", "instructions")}
    lengths = {"characters": data_card.length_summary(np.ones(1)), "tokens": data_card.length_summary(np.ones(1))}
    numbers = {"documents": 1, "characters": 1, "units": 1, "duplicate_documents": 0, "duplicate_units": 0}
    corpus = {**numbers, "split": "book", "document_lengths": lengths, "splits": {}, "leaked_units": {}}
    tokenizer = {"kind": evil, "vocab_size": 280, "tokens_used_in_train": 1}
    text = data_card.render(
        {
            "sources": sources,
            "tokenizer": tokenizer,
            "corpus": {**corpus, "characters_of": {}},
            "messages": part,
            "instructions": instructions,
        }
    )
    assert text.count(r"a\|b \# c \<script\>alert\(1\)\</script\> \!\[x\]\(javascript\:y\) \`d\`") == 8
    assert "\x1b" not in text and "<script" not in text.replace(r"\<", "")
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# Data card",
        "## Corpus",
        "## Messages",
        "## Instructions",
    ]
