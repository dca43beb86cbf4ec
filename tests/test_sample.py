"""The embedded sample source: reproducible, consistent, leak-free, and no task that counting words solves."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SAMPLE = Path(__file__).parents[1] / "data" / "sample"
FILES = ("stories.txt", "messages.jsonl", "instructions.jsonl", "conversations.jsonl")
Rows = list[dict[str, str]]


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_sample", SAMPLE / "make_sample.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def stories() -> list[str]:
    return (SAMPLE / "stories.txt").read_text(encoding="utf-8").strip().split("\n\n\n")


def read(name: str) -> Rows:
    return [json.loads(line) for line in (SAMPLE / name).read_text(encoding="utf-8").splitlines()]


def of_split(rows: Rows, split: str) -> Rows:
    return [row for row in rows if row["split"] == split]


def letters(text: str) -> str:
    return re.sub(r"[\W_]", "", text.casefold())


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


@pytest.mark.slow
def test_the_script_writes_the_committed_bytes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, SAMPLE / "make_sample.py", "--out", tmp_path], check=True)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (SAMPLE / name).read_bytes(), name


def test_no_text_stands_twice(stories: list[str]) -> None:
    for texts in (
        stories,
        [row["text"] for row in read("messages.jsonl")],
        [row["instruction"] + row["input"] for row in read("instructions.jsonl")],
    ):
        assert len({letters(text) for text in texts}) == len(texts)


def test_stories_are_short_and_about_a_megabyte_in_all(stories: list[str]) -> None:
    assert 700_000 < sum(len(story.encode()) for story in stories) < 1_200_000
    assert max(len(story) for story in stories) < 1_000
    assert all("\n\n\n" not in story and story == story.strip() for story in stories)


def test_no_message_of_the_labelled_set_is_told_in_a_story(stories: list[str]) -> None:
    told = letters(" ".join(stories))
    assert not [row["text"] for row in read("messages.jsonl") if letters(row["text"]) in told]


def test_labels_are_balanced_in_every_split() -> None:
    rows = read("messages.jsonl")
    for split in ("train", "val", "test"):
        counts = Counter(row["label"] for row in of_split(rows, split))
        assert set(counts) == {"ham", "spam"}
        assert abs(counts["ham"] - counts["spam"]) <= 1
    assert len(of_split(rows, "test")) >= 600


def test_counting_words_does_not_find_the_spam() -> None:
    from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline

    rows = read("messages.jsonl")
    train, test = of_split(rows, "train"), of_split(rows, "test")
    for model in (
        make_pipeline(CountVectorizer(), MultinomialNB()),
        make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(C=30, max_iter=2000)),
    ):
        model.fit([row["text"] for row in train], [row["label"] for row in train])
        accuracy = model.score([row["text"] for row in test], [row["label"] for row in test])
        assert 0.75 < accuracy < 0.94


def test_messages_hold_hard_cases_on_both_sides() -> None:
    triggers = re.compile(r"free|win|won|prize|urgent|congratulations|chance|www|\d|!", re.IGNORECASE)
    rows = read("messages.jsonl")
    for split in ("train", "val", "test"):
        alarming_ham = [row for row in of_split(rows, split) if row["label"] == "ham" and triggers.search(row["text"])]
        quiet_spam = [
            row for row in of_split(rows, split) if row["label"] == "spam" and not triggers.search(row["text"])
        ]
        share = len(of_split(rows, split)) / 2
        assert len(alarming_ham) > 0.2 * share
        assert len(quiet_spam) > 0.2 * share


def test_last_answers_of_conversations_need_their_history(maker: ModuleType) -> None:
    """No question at the end has one answer by itself, and what is asked of val and test is new."""
    rows: Any = read("conversations.jsonl")
    assert {len(row["messages"]) for row in rows} == {4, 6, 8}
    whole = {letters(" ".join(message["content"] for message in row["messages"])) for row in rows}
    assert len(whole) == len(rows)
    answers: dict[str, set[str]] = {}
    asked: dict[str, set[str]] = {"train": set(), "val": set(), "test": set()}
    for row in rows:
        *_, question, answer = (message["content"] for message in row["messages"])
        answers.setdefault(question, set()).add(answer)
        for message in row["messages"][::2]:
            if "\n" in message["content"]:
                asked[row["split"]].add(letters(message["content"]))
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
    repeated = [question for question in answers if sum(q["messages"][-2]["content"] == question for q in rows) > 5]
    assert len(repeated) > 20 and sum(len(answers[question]) > 1 for question in repeated) > 0.6 * len(repeated)
    pairs = {
        letters(row["instruction"] + row["input"]) for row in read("instructions.jsonl") if row["split"] != "train"
    }
    assert not asked["train"] & (asked["val"] | asked["test"] | pairs)
    assert not set(maker.HELD_NAMES) & words(json.dumps([row for row in rows if row["split"] == "train"]))


def test_every_task_is_in_every_split(maker: ModuleType) -> None:
    rows = read("instructions.jsonl")
    for split in ("train", "val", "test"):
        counts = Counter(row["task"] for row in of_split(rows, split))
        assert set(counts) == set(maker.TASKS)
        assert min(counts.values()) >= 15
    assert max(len(row["output"].split()) for row in rows) <= 12


def test_train_never_uses_what_is_held_out(maker: ModuleType, stories: list[str]) -> None:
    rows = read("instructions.jsonl")
    train, test = of_split(rows, "train"), of_split(rows, "test")
    told = words(" ".join(stories))
    in_train = words(" ".join(" ".join((row["instruction"], row["input"], row["output"])) for row in train))
    assert not set(maker.HELD_NAMES) & in_train
    assert set(maker.PEOPLE) <= told

    held = {
        "opposites": {word for pair in maker.HELD_OPPOSITES for word in pair},
        "plurals": set(maker.HELD_PLURALS),
        "translation": set(maker.HELD_VELIC) | {maker.VELIC_NOUNS[noun] for noun in maker.HELD_VELIC},
    }
    for task, held_words in held.items():
        assert held_words <= told, task
        assert not [row for row in train if row["task"] == task and held_words & words(row["output"])], task
        assert any(held_words & words(row["output"]) for row in test if row["task"] == task), task

    about_people = [row for row in test if row["task"] in ("question", "rewriting", "summary")]
    assert sum(bool(set(maker.HELD_NAMES) & words(row["output"])) for row in about_people) >= 10


def test_val_and_test_ask_no_question_of_train(maker: ModuleType) -> None:
    for row in read("instructions.jsonl"):
        assert maker.is_held_out(letters(row["instruction"] + row["input"])) == (row["split"] != "train")


def test_what_test_has_to_sort_was_not_sorted_in_train_from_another_order() -> None:
    rows = [row for row in read("instructions.jsonl") if row["task"] == "sorting"]
    known = {row["output"] for row in of_split(rows, "train")}
    assert not [row for row in of_split(rows, "test") if row["output"] in known]


GIFT = re.compile(r"(\w+) (?:(?:gave|handed|passed) the (\w+) to (\w+)|gave (\w+) the (\w+))\.")


def test_answers_follow_from_their_stories(maker: ModuleType) -> None:
    """Reads each story again, sentence by sentence, without the simulation that told it."""
    checked: Counter[str] = Counter()
    for row in read("instructions.jsonl"):
        question = re.fullmatch(r"(Who has|Where is) (?:the )?(\w+)\?", row["instruction"])
        if row["task"] != "question" or question is None:
            continue
        place: dict[str, str] = {}
        owner: dict[str, str] = {}
        for sentence in row["input"].split(". "):
            sentence = sentence.rstrip(".") + "."
            person = next(word for word in re.findall(r"\w+", sentence) if word in maker.PEOPLE)
            where = re.search(r"\b(?:to|from|at|At) the (\w+)", sentence)
            if gift := GIFT.fullmatch(sentence):
                giver, thing, receiver = gift[1], gift[2] or gift[5], gift[3] or gift[4]
                assert owner[thing] == giver
                assert place.setdefault(receiver, place[giver]) == place[giver], "a gift needs both in one place"
                owner[thing] = receiver
                continue
            assert where is not None, sentence
            place[person] = where[1]
            if thing := re.search(r"(?:took|found|picked up) the (\w+)", sentence):
                owner[thing[1]] = person
            elif thing := re.search(r"(?:left|put|forgot) the (\w+)", sentence):
                assert owner.pop(thing[1]) == person
                place[thing[1]] = where[1]
        kind, subject = question[1], question[2]
        if kind == "Who has":
            assert row["output"] == f"{owner[subject]} has the {subject}.", row
        else:
            assert row["output"].endswith(f" is at the {place[subject]}."), row
        checked[kind] += 1
    assert min(checked.values()) > 100
