"""Tables as people have them: separators, headers and quotes, found out or named in the line of a refusal."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from llm.download.content import archives, formats
from llm.download.records import readers
from tests.download.sources import Place

# ---- quotes ----------------------------------------------------------------------------------------------------------

UNBALANCED = (
    'text\tlabel\n"Free tickets, he said\tspam\nhello\tham\nhi there\tham\ncall me "now"\tham\nhe said "yes"\tspam\n'
)
SWALLOWING = 'text\tlabel\n"Free tickets, he said\tspam\nhello\tham\nand left"\tham\nbye\tham\n'


@pytest.fixture(params=[7, 1 << 20], ids=["tiny blocks", "one block"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "BLOCK", request.param)
    monkeypatch.setattr(formats, "BLOCK", request.param)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("table", [UNBALANCED, SWALLOWING])
@pytest.mark.parametrize("options", [{}, {"quoting": "none"}, {"quoting": "auto"}])
def test_quotes_at_the_start_of_a_cell_are_characters_where_each_line_is_a_row(
    place: Place, table: str, options: dict[str, str]
) -> None:
    expected = [line.partition("\t")[0] for line in table.splitlines()[1:]]
    assert place.texts("messages", ("a.tsv", table), **options) == expected


def test_the_whole_table_tells_its_quotes(place: Place) -> None:
    """The first lines do not tell: the two quotes are 300 rows apart."""
    rows = ["plain\tham"] * 200 + ['"Free\tspam'] + ["plain\tham"] * 300 + ['tickets"\tham']
    assert len(place.texts("messages", ("a.tsv", "text\tlabel\n" + "\n".join(rows)))) == len(rows)


@pytest.mark.parametrize(
    ("kind", "name", "table", "line"),
    [
        ("messages", "a.tsv", 'text\tlabel\nyo\tham\n"a\tb\nc"\tham\n', 3),  # a cell, or half a row
        ("corpus", "a.tsv", SWALLOWING, 2),  # no label tells
        ("instructions", "a.tsv", 'instruction\toutput\n"Say hi\thi\nand bye"\tbye\n', 2),
        ("corpus", "a.tsv", 'id\ttext\n1\t"Free tickets\n2\thello\n3\tfine"\n', 2),
        ("messages", "a.csv", 'label,text\nham,"Hello\nspam,bye"\nham,x\n', 2),
        ("corpus", "a.csv", 'id;text\n1;"Free\n2;tickets"\n', 2),
    ],
)
def test_a_quoted_cell_that_may_be_several_rows_is_asked_about(
    place: Place, kind: str, name: str, table: str, line: int
) -> None:
    message = place.refused(kind, (name, table))
    assert message.startswith(f"{name}, line {line}: expected rows, found a quoted cell with ")
    assert "quoting: none" in message and "quoting: csv" in message
    rows = table.strip().count("\n")
    assert len(place.read(kind, (name, table), quoting="csv")) < rows
    if "a\tb" not in table:
        assert len(place.read(kind, (name, table), quoting="none")) == rows


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("cell", ["Hi,\nJohn", "Dear all,\nI am off, until Monday,\n\nBye", 'She said "no", twice'])
def test_quoted_cells_of_a_csv_hold_commas_and_lines(place: Place, cell: str) -> None:
    quoted = cell.replace('"', '""')
    assert place.texts("messages", ("a.csv", f'text,label\n"{quoted}",ham\nx,spam\n')) == [cell, "x"]


def test_a_quote_that_never_closes_is_named_by_its_row(place: Place) -> None:
    message = place.refused("messages", ("a.csv", 'text,label\nx,ham\n"a,ham\nb,ham\n'))
    assert "line 4: expected cells with closed quotes" in message and "the row that begins in line 3" in message
    assert "quoting: none" in message
    escaped = place.refused("messages", ("a.tsv", 'text\tlabel\n"He said \\"hi\\""\tham\n'))
    assert "write a quote inside a quoted cell twice" in escaped


# ---- separators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.txt", "a", "a.dat"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_separator_is_found_out_whatever_the_name(place: Place, name: str, separator: str) -> None:
    other = "," if separator == ";" else ";"
    table = "\n".join(separator.join(row) for row in (["id", "text", "label"], ["1", f"hi{other} you", "ham"]))
    assert place.texts("messages", (name, table)) == [f"hi{other} you"]


@pytest.mark.parametrize("line", ["sep=;", "SEP=;", '"sep=;"'])
def test_excels_separator_line(place: Place, line: str) -> None:
    assert place.texts("messages", ("a.csv", f"{line}\ntext;label\na, b, c;ham\n")) == ["a, b, c"]
    assert "line 3: expected 'text'" in place.refused("messages", ("a.csv", f"{line}\nbody;label\na;ham\n"))


@pytest.mark.parametrize("stated", ["~", "tab", "\\t", "semicolon"])
def test_a_separator_is_stated(place: Place, stated: str) -> None:
    separator = {"tab": "\t", "\\t": "\t", "semicolon": ";"}.get(stated, stated)
    table = f"text{separator}label\na, b{separator}ham\n"
    assert place.texts("messages", ("a.csv", table), separator=stated) == ["a, b"]


def test_rows_of_other_lengths_name_the_separator(place: Place) -> None:
    message = place.refused("messages", ("a.csv", "text;label\nx;ham\na;b;ham\n"))
    assert message.startswith("a.csv, line 3: expected 2 columns as in line 1, found 3; correct the row")
    assert message.endswith("(separated by semicolons)")
    message = place.refused("messages", ("a.csv", "hi,ham\nyo,spam\na,b,ham\n"), header=["text", "label"])
    assert "line 3: expected 2 columns (text, label), found 3; correct" in message and "by commas" in message


# ---- headers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["a.csv", "SMSSpamCollection"])
def test_two_columns_without_header_are_told_by_the_labels(place: Place, separator: str, name: str) -> None:
    for order in (1, -1):
        rows = [["hi you", "ham"], ["WIN", "spam"], ["so so", "ham"]]
        table = "\n".join(separator.join(row[::order]) for row in rows)
        assert place.texts("messages", (name, table)) == [text for text, _ in rows]


def test_header_of_another_case_or_with_spaces(place: Place) -> None:
    assert place.texts("messages", ("a.csv", "\n text , label\nhi,ham\n")) == ["hi"]
    message = place.refused("messages", ("a.csv", "Text,Label\nhi,ham\n"))
    assert "a.csv, line 2: expected 'text' and 'label', found only Text, Label; name the right one" in message
    assert "with text: and label:" in message and message.endswith("(separated by commas)")


@pytest.mark.parametrize(
    ("kind", "table", "seen", "separator"),
    [
        ("messages", "1,hi you,ham\n2,x,spam\n", "found only 1, hi you, ham; name ", "commas"),
        ("messages", "hi you;good\nx;bad\n", "found only hi you, good; name ", "semicolons"),
        ("instructions", "What is 2+2?\t4\nName x\ty\n", "found only What is 2+2?, 4; name ", "tabs"),
    ],
)
def test_a_missing_header_is_asked_for(place: Place, kind: str, table: str, seen: str, separator: str) -> None:
    message = place.refused(kind, ("a.csv", table))
    assert message.startswith("a.csv, line 2: expected '") and seen in message and "header: [" in message
    assert message.endswith(f"(separated by {separator})")


def test_a_header_is_stated(place: Place) -> None:
    table = "1,hi you,ham\n2,x,spam\n"
    assert place.texts("messages", ("a.csv", table), header=["id", "text", "label"]) == ["hi you", "x"]
    assert place.texts("messages", ("a.csv", table), header=False, text="2", label="3") == ["hi you", "x"]
    assert "found only 1, 2, 3 for 1, hi you, ham" in place.refused("messages", ("a.csv", table), header=False)
    wrong = place.refused("messages", ("a.csv", table), header=["text", "label"])
    assert "line 1: expected 2 columns (text, label), found 3, separated by commas: 1, hi you, ham" in wrong
    # a first row that looks like labels is a header where that is said
    assert place.texts("messages", ("a.csv", "ham,spam\nhi,ham\n"), header=True, text="ham", label="spam") == ["hi"]


def test_a_header_in_the_middle_is_no_row(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    table = "instruction,output\na,b\n" * 2  # cat part*.csv
    caplog.set_level(logging.WARNING, "llm")
    logging.getLogger("llm").addHandler(caplog.handler)
    assert len(place.read("instructions", ("a.csv", table))) == 2
    assert "line 3: repeats the header" in caplog.text


def test_a_column_that_stands_there_twice(place: Place) -> None:
    message = place.refused("messages", ("a.csv", "text,label,text\nhi,ham,x\n"))
    assert "line 2: expected one column 'text', found 2" in message


def test_the_sms_format_may_have_a_header(place: Place) -> None:
    assert place.texts("messages", ("data", 'text\tlabel\n"hi\tham\n'), format="tsv", quoting="none") == ['"hi']
    assert place.texts("messages", ("data", 'ham\t"hi\ta\nspam\tx"\n'), format="tsv") == ['"hi\ta', 'x"']


# ---- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("between", ["", "\n", " , \n", "\ufeff", "\n[]\n"])
def test_joined_json_is_read_to_its_end(place: Place, between: str) -> None:
    parts = [[{"text": "a"}], [{"text": "b"}, {"text": "c]"}], [{"text": "d"}]]
    joined = between.join(json.dumps(part) for part in parts)
    assert place.texts("corpus", ("a.json", joined)) == ["a", "b", "c]", "d"]
    assert place.texts("corpus", ("a.jsonl", joined)) == ["a", "b", "c]", "d"]
    mixed = joined + '\n{"text": "e"}'
    assert place.texts("corpus", ("a.json", mixed))[-1] == "e"


@pytest.mark.parametrize("rest", ["]", "}", "junk", "[", '[{"text": "b"}', '{"text": "b"', "// end", '"b"', "7"])
def test_what_stands_behind_json_is_refused(place: Place, rest: str) -> None:
    message = place.refused("corpus", ("a.json", '[{"text": "a"}]\n' + rest))
    assert message.startswith(("a.json, line 2: expected a list of JSON objects", "a.json, row 2: expected a JSON"))


def test_joined_json_lines_with_marks(place: Place) -> None:
    assert place.texts("corpus", ("a.jsonl", '\ufeff{"text": "a"}\n\ufeff{"text": "b"}')) == ["a", "b"]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "null"])
def test_no_number_is_missing_in_json(place: Place, value: str) -> None:
    pair = f'{{"instruction": "a", "input": {value}, "output": "b"}}'
    assert place.read("instructions", ("a.json", f"[{pair}]")) == [{"instruction": "a", "input": "", "output": "b"}]
    assert place.texts("corpus", ("a.jsonl", f'{{"text": {value}}}\n{{"text": "x"}}')) == ["x"]
    message = place.refused("messages", ("a.jsonl", f'{{"text": {value}, "label": "ham"}}'))
    assert "expected text in 'text', found none" in message


def test_no_number_is_missing_in_parquet(place: Place, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {"instruction": ["a", "b"], "input": [float("nan"), 2.5], "output": ["x", "y"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    read = place.read("instructions", [str(tmp_path / "a.parquet")])
    assert [record["input"] for record in read] == ["", "2.5"]


# ---- forms that are not read as they stand ---------------------------------------------------------------------------

SHAPES = {
    "a conversation (messages": {"messages": [{"role": "user", "content": "hi"}]},
    "a conversation (conversations": {"id": 1, "conversations": [{"from": "human", "value": "hi"}]},
    "a preference pair": {"prompt": "x", "chosen": "a", "rejected": "b"},
    "a whole table or list in one object; write records: data[]": {
        "version": "1",
        "data": [{"title": "x", "paragraphs": [{"context": "c", "qas": []}]}],
    },
    "a question on a passage": {"question": "q", "context": "c", "answers": {"text": ["a"], "answer_start": [0]}},
    "a list of tokens": {"tokens": ["a", "b"], "ner_tags": [0, 1]},
    "a translation": {"translation": {"de": "ja", "en": "yes"}},
    "a question with a choice": {"question": "q", "choices": ["a", "b"], "answer": 0},
    "a whole table or list in one object; write records: columns": {"text": {"0": "a"}, "label": {"0": "ham"}},
    "a whole table or list in one object; write records: split": {"columns": ["text"], "index": [0], "data": [["a"]]},
    "a whole table or list in one object; write records: lists": {"text": ["a", "b"], "label": ["ham", "spam"]},
    "a whole table or list in one object; write records: rows[]": {"rows": [{"text": "a", "label": "ham"}]},
}
READ = ("a conversation", "a preference pair")  # as instructions


@pytest.mark.parametrize("kind", ["corpus", "messages", "instructions"])
@pytest.mark.parametrize("shape", SHAPES)
def test_other_forms_are_named_and_no_column_is_to_be_renamed(place: Place, kind: str, shape: str) -> None:
    if kind == "instructions" and shape.startswith(READ):
        return  # test_conversations.py
    for name in ("a.json", "a.jsonl"):
        message = place.refused(kind, (name, json.dumps(SHAPES[shape])))
        assert f"found {shape}" in message and any(
            way in message for way in ("not read yet", "write", "state", "under")
        )
        assert "name the right one" not in message


def test_columns_of_such_forms_may_be_named(place: Place) -> None:
    file = ("a.jsonl", json.dumps(SHAPES["a preference pair"]))
    assert place.read("instructions", file, instruction="prompt", output="chosen")[0]["output"] == "a"


# ---- labels and rows that cannot be used -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "cells", "expected"),
    [
        (["0", "1"], ["0", "1"], ["0", "1"]),
        (["0", "1"], ["0.0", "1.0"], ["0", "1"]),
        (["1.0", "2.0"], ["1.0", "2"], ["1.0", "2.0"]),
        (["true", "false"], ["true", "false"], ["true", "false"]),
        (["True", "False"], ["true", "false"], ["True", "False"]),
        (["ham", "spam"], ['"ham "', '" spam"'], ["ham", "spam"]),
    ],
)
def test_numbers_and_truth_values_are_labels(
    place: Place, labels: list[str], cells: list[str], expected: list[str]
) -> None:
    rows = "\n".join(f'{{"text": "x", "label": {cell}}}' for cell in cells)
    assert [row["label"] for row in place.read("messages", ("a.jsonl", rows), labels=labels)] == expected


def test_labels_are_found_out(place: Place) -> None:
    place.read("messages", ("a.csv", "text,label\nx,b\ny,a\nz,b\nw,10\n"), labels="auto")
    assert place.written is not None and place.written.labels == ["10", "a", "b"]
    place.read("messages", ("a.csv", "text,label\nx,ham\n"))
    assert place.written.labels == ["ham", "spam"]
    many = "text,label\n" + "\n".join(f"t{i},l{i}" for i in range(300))
    assert "more than 200 different ones" in place.refused("messages", ("a.csv", many), labels="auto")
    assert "labels: auto" in place.refused("messages", ("a.csv", "text,label\nx,b\n"))


def test_several_labels_in_a_cell_are_refused(place: Place) -> None:
    message = place.refused("messages", ("a.jsonl", '{"text": "x", "label": ["ham", "spam"]}'))
    assert "line 1: expected text in 'label', found list" in message and "several" in message


PAIRS = [{"instruction": f"i{i}", "input": "", "output": "" if i in (2, 3, 5) else "o"} for i in range(8)]


def test_rows_that_cannot_be_used_are_left_out_counted_and_listed(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "llm")
    logging.getLogger("llm").addHandler(caplog.handler)
    file = ("a.json", json.dumps(PAIRS))
    message = place.refused("instructions", file)
    assert "row 3: expected text in 'output', found none" in message and "skip_invalid: true" in message
    assert [row["instruction"] for row in place.read("instructions", file, skip_invalid=True)] == [
        "i0", "i1", "i4", "i6", "i7",
    ]  # fmt: skip
    assert "left out 3 of 8 rows: 3: expected text in 'output', found none" in caplog.text
    assert place.written is not None
    assert place.written.left_out.summary()["rows"] == 3
    listed = [json.loads(line) for line in place.out.with_suffix(".left_out.jsonl").read_text().splitlines()]
    assert [entry["row"].rpartition(", ")[2] for entry in listed] == ["row 3", "row 4", "row 6"]
    place.read("instructions", ("a.json", json.dumps(PAIRS[:2])), skip_invalid=True)
    assert not place.out.with_suffix(".left_out.jsonl").exists()


def test_each_kind_of_invalid_row_is_left_out(place: Place) -> None:
    lines = [
        '{"text": "a", "label": "ham"}',
        '{"text": "b", "label": "hmm"}',
        "{",
        "[]",
        '{"text": 7, "label": "spam"}',
    ]
    lines += ['{"text": "\\ud800", "label": "ham"}', '{"text": ["x"], "label": "ham"}', '{"label": "ham"}']
    assert place.texts("messages", ("a.jsonl", "\n".join(lines)), skip_invalid=True) == ["a", "7"]
    assert place.written is not None and place.written.left_out.counts.total() == 6
    table = "text,label\nx,ham\na,b,ham\n,spam\ny,spam\n"
    assert place.texts("messages", ("a.csv", table), skip_invalid=True) == ["x", "y"]
    none_left = place.refused("messages", ("a.jsonl", '{"body": "x"}'), skip_invalid=True)
    assert "found only body" in none_left


def test_reasons_without_end_are_counted_together(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MOST_REASONS", 2)
    rows = [f'{{"text": "x", "label": "l{i}"}}' for i in range(9)]
    place.read("messages", ("a.jsonl", "\n".join([*rows, '{"text": "x", "label": "ham"}'])), skip_invalid=True)
    assert place.written is not None and place.written.left_out.counts["other reasons"] == 7
    assert len(place.out.with_suffix(".left_out.jsonl").read_text().splitlines()) == 9


def test_a_row_limit(place: Place) -> None:
    table = "text,label\n" + "x,ham\n" * 5
    files = [place.put("a.csv", table), place.put("b.csv", table), place.put("c.csv", table)]
    assert len(place.read("messages", files, max_rows=7)) == 7
    assert place.written is not None and place.written.counts == [5, 2, 0]
    splits = {"train": files[:2], "test": files[2]}
    assert [row["split"] for row in place.read("messages", splits, max_rows=2)] == ["train", "train", "test", "test"]
    long = place.put("a.txt", "one====two====three")
    assert place.texts("corpus", [long], document_separator="====", max_rows=2) == ["one", "two"]
