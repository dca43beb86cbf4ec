"""Cleaning text and reading records, on examples and on random text."""

from __future__ import annotations

import doctest
import random
import re
import unicodedata
from pathlib import Path

import pytest

from llm.common.errors import InputError
from llm.preprocess import text as module
from llm.preprocess.text import CLEAN, CONTROLS, LINE_ENDS, dedup_key, key_hash, normalise, read_records
from tests.datasets import write_lines


def test_examples() -> None:
    assert doctest.testmod(module).failed == 0


def test_normalise() -> None:
    assert normalise("\ufeffcafe\u0301\r\nb\rc\u2028d\x0ce\tf\x00\x1b[0m") == "café\nb\nc\nd\ne\tf[0m"
    assert normalise("a\ud800b") == "ab"
    assert normalise("👩\u200d👧") == "👩\u200d👧"  # joiners carry meaning


def test_a_clean_text_has_no_character_that_would_be_mended() -> None:
    for character in map(chr, range(0x110000)):
        assert bool(CLEAN.fullmatch(character)) != bool(CONTROLS.match(character) or LINE_ENDS.match(character))


def test_normalise_is_idempotent() -> None:
    chooser = random.Random(0)
    for _ in range(300):
        text = "".join(map(chr, chooser.choices([*range(0x300), 0x301, 0x327, 0x1100, 0x1161, 0x2028, 0xD801], k=30)))
        once = normalise(text)
        assert normalise(once) == once
        assert unicodedata.is_normalized("NFC", once)
        assert not re.search(r"[^\S \n\t\xa0]", once)


def test_dedup_key() -> None:
    assert dedup_key("Free  entry:\n'CALL' n-o-w_!") == dedup_key("free ENTRY call now")
    assert dedup_key("STRASSE ﬁn Ⅷ") == dedup_key("straße fin viii")
    assert dedup_key("one two") != dedup_key("one too")
    assert dedup_key("日本語。") == dedup_key("日本語")
    assert dedup_key("?!") == "?!" != dedup_key("!!")


def test_key_hash() -> None:
    assert key_hash("a", 1) == key_hash(b"a", 1) != key_hash("b", 1)
    assert key_hash("a", 1) != key_hash("a", 2)
    hashes = [key_hash(str(i), 1) for i in range(1000)]
    assert len(set(hashes)) == 1000
    assert 450 < sum(value < 2**63 for value in hashes) < 550


def test_records_are_the_lines_of_a_file(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "records.jsonl", [{"text": "a"}, {"text": "b"}])
    assert list(read_records(path)) == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(InputError, match=r"none\.jsonl: file not found; run the download stage first$"):
        list(read_records(tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match=r"records\.jsonl: line 2: expected a JSON object, found b'\[\]"):
        list(read_records(write_lines(path, [{}, []])))
