"""Splits of messages and instruction pairs: leak-free, the source's own, the book's."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.common.errors import InputError
from llm.config import SPLITS, LabelledSplit
from llm.data.examples import read_messages, read_pairs
from llm.preprocess import data_card, supervised
from llm.preprocess.supervised import Row, SplitRows
from llm.preprocess.text import dedup_key
from tests.datasets import message_rows, write_lines
from tests.helpers import tiny_tokenizer

LEAK_FREE = LabelledSplit(split="leak_free", val=0.1, test=0.2)
BOOK = LabelledSplit(split="book", val=0.1, test=0.2)
SEED = 123


def texts_of(split: SplitRows, name: str) -> list[str]:
    return [row.fields["text"] for row in split.rows[name]]


def test_messages_are_stratified() -> None:
    rows = message_rows([(f"text {i}", "spam" if i % 5 == 0 else "ham") for i in range(500)])
    split = supervised.split_messages(rows, ["ham", "spam"], LEAK_FREE, SEED)
    counts = data_card.counts_per_split(split, "label")
    assert counts["ham"] == {"train": 280, "val": 40, "test": 80}
    assert counts["spam"] == {"train": 70, "val": 10, "test": 20}
    for name in SPLITS:  # the order of the source
        numbers = [int(text.split()[1]) for text in texts_of(split, name)]
        assert numbers == sorted(numbers)
    other = supervised.split_messages(rows, ["ham", "spam"], LEAK_FREE, SEED + 1)
    assert texts_of(other, "test") != texts_of(split, "test")


def test_equal_messages_stand_in_one_split_and_count_once_where_held_out() -> None:
    texts = [
        (f"{shown} {i}", "ham" if i % 2 else "spam") for i in range(200) for shown in ("Hello there", "hello THERE!")
    ]
    rows = message_rows(texts)
    split = supervised.split_messages(rows, ["ham", "spam"], LEAK_FREE, SEED)
    keys = {name: {row.key for row in split.rows[name]} for name in SPLITS}
    assert not (keys["train"] & keys["val"] or keys["train"] & keys["test"] or keys["val"] & keys["test"])
    assert [len(keys[name]) for name in SPLITS] == [140, 20, 40]
    assert [len(split.rows[name]) for name in SPLITS] == [280, 20, 40]
    assert split.dropped == {"val": 20, "test": 40}
    assert data_card.row_leakage(split) == {name: {"verbatim": 0, "by_key": 0} for name in ("val", "test")}


@settings(max_examples=150)
@given(
    chosen=st.lists(
        st.tuples(st.integers(0, 25), st.booleans(), st.sampled_from(["ham", "spam"]), st.sampled_from(SPLITS)),
        min_size=1,
        max_size=60,
    ),
    given_splits=st.booleans(),
    val=st.floats(0.01, 0.49),
    test=st.floats(0.01, 0.49),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_text_stands_in_two_splits_and_every_row_in_one(
    chosen: list[tuple[int, bool, str, str]], given_splits: bool, val: float, test: float, seed: int
) -> None:
    texts = [(f"TEXT  {n}!" if loud else f"text {n}", label) for n, loud, label, _ in chosen]
    rows = message_rows(texts, [split for *_, split in chosen] if given_splits else None)
    rows = [row._replace(fields={"number": str(number)}) for number, row in enumerate(rows)]
    result = supervised.split_rows(rows, LabelledSplit(split="leak_free", val=val, test=test), seed, "messages")
    keys = {name: {row.key for row in result.rows[name]} for name in SPLITS}
    assert not (keys["train"] & keys["val"] or keys["train"] & keys["test"] or keys["val"] & keys["test"])
    numbers = [int(row.fields["number"]) for name in SPLITS for row in result.rows[name]]
    assert len(set(numbers)) == len(numbers) == len(rows) - sum(result.dropped.values())
    kept = {(row.key, row.answer) for name in SPLITS for row in result.rows[name]}
    assert kept == {(row.key, row.answer) for row in rows}  # only duplicates are dropped
    for name in ("val", "test"):
        held_out = [(row.key, row.answer) for row in result.rows[name]]
        assert len(set(held_out)) == len(held_out)
    if given_splits:
        latest = {row.key: max((r.own_split or "" for r in rows if r.key == row.key), key=SPLITS.index) for row in rows}
        assert all(row.key in keys["test"] for row in rows if latest[row.key] == "test")


def test_equal_texts_with_different_labels_stay_and_are_counted() -> None:
    rows = message_rows([(f"text {i}", label) for i in range(100) for label in ("ham", "spam")])
    split = supervised.split_messages(rows, ["ham", "spam"], LEAK_FREE, SEED)
    assert split.dropped == {"val": 0, "test": 0}
    assert [len(split.rows[name]) for name in SPLITS] == [140, 20, 40]
    card = data_card.describe_messages(rows, split, tiny_tokenizer(), "leak_free")
    assert card["duplicates"]["keys_with_different_answers"] == 100


def test_the_sources_own_split_is_kept_and_the_held_out_one_wins() -> None:
    texts = [(f"text {i}", "ham" if i % 2 else "spam") for i in range(30)]
    splits = ["train"] * 10 + ["val"] * 10 + ["test"] * 10
    clean = supervised.split_messages(message_rows(texts, splits), ["ham", "spam"], LEAK_FREE, SEED)
    assert [texts_of(clean, name) for name in SPLITS] == [[t for t, _ in texts[i : i + 10]] for i in (0, 10, 20)]
    assert clean.moved == 0

    texts[0], texts[1], texts[11] = ("TEXT 20!", "spam"), ("TEXT 15!", "ham"), ("TEXT 25!", "ham")
    split = supervised.split_messages(message_rows(texts, splits), ["ham", "spam"], LEAK_FREE, SEED)
    assert split.moved == 3
    assert len(split.rows["train"]) == 8
    assert {row.key for row in split.rows["val"]} == {dedup_key(f"text {i}") for i in range(10, 20) if i != 11}
    assert {row.key for row in split.rows["test"]} == {dedup_key(f"text {i}") for i in range(20, 30)}
    assert split.dropped == {"val": 1, "test": 2}


def test_a_missing_split_is_taken_from_the_sources_train() -> None:
    texts = [(f"text {i}", "ham" if i % 2 else "spam") for i in range(200)]
    splits = ["train"] * 150 + ["test"] * 50
    split = supervised.split_messages(message_rows(texts, splits), ["ham", "spam"], LEAK_FREE, SEED)
    assert texts_of(split, "test") == [text for text, _ in texts[150:]]
    assert [len(split.rows[name]) for name in SPLITS] == [135, 15, 50]


def test_a_split_for_some_records_only() -> None:
    rows = message_rows([("a", "ham"), ("b", "spam")], ["train", None])
    with pytest.raises(InputError, match=r"data\.messages: some records have a split and some have none"):
        supervised.split_messages(rows, ["ham", "spam"], LEAK_FREE, SEED)


def test_an_empty_split_and_a_label_that_train_lacks() -> None:
    with pytest.raises(InputError, match=r"data\.messages: too few different records .* val would be empty"):
        supervised.split_messages(message_rows([("a", "ham"), ("b", "spam")]), ["ham", "spam"], LEAK_FREE, SEED)
    rows = message_rows([(f"text {i}", "ham") for i in range(100)])
    with pytest.raises(InputError, match="no record with label 'spam' in train"):
        supervised.split_messages(rows, ["ham", "spam"], LEAK_FREE, SEED)


def test_a_rare_label_goes_to_train_first() -> None:
    rows = message_rows([(f"text {i}", "ham") for i in range(100)] + [("only one", "spam")])
    for seed in range(10):
        assert "only one" in texts_of(supervised.split_messages(rows, ["ham", "spam"], LEAK_FREE, seed), "train")


HINDI = ("कल", "कला", "काल", "किला", "कुल", "कूल", "केला", "कोला", "कौल", "किल")


def test_words_that_differ_in_marks_are_different_texts() -> None:
    texts = [(f"{word} {n}", "ham" if n % 2 else "spam") for n in range(20) for word in HINDI]
    split = supervised.split_messages(message_rows(texts), ["ham", "spam"], LEAK_FREE, SEED)
    assert split.dropped == {"val": 0, "test": 0}
    assert sum(map(len, split.rows.values())) == len(texts)


def near(counts: Mapping[str, int], params: LabelledSplit) -> bool:
    """Return whether the held-out splits have their share of the counts, more or less a sixth or one."""
    n = sum(counts.values())
    return all(
        abs(counts[name] - share * n) <= max(1, share * n / 6)
        for name, share in (("val", params.val), ("test", params.test))
    )


@pytest.mark.parametrize("repeated", ["common", "rare"])
def test_every_label_is_near_its_share_whatever_repeats(repeated: str) -> None:
    names = {"common": 240, "rare": 60, "other": 7}
    texts = [(f"text {name} {i}", name) for name, n in names.items() for i in range(n)]
    texts += [(f"text {repeated} 3", repeated)] * 400
    rows = message_rows(texts)
    for seed in range(100):
        split = supervised.split_messages(rows, [*names], LEAK_FREE, seed)
        assert split.dropped == {"val": 0, "test": 0}  # what repeats very often is in train
        for name, n in names.items():
            counts = {part: len({row.key for row in split.rows[part] if row.stratum == name}) for part in SPLITS}
            assert sum(counts.values()) == n and near(counts, LEAK_FREE) and min(counts.values()) > 0
        held_out = {part: len(split.rows[part]) for part in ("val", "test")}
        assert near({"train": sum(names.values()) - sum(held_out.values()), **held_out}, LEAK_FREE)


def test_every_task_is_near_its_share_whatever_repeats(tmp_path: Path) -> None:
    names = {"common": 150, "rare": 40, "": 30}
    texts = [(f"text {name} {i}", name) for name, n in names.items() for i in range(n)] + [("text common 3", "")] * 200
    records = [{"instruction": text, "output": "x", "task": task} for text, task in texts]
    rows = supervised.read_instructions(write_lines(tmp_path / "instructions.jsonl", records))
    for seed in range(100):
        split = supervised.split_instructions(rows, LEAK_FREE, seed)
        for name in names:
            counts = {part: len({row.key for row in split.rows[part] if row.stratum == name}) for part in SPLITS}
            assert near(counts, LEAK_FREE), (seed, name, counts)


def test_many_small_tasks_share_the_held_out_splits() -> None:
    rows = [row._replace(stratum=str(number // 4)) for number, row in enumerate(pair_rows(400))]
    for seed in range(20):
        split = supervised.split_instructions(rows, LEAK_FREE, seed)
        assert [abs(len(split.rows[name]) - n) <= 8 for name, n in (("val", 40), ("test", 80))] == [True, True]


def test_texts_that_differ_in_signs_stay_together_where_that_is_a_small_change() -> None:
    rows = message_rows([(f"{i}{sign}x", "ham") for i in range(500) for sign in "+*"])
    groups = {row.key: [row] for row in rows}
    split_of = supervised.assign_splits(groups, {"val": 0.1, "test": 0.2}, SEED)
    assert all(split_of[dedup_key(f"{i}+x")] == split_of[dedup_key(f"{i}*x")] for i in range(500))
    rows = message_rows([("a" + sign * n + "b", "ham") for sign in "+<>=|" for n in (1, 2, 3)])
    split = supervised.split_rows(rows, LEAK_FREE, SEED, "messages")
    assert [len(split.rows[name]) for name in SPLITS] == [11, 1, 3]


def test_what_a_held_out_split_lacks_is_said(caplog: pytest.LogCaptureFixture) -> None:
    rows = message_rows(
        [(f"text {i}", "ham") for i in range(100)] + [("one", "spam"), ("two", "spam"), ("one!", "spam")]
    )
    with caplog.at_level(logging.WARNING, logger="llm"):
        split = supervised.split_messages(rows, ["ham", "spam"], LEAK_FREE, SEED)
    lacking = [name for name in ("val", "test") if not any(row.answer == "spam" for row in split.rows[name])]
    assert lacking
    for name in lacking:
        assert f"data.messages: {name} has no record of 'spam' (2 different); its figures say nothing of" in caplog.text
    caplog.clear()
    doubled = message_rows([(f"{shown} {i}", "ham") for i in range(100) for shown in ("text", "TEXT")])
    with caplog.at_level(logging.WARNING, logger="llm"):
        split = supervised.split_instructions(doubled, LEAK_FREE, SEED)
    val, test = split.dropped["val"], split.dropped["test"]
    assert val and test
    assert (
        f"data.instructions: left out so that no held-out text counts twice: {val} of val, {test} of test"
        in caplog.text
    )


def test_book_split_of_messages_has_the_books_counts() -> None:
    """The counts of the SMS collection: 4,827 ham and 747 spam give 1,045, 149 and 300."""
    chooser = random.Random(0)
    labels = ["ham"] * 4827 + ["spam"] * 747
    chooser.shuffle(labels)
    rows = message_rows([(f"text {i}", label) for i, label in enumerate(labels)])
    split = supervised.split_messages(rows, ["ham", "spam"], BOOK, seed=7)
    assert [len(split.rows[name]) for name in SPLITS] == [1045, 149, 300]
    assert sum(row.answer == "spam" for name in SPLITS for row in split.rows[name]) == 747
    # The book's own lines.
    pd = pytest.importorskip("pandas")
    df = pd.DataFrame([row.fields for row in rows])
    ham = df[df["label"] == "ham"].sample(747, random_state=123)
    balanced = pd.concat([ham, df[df["label"] == "spam"]]).sample(frac=1, random_state=123)
    assert [text for name in SPLITS for text in texts_of(split, name)] == balanced["text"].tolist()


def pair_rows(n: int) -> list[Row]:
    return [
        Row({"instruction": f"do {i}", "input": "", "output": "x", "task": ""}, f"do{i}", f"do {i}", "x", "", None)
        for i in range(n)
    ]


def test_book_split_of_instructions_has_the_books_counts() -> None:
    rows = pair_rows(1100)
    split = supervised.split_instructions(rows, BOOK, SEED)
    assert [len(split.rows[name]) for name in SPLITS] == [935, 55, 110]
    assert split.rows["train"] + split.rows["test"] + split.rows["val"] == rows


def test_leak_free_split_of_instructions() -> None:
    split = supervised.split_instructions(pair_rows(200), LEAK_FREE, SEED)
    assert [len(split.rows[name]) for name in SPLITS] == [140, 20, 40]


def test_pairs_with_equal_questions_have_one_key(tmp_path: Path) -> None:
    rows = supervised.read_instructions(
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
        supervised.read_messages(path, ["ham", "spam"])


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
        supervised.read_instructions(path)


# ---- conversations ---------------------------------------------------------------------------------------------------


def test_conversations_keep_their_turns_and_equal_ones_stand_together(tmp_path: Path) -> None:
    def talk(*turns: str, **more: Any) -> dict[str, Any]:
        said = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
        return {"messages": said, **more}

    rows = [talk("Hi?", "Hello.", "So\r\n?", "Well."), talk("hi", "hello", "so", "Other."), talk("Hi?", "Hello.")]
    path = tmp_path / "instructions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    first, equal, single = supervised.read_instructions(path)
    assert first.fields["messages"][2] == {"role": "user", "content": "So\n?"}
    assert (first.fields["instruction"], first.fields["output"]) == ("So\n?", "Well.")
    assert first.key == equal.key != single.key and first.answer != equal.answer
    assert single.fields == {"instruction": "Hi?", "input": "", "output": "Hello.", "task": ""}
    supervised.write_rows(tmp_path / "out", supervised.SplitRows({"train": [first, single]}, 0, {}))
    assert read_pairs(tmp_path / "out" / "train.jsonl")[0].messages == first.fields["messages"]
    path.write_text(json.dumps(talk("Hi?", "\x00")) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="line 1: a message of assistant is empty after cleaning"):
        supervised.read_instructions(path)


def test_columns_for_slices_reach_the_held_out_messages(tmp_path: Path) -> None:
    rows = [
        {"text": f"text {i}", "label": "ham" if i % 2 else "spam", "slices": {"language": "de" if i % 3 else "en"}}
        for i in range(60)
    ]
    found = supervised.read_messages(write_lines(tmp_path / "messages.jsonl", rows), ["ham", "spam"])
    split = supervised.split_messages(found, ["ham", "spam"], LEAK_FREE, SEED)
    supervised.write_rows(tmp_path / "out", split)
    for name in SPLITS:
        for message in read_messages(tmp_path / "out" / f"{name}.jsonl"):
            number = int(message.text.removeprefix("text "))
            assert message.slices == {"language": "de" if number % 3 else "en"}
    supervised.write_rows(tmp_path / "plain", SplitRows({"test": message_rows([("a", "ham")])}, 0, {}))
    assert (tmp_path / "plain/test.jsonl").read_text() == '{"text": "a", "label": "ham"}\n'
