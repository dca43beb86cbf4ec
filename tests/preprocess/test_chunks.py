"""Chunks of long documents: where a text is cut."""

from __future__ import annotations

import doctest

import pytest

from llm.preprocess import chunks as module
from llm.preprocess.chunks import cut_chunks
from tests.datasets import document


def test_examples() -> None:
    assert doctest.testmod(module).failed == 0


def test_chunks_join_to_the_text() -> None:
    for seed in range(5):
        text = document(seed, paragraphs=30)
        chunks = cut_chunks(text, 1000)
        assert "".join(chunks) == text
        assert all(300 < len(chunk) <= 1000 for chunk in chunks)
        assert all(chunk.endswith("\n\n") for chunk in chunks[:-1])


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
def test_chunks_end_at_the_best_place(text: str, end: str) -> None:
    first, second = cut_chunks(text, 140)
    assert first + second == text
    assert first.endswith(end)


def test_short_and_empty_texts_are_not_cut() -> None:
    assert cut_chunks("a\n\nb", 4) == ["a\n\nb"]
    assert cut_chunks("", 4) == []
