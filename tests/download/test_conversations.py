"""Conversations, preference pairs and rows inside of others: each accepted form with a small file, each refusal."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from llm.common.errors import InputError
from llm.config import AUTO, CorpusSource, InstructionsSource, MessagesSource, SourceFile
from llm.download.content.archives import DataFile
from llm.download.records.readers import LeftOut, read_records, write_records
from llm.download.records.splits import Section
from llm.preprocess.supervised import read_instructions

HI, HELLO = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}
TALK = [{"role": "system", "content": "Be kind."}, HI, HELLO, {"role": "user", "content": "So?"}, HELLO]
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Rome"}'}}
TOOLS = [
    HI,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "21", "tool_call_id": "1"},
    HELLO,
]


def read(path: Path, content: Any, name: str = "a.json", kind: Any = InstructionsSource, **options: Any) -> list[Any]:
    place = path / name
    if isinstance(content, pyarrow.Table):
        pyarrow.parquet.write_table(content, place)
    else:
        place.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    section: Section = kind(files=[SourceFile(path=name)], **options)
    file = DataFile(name, place, "", place.stat().st_size)
    return list(read_records(section, file, 0, LeftOut(skip=section.skip_invalid), set()))


def shares(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for role, text in turns]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": TALK}, TALK),
        ({"dialog": TALK}, TALK),
        ({"messages": json.dumps(TALK)}, TALK),
        ({"messages": [*TALK, {"role": "user", "content": "And?"}]}, TALK),  # nothing answers that
        ({"conversations": shares(("system", "Be kind."), ("human", "Hi?"), ("gpt", "Hello."))}, TALK[:3]),
        ({"conversations": shares(("user", "Hi?"), ("chatgpt", "Hello.")), "system": "Be kind."}, TALK[:3]),
        ({"conversations": shares(("prompter", "Hi?"), ("Assistant", "Hello."))}, TALK[1:3]),
        ({"conversations": shares(("human", "Hi?"), ("function_call", "f()"), ("observation", "1"), ("gpt", "Hello."))},
         [HI, {"role": "assistant", "content": "f()"}, {"role": "tool", "content": "1"}, HELLO]),
        ({"messages": [{"role": "developer", "content": "Be kind."}, HI, HELLO]}, TALK[:3]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi?"}]}, HELLO]}, TALK[1:3]),
        ({"prompt": [HI], "completion": [HELLO]}, TALK[1:3]),
    ],
)  # fmt: skip
def test_conversations_are_known_by_their_fields(row: Any, messages: Any, tmp_path: Path) -> None:
    assert read(tmp_path, [row, row]) == [{"messages": messages}] * 2


def test_calls_and_results_of_tools_are_kept(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    for given in (tools, json.dumps(tools)):
        [record] = read(tmp_path, {"messages": TOOLS, "tools": given})
        assert record["tools"] == tools and [one["role"] for one in record["messages"]] == [
            one["role"] for one in TOOLS
        ]
        assert record["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"place": "Rome"}
        assert record["messages"][2]["tool_call_id"] == "1"
    [old] = read(tmp_path, {"messages": [HI, {"role": "assistant", "function_call": CALL["function"]}, *TOOLS[2:]]})
    assert old["messages"][1]["tool_calls"] == [
        {"type": "function", "function": {"name": "weather", "arguments": {"place": "Rome"}}}
    ]


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([HI], "expected an answer of the assistant, found none"),
        ([HELLO, HI, HELLO], "begins with a question, found assistant"),
        ([HI, HELLO, TALK[0], HI, HELLO], "message 3: expected system as the first message only"),
        ([HI, {"role": "wizard", "content": "x"}], "message 2: expected a role such as .*, found 'wizard'"),
        ([HI, {"role": "assistant", "content": " "}], "message 2: expected text of the assistant, found none"),
        ([HI, {"role": "assistant", "content": 3}], "expected text, found int"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, HELLO], "found parts of image_url"),
        ([HI, {**HELLO, "weight": 0}], "expected no weight"),
        ([HI, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "expected JSON"),
        ([HI, {"role": "assistant", "content": "\ud800"}], "half a character"),
    ],
)
def test_what_is_no_conversation_is_refused_or_left_out(messages: Any, problem: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=problem):
        read(tmp_path, [{"messages": messages}])
    assert read(tmp_path, [{"messages": messages}, {"messages": TALK}], skip_invalid=True) == [{"messages": TALK}]


def test_one_of_several_conversations_is_named(tmp_path: Path) -> None:
    row = {"long": TALK, "short": [HI, HELLO]}
    with pytest.raises(InputError, match="found long, short; name one with messages:"):
        read(tmp_path, row)
    assert read(tmp_path, row, messages="short") == [{"messages": [HI, HELLO]}]
    with pytest.raises(InputError, match="expected a conversation in 'other'"):
        read(tmp_path, row, messages="other")


PAIR = [{"messages": [HI, HELLO], "rejected": [HI, {"role": "assistant", "content": "Go."}]}]
HH = "\n\nHuman: Hi?\n\nAssistant: "


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi?", "chosen": "Hello.", "rejected": "Go."},
        {"question": "Hi?", "chosen": "Hello.", "rejected": "Go.", "score": 3},
        {"prompt": [HI], "chosen": [HELLO], "rejected": [{"role": "assistant", "content": "Go."}]},
        {"prompt": "Hi?", "chosen": [HI, HELLO], "rejected": [HI, {"role": "assistant", "content": "Go."}]},
        {"chosen": f"{HH}Hello.", "rejected": f"{HH}Go."},
    ],
)
def test_preference_pairs_are_kept_and_train_on_the_chosen_if_asked(row: Any, tmp_path: Path) -> None:
    assert read(tmp_path, row, preferences="chosen") == PAIR
    [kept] = read(tmp_path, row)
    assert kept == {"chosen": PAIR[0]["messages"], "rejected": PAIR[0]["rejected"]}
    raw = tmp_path / "instructions.jsonl"
    raw.write_text(json.dumps(kept) * 1 + "\n" + json.dumps(kept) + "\n")
    with pytest.raises(InputError, match=r"2 records are preference pairs .* write preferences: chosen"):
        read_instructions(raw)
    raw.write_text(json.dumps(PAIR[0]) + "\n")
    assert read_instructions(raw)[0].fields == {"instruction": "Hi?", "input": "", "output": "Hello.", "task": ""}


def test_preference_pairs_without_a_question_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a question beside chosen and rejected"):
        read(tmp_path, {"chosen": "Hello.", "rejected": "Go."})


def test_prompt_and_completion_need_no_mapping(tmp_path: Path) -> None:
    expected = [{"instruction": "Hi?", "input": "", "output": "Hello."}]
    assert read(tmp_path, {"prompt": "Hi?", "completion": "Hello."}) == expected
    assert read(tmp_path, "prompt,completion\nHi?,Hello.\n", "a.csv") == expected
    with pytest.raises(InputError, match="expected 'instruction'"):
        read(tmp_path, "prompt,answer\nHi?,Hello.\n", "a.csv")


def test_conversations_are_no_messages_and_say_where_they_belong(tmp_path: Path) -> None:
    for kind, options in ((MessagesSource, {"labels": AUTO}), (CorpusSource, {})):
        with pytest.raises(InputError, match=r"found a conversation .*; it is read under instructions:"):
            read(tmp_path, [{"messages": TALK}], kind=kind, **options)


# ---- rows inside of others -------------------------------------------------------------------------------------------

QAS = [{"question": "Where?", "answers": [{"text": "There"}, {"text": "Here"}]}, {"question": "Why?", "answers": []}]
SQUAD = {"data": [{"title": "T", "paragraphs": [{"context": "It sat there.", "qas": QAS}] * 2}]}


def test_records_by_a_path_have_the_fields_around_them(tmp_path: Path) -> None:
    options = {"instruction": "{title}: {question}", "input": "context", "output": "answers[0].text"}
    options["records"] = "data[].paragraphs[].qas[]"
    found = {"instruction": "T: Where?", "input": "It sat there.", "output": "There"}
    assert read(tmp_path, SQUAD, skip_invalid=True, **options) == [found, found]
    with pytest.raises(
        InputError, match=r"data 1, paragraphs 1, qas 2: expected text in 'answers\[0\].text', found none"
    ):
        read(tmp_path, SQUAD, **options)
    with pytest.raises(InputError, match="expected a list under 'rows', found only data; correct records:"):
        read(tmp_path, SQUAD, **{**options, "records": "rows[]"})
    with pytest.raises(InputError, match="write records: data"):
        read(tmp_path, SQUAD)


ROWS = [{"text": f"It is {i}.", "label": "ab"[i % 2]} for i in range(4)]


@pytest.mark.parametrize(
    ("records", "content"),
    [
        ("split", {"columns": ["text", "label"], "data": [list(row.values()) for row in ROWS]}),
        ("index", {str(i): row for i, row in enumerate(ROWS)}),
        ("columns", {name: {str(i): row[name] for i, row in enumerate(ROWS)} for name in ("text", "label")}),
        ("lists", {name: [row[name] for row in ROWS] for name in ("text", "label")}),
        ("a.b[]", {"a": {"b": ROWS}}),
    ],
)
def test_whole_tables_in_one_object(records: str, content: Any, tmp_path: Path) -> None:
    assert read(tmp_path, content, kind=MessagesSource, labels=["a", "b"], records=records) == ROWS
    with pytest.raises(InputError, match=re.escape(f"write records: {records}")):
        read(tmp_path, content, kind=MessagesSource, labels=["a", "b"])
    with pytest.raises(InputError, match="correct records:"):
        read(tmp_path, {"x": "y"}, kind=MessagesSource, labels=["a", "b"], records=records)


def test_lists_of_cells_with_named_columns(tmp_path: Path) -> None:
    rows = [list(row.values()) for row in ROWS]
    assert read(tmp_path, rows, kind=MessagesSource, labels=["a", "b"], header=["text", "label"]) == ROWS
    with pytest.raises(InputError, match="name its columns with header:"):
        read(tmp_path, rows, kind=MessagesSource, labels=["a", "b"])


@pytest.mark.parametrize("records", ["data", "a..b[]", "[]", "a[].", "table"])
def test_paths_that_are_none(records: str) -> None:
    with pytest.raises(ValueError, match="records"):
        SourceFile(path="a.json", records=records)


# ---- cells -----------------------------------------------------------------------------------------------------------


def test_two_columns_make_one_text(tmp_path: Path) -> None:
    content = "title;body;label\nOffer;Buy now;a\nNote;;b\n"
    found = read(tmp_path, content, "a.csv", MessagesSource, labels=["a", "b"], text="{title}: {body}")
    assert [row["text"] for row in found] == ["Offer: Buy now", "Note: "]
    assert read(tmp_path, content, "a.csv", CorpusSource, text="{title}\n{body}")[0]["text"] == "Offer\nBuy now"
    with pytest.raises(InputError, match="expected 'subject'"):
        read(tmp_path, content, "a.csv", MessagesSource, labels=["a", "b"], text="{subject}: {body}")


def test_numbers_get_names(tmp_path: Path) -> None:
    rows = [{"text": "x", "label": 1}, {"text": "y", "label": "0"}, {"text": "z", "label": 1.0}]
    for names in (["ham", "spam"], {0: "ham", 1: "spam"}):
        found = read(tmp_path, rows, kind=MessagesSource, labels=["ham", "spam"], label_names=names)
        assert [row["label"] for row in found] == ["spam", "ham", "spam"]
    with pytest.raises(InputError, match="expected a number out of 0, 1, found '2'"):
        read(tmp_path, [{"text": "x", "label": 2}], kind=MessagesSource, labels=AUTO, label_names=["ham", "spam"])


def test_the_names_of_a_parquet_schema(tmp_path: Path) -> None:
    feature = {"label": {"names": ["neg", "pos"], "_type": "ClassLabel"}, "text": {"_type": "Value"}}
    schema = json.dumps({"info": {"features": feature}})
    table = pyarrow.Table.from_pylist([{"text": "x", "label": 1}, {"text": "y", "label": 0}])
    table = table.replace_schema_metadata({"huggingface": schema})
    found = read(tmp_path, table, "a.parquet", MessagesSource, labels=["neg", "pos"])
    assert [row["label"] for row in found] == ["pos", "neg"]


@pytest.mark.parametrize("cell", ["a, b", "a|b", "a;b", ["a", "b"]])
def test_several_labels_in_a_cell_are_refused(cell: Any, tmp_path: Path) -> None:
    rows = [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}, {"text": "z", "label": cell}]
    with pytest.raises(InputError, match=r"several|2 in one cell"):
        read(tmp_path, rows, kind=MessagesSource, labels=["a", "b"])
    path = tmp_path / "b.json"
    path.write_text(json.dumps(rows))
    section = MessagesSource(files=[SourceFile(path="b.json")], labels=AUTO)
    with pytest.raises(InputError, match="several"):
        write_records(section, [DataFile("b.json", path, "", 1)], tmp_path / "out.jsonl")
