"""Duplicates that were planted are found; texts of the same genre are left alone."""

from __future__ import annotations

import random

import pytest

from llm.audit.duplicates import FAMILY, count_repeats, find_duplicates, too_short, words
from tests.audit.planted import changed, messages, stories, vocabulary

STORY = "Anna rode to the mill with two sacks of corn before the rain came down over the hills"


def kinds(train: list[str], test: list[str], most_near: int = 1000) -> list[tuple[int, str, int]]:
    return [(match.test, match.kind, match.train) for match in find_duplicates(train, test, most_near)]


def test_equal_normalised_and_near_texts_are_told_apart() -> None:
    train = ["something else entirely", STORY, STORY]
    near = STORY.replace("Anna", "Berta")
    test = ["nothing of it", STORY, STORY.upper() + "!", near, STORY.replace("corn before the rain", "a b c d")]
    assert kinds(train, test) == [(1, "exact", 1), (2, "normalised", 1), (3, "near", 1)]
    assert find_duplicates(train, [near], 10)[0].similarity == pytest.approx(17 / 18)


def test_planted_near_duplicates_are_found_and_unrelated_stories_are_not() -> None:
    texts, rng = stories(), random.Random(2)
    train, unrelated = texts[:800], texts[800:1000]
    planted = [changed(text, 0.1, rng, vocabulary(train)) for text in rng.sample(train, 20)]
    found = [test for test, _, _ in kinds(train, [*planted, *unrelated])]
    assert len(found) >= 18 and all(test < 20 for test in found)


def test_texts_of_a_template_are_no_leaks() -> None:
    train, test = messages("train"), messages("test")[:200]
    found = find_duplicates(train, test, 10_000)
    assert sum(match.kind == "near" for match in found) <= 2
    assert sum(match.kind == "template" for match in found) > 50, "the sample's messages are of templates"


def test_a_template_is_one_that_several_training_texts_share() -> None:
    siblings = [STORY.replace("Anna", name) for name in ("Berta", "Clara", "Dora", "Emma", "Frida")]
    test = STORY.replace("Anna", "Greta")
    assert kinds(siblings[: FAMILY - 1], [test]) == [(0, "near", 0)]
    assert kinds(siblings[:FAMILY], [test]) == [(0, "template", 0)]
    copies = [siblings[0]] * 5 + [siblings[0].upper()]
    assert kinds(copies, [test]) == [(0, "near", 0)], "copies of one text are no family"


def test_short_texts_are_equal_or_nothing() -> None:
    short = "See you at the mill on Monday at six"
    assert kinds([short], [short.replace("six", "ten"), short]) == [(1, "exact", 0)]
    assert too_short([short, STORY]) == 1


def test_near_duplicates_are_looked_for_up_to_a_number() -> None:
    near = STORY.replace("Anna", "Berta")
    assert kinds([STORY], ["x", near], 1) == []
    assert kinds(["x", STORY], [near], 1) == []
    assert kinds(["x", STORY], ["y", STORY], 1) == [(1, "exact", 1)], "equal ones are found everywhere"


def test_scripts_without_spaces_have_words() -> None:
    text = "昨日は雨が降ったので私たちは家で本を読みました"
    assert kinds([text], [text.replace("雨", "雪")]) == [(0, "near", 0)]
    assert words("कल, कला") == ("कल", "कला")
    assert kinds(["कल"], ["कला"]) == []


def test_repeats_within_a_split_are_counted() -> None:
    near = STORY.replace("Anna", "Berta")
    assert count_repeats([STORY, "a b", STORY, "A b!", near, "c"], 100) == (1, 1, 1, 6)
    assert count_repeats([STORY, "a", near], 2) == (0, 0, 0, 2)
    assert count_repeats([], 10) == (0, 0, 0, 0)
