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
from llm.preprocess.text import (
    CLEAN,
    CONTROLS,
    LINE_ENDS,
    TextHasher,
    dedup_key,
    differ_in_signs,
    key_hash,
    normalise,
    read_records,
)
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


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a+b", "A + b."), ("x - y", "x-y"), ("a*b", "a * b"), ("x²", "x^2"), ("−5", "-5"), ("C++", "c++!"),
        ('"Hello," she said - "you\'re late."', "hello she said: you’re late"), ("wait -- no", "Wait, no"),
        ("*now* and **bold**, _here_", "now and bold here"), ("* a point", "A point"), ("(see below)", "see below"),
        ("===== Title =====", "title"), ("******* FREE", "free"), ("e-mail T-shirt", "email tshirt"),
        ("İSTANBUL", "istanbul"), ("ΐ", "ΐ".upper()), ("cafe\u0301", "CAFÉ"), ("☎\ufe0f 5", "☎ 5"), ("naïve?", "Naïve"),
    ],
)  # fmt: skip
def test_case_space_and_punctuation_do_not_count(one: str, other: str) -> None:
    assert dedup_key(one) == dedup_key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a+b", "a-b"), ("a - b", "a b"), ("a*b", "a/b"), ("2**3", "2*3"), ("a=b", "a!=b"), ("a==b", "a=b"),
        ("x<y", "x>y"), ("x<=y", "x<y"), ("a&b", "a|b"), ("a^b", "ab"), ("~a", "a"), ("!x", "x"), ("(!x)", "(x)"),
        ("C++", "C"), ("C#", "C"), ("i++", "i--"), ("x--;", "x;"), ("-5", "5"), ("-x + 1", "x+1"), ("y=-x", "y=x"),
        ("5-3", "53"), ("5 - 3", "5 3"), ("x-1", "x1"), ("1 - x", "1 x"), ("3.5", "35"), (".5", "5"), ("3:4", "34"),
        ("½", "12"), ("1/2", "12"), ("x²", "x2"), ("√4", "4"), ("∀x", "∃x"), ("→", "←"), ("50%", "50"), ("$5", "£5"),
        ("f(x)", "fx"), ("a[1]", "a1"), ("(a+b)*c", "a+b*c"), ("a * (b + c)", "a * b + c"), ("snake_case", "snakecase"),
        ("कल", "कला"), ("कला", "किला"), ("ก่อน", "กอน"), ("கல்", "கலா"), ("\U00011315\U00011347", "\U00011315"),
    ],
)  # fmt: skip
def test_marks_and_signs_count(one: str, other: str) -> None:
    assert dedup_key(one) != dedup_key(other)


def test_a_hash_is_that_of_its_pieces_and_near_those_that_differ_in_signs() -> None:
    hasher = TextHasher(1)
    for piece in ("a", "+", "b"):  # as the records of a document
        hasher.update(piece)
    plus, minus, other = hasher.value(), key_hash("a-b", 1), key_hash("ac", 1)
    assert plus == key_hash("a+b", 1) != minus
    assert differ_in_signs(plus, minus) and not differ_in_signs(plus, other)


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
