"""Runs of words and characters of a corpus, against sets of tuples."""

from __future__ import annotations

import random

import numpy as np
import pytest

from llm.audit.overlap import CHARS_RUN, WORDS_RUN, CorpusIndex, run_hashes
from tests.audit.planted import messages, stories


@pytest.mark.parametrize("length", [1, 2, 3, WORDS_RUN, CHARS_RUN])
def test_hashes_are_equal_where_the_runs_are(length: int) -> None:
    sequence = np.random.default_rng(0).integers(0, 2, 300)
    hashes = run_hashes(sequence, length).tolist()
    runs = [tuple(sequence[i : i + length].tolist()) for i in range(300 - length + 1)]
    assert len(hashes) == len(runs)
    assert len(set(hashes)) == len(set(runs)) == len(set(zip(hashes, runs, strict=True)))


def test_planted_texts_are_found_wherever_they_stand() -> None:
    texts, rng = stories(), random.Random(3)
    corpus, planted, unrelated = texts[:400], texts[400:420], texts[420:620]
    for text in planted:
        place = rng.randrange(400)
        corpus[place] += f"\n{text.upper()}\n{corpus[place]}"
    found, short = CorpusIndex(corpus).find([*planted, *unrelated])
    assert {each.test for each in found} == set(range(20))
    assert short == 0
    for each in found:
        assert planted[each.test].split()[0].strip('".,').lower() == each.passage.split()[0]
        assert planted[each.test].upper() in corpus[each.document]


def test_messages_are_found_in_the_corpus_where_they_were_planted_alone() -> None:
    test = messages("test")[:120]
    found, short = CorpusIndex([*stories()[:500], " ".join(test[:20])]).find(test)
    told = {i for i in range(20) if len(test[i].split()) >= WORDS_RUN}
    assert told <= {each.test for each in found} <= set(range(25))
    assert short == sum(len(text) < CHARS_RUN and len(text.split()) < WORDS_RUN for text in test)


def test_short_texts_and_empty_corpora_hold_nothing() -> None:
    short = "See you at the mill"
    assert CorpusIndex([short]).find([short, ""]) == ([], 2)
    assert CorpusIndex([]).find(["a " * 40])[0] == []
    assert CorpusIndex(["a b"]).find(["a b " * 40])[0] == []


def test_runs_do_not_cross_documents() -> None:
    text = " ".join(f"w{i}" for i in range(26))
    halves = [" ".join(text.split()[:13]), " ".join(text.split()[13:])]
    assert CorpusIndex(halves).find([text])[0] == []
    assert len(CorpusIndex([text]).find([text])[0]) == 1


def test_scripts_without_spaces_are_found() -> None:
    text = "昨日は雨が降ったので私たちは家で本を読みました"
    [found] = CorpusIndex([f"東京。{text}。"]).find([text])[0]
    assert (found.words, found.characters) == (1.0, None)


def test_pieces_of_a_template_in_several_documents_are_no_copy() -> None:
    words = [f"w{i}" for i in range(40)]
    pieces = [" ".join(words[:22]), " ".join(words[10:32]), " ".join(words[20:])]
    assert CorpusIndex(pieces).find([" ".join(words)])[0] == []
    [found] = CorpusIndex([*pieces, f"so {' '.join(words)} it is"]).find([" ".join(words)])[0]
    assert found.document == 3
