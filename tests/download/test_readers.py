"""Every format in, JSON Lines out; and the one line that a wrong file gets."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import zipfile
from pathlib import Path
from typing import Any

import pandas
import pytest

from llm.common.errors import InputError
from llm.config import CorpusSource, InstructionsSource, MessagesSource, SourceFile
from llm.download.content import archives, formats
from llm.download.content.archives import DataFile
from llm.download.records import documents
from llm.download.records.readers import Section, write_records

FILES = [SourceFile(path="unused")]
CORPUS = CorpusSource(files=FILES)
MESSAGES = MessagesSource(files=FILES, labels=["ham", "spam"])
INSTRUCTIONS = InstructionsSource(files=FILES)


@pytest.fixture(params=[7, 1 << 20], ids=["tiny blocks", "one block"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in small blocks: no record may depend on where a block ends."""
    monkeypatch.setattr(archives, "BLOCK", request.param)
    monkeypatch.setattr(formats, "BLOCK", request.param)


def data_file(tmp_path: Path, name: str, content: str | bytes) -> DataFile:
    path = tmp_path / "downloaded"  # its name says nothing
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return DataFile(name, path, "", 0)


def read(section: Section, *files: DataFile) -> list[dict[str, Any]]:
    out = files[0].path.with_name("out.jsonl")
    write_records(section, list(files), out)
    return [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n")[:-1]]


def refused(section: Section, file: DataFile) -> str:
    with pytest.raises(InputError) as caught:
        read(section, file)
    message = str(caught.value)
    assert message.startswith(file.name) and "\n" not in message
    return message.removeprefix(file.name)


# ---- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("name", ["a.txt", "a.MD"])
def test_text(tmp_path: Path, name: str) -> None:
    file = data_file(tmp_path, name, "\ufeffGrüße,\r\n\rsaid 太郎.\u2028\x0c ok")
    assert read(CORPUS, file) == [{"doc": 0, "text": "Grüße,\n\nsaid 太郎.\u2028\x0c ok"}]


@pytest.mark.usefixtures("_blocks")
def test_documents(tmp_path: Path) -> None:
    separated = CorpusSource(files=FILES, document_separator="\n\n\n")
    file = data_file(tmp_path, "a.txt", "one\n\nstill one\r\n\r\n\r\ntwo\n\n\n \n\n\nthree\n\n\n\n\n\n")
    assert read(separated, file) == [
        {"doc": 0, "text": "one\n\nstill one"},
        {"doc": 1, "text": "two"},
        {"doc": 2, "text": "three"},
    ]


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize(("separator", "said"), [("\\n\\n", True), ("\n\n\n", True), ("\n\n", False), ("b.\n", False)])
def test_a_separator_that_never_occurs_is_said(
    tmp_path: Path, separator: str, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    section = CORPUS.model_copy(update={"document_separator": separator})
    with caplog.at_level(logging.WARNING, logger="llm"):
        found = read(section, data_file(tmp_path, "a.txt", "a\n\nb.\n"))
    assert (f"a.txt: document_separator {separator!r} never occurs, so nothing was cut" in caplog.text) == said
    assert len(found) == (2 if separator == "\n\n" else 1)


@pytest.mark.usefixtures("_blocks")
def test_long_documents_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE", 20)
    separated = CorpusSource(files=FILES, document_separator="====")
    first, second = "a line\nand another\n" * 5 + "words without a line end " * 3, "x" * 50 + "\n"
    found = read(separated, data_file(tmp_path, "a.txt", f"{first}===={second}====last"))
    assert max(len(record["text"]) for record in found) <= 20
    joined = ["".join(r["text"] for r in found if r["doc"] == doc) for doc in (0, 1, 2)]
    assert joined == [first, second, "last"]
    assert found[0]["text"] == "a line\nand another\n"
    rows = read(CORPUS, data_file(tmp_path, "a.jsonl", json.dumps({"text": first}) + "\n" + json.dumps({"text": "b"})))
    assert "".join(r["text"] for r in rows if r["doc"] == 0) == first
    assert rows[-1] == {"doc": 1, "text": "b"}


def test_documents_of_all_files_are_numbered(tmp_path: Path) -> None:
    files = []
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"1{name}|2{name}")
        files.append(DataFile(name, tmp_path / name, "", 0))
    out = tmp_path / "out"
    written = write_records(CorpusSource(files=FILES, document_separator="|"), files, out)
    assert [json.loads(line)["doc"] for line in out.read_text().splitlines()] == [0, 1, 2, 3]
    assert written.counts == [2, 2]
    assert written.md5 == hashlib.md5(out.read_bytes()).hexdigest()


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize(
    ("content", "offset"),
    [("Grüße ".encode() + b"caf\xe9 au lait", 11), (b"only half a character \xf0\x9f\x98", 22), (b"\x93a\x94", 0)],
)
def test_undecodable(tmp_path: Path, content: bytes, offset: int) -> None:
    message = refused(CORPUS, data_file(tmp_path, "a.txt", content))
    assert f"found byte 0x{content[offset]:02x} at offset {offset};" in message and "iconv" not in message


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json"])
def test_nothing_in_it(tmp_path: Path, name: str) -> None:
    content = {"a.csv": "text\n", "a.json": "[]"}.get(name, " \n\n")
    assert "expected text, found none" in refused(CORPUS, data_file(tmp_path, name, content))


@pytest.mark.parametrize("name", ["a.pdf", "a", "a.tar.gz", "a.txt"])
def test_unknown_format(tmp_path: Path, name: str) -> None:
    message = refused(MESSAGES, data_file(tmp_path, name, gzip.compress(b"data")))
    assert "expected a name that ends in .jsonl .json .csv .tsv .parquet" in message


# ---- rows ------------------------------------------------------------------------------------------------------------

ROWS = [
    {"text": 'She said "no",\nand left', "label": "ham", "split": "train"},
    {"text": "WIN\t1000 €", "label": "spam", "split": "test"},
]


def as_bytes(name: str, tmp_path: Path) -> bytes:
    frame, path = pandas.DataFrame(ROWS), tmp_path / "made"
    if name.startswith("a.parquet"):
        frame.to_parquet(path)
    elif name.startswith(("a.csv", "a.tsv")):
        frame.to_csv(path, index=False, sep="\t" if name.startswith("a.tsv") else ",")
    elif name.startswith("a.jsonl"):
        path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8")
    else:
        path.write_text(json.dumps(ROWS, indent=2), encoding="utf-8")
    content = path.read_bytes()
    return gzip.compress(content) if name.endswith(".gz") else content


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.parquet"])
def test_rows(tmp_path: Path, name: str, ending: str) -> None:
    file = data_file(tmp_path, name + ending, as_bytes(name + ending, tmp_path))
    section = MessagesSource(files=FILES, labels=["ham", "spam"], split="split")
    assert read(section, file) == ROWS
    assert read(MESSAGES, file) == [{"text": row["text"], "label": row["label"]} for row in ROWS]
    assert [record["text"] for record in read(CORPUS, file)] == [row["text"] for row in ROWS]


def test_parquet_member_of_a_zip(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.parquet", as_bytes("a.parquet", tmp_path))
    assert len(read(MESSAGES, DataFile("a.zip", path, "", 0, "x.parquet"))) == 2


def test_columns_of_other_names(tmp_path: Path) -> None:
    section = MessagesSource(files=FILES, labels=["0", "1"], text="body", label="is spam")
    file = data_file(tmp_path, "a.jsonl", '{"body": "hello", "is spam": 0}\n{"body": 5, "is spam": "1"}')
    assert read(section, file) == [{"text": "hello", "label": "0"}, {"text": "5", "label": "1"}]


def test_objects_in_a_row_in_a_json_file(tmp_path: Path) -> None:
    file = data_file(tmp_path, "a.json", '{"text": "1"}\n{"text": "2"}')
    assert [record["text"] for record in read(CORPUS, file)] == ["1", "2"]


@pytest.mark.usefixtures("_blocks")
def test_quotes_in_the_sms_format_are_characters(tmp_path: Path) -> None:
    section = MessagesSource(files=FILES, labels=["ham", "spam"], format="tsv")
    file = data_file(tmp_path, "SMS", 'ham\t"Hi\nspam\tWIN, a\tb\n\nham\tsaid "x""\n')
    assert [record["text"] for record in read(section, file)] == ['"Hi', "WIN, a\tb", 'said "x""']
    assert ", line 2: expected label TAB" in refused(section, data_file(tmp_path, "SMS", "ham\ta\nspam b\n"))


def test_instructions(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add", "input": "1 2", "output": "3", "kind": "sum", "split": "val"},
        {"instruction": "Greet", "output": "Hi", "kind": "talk", "split": "test", "input": None},
    ]
    file = data_file(tmp_path, "a.json", json.dumps(rows))
    assert read(INSTRUCTIONS, file) == [
        {"instruction": "Add", "input": "1 2", "output": "3"},
        {"instruction": "Greet", "input": "", "output": "Hi"},
    ]
    section = InstructionsSource(files=FILES, task="kind", split="split")
    assert read(section, file)[1] == {
        "instruction": "Greet",
        "input": "",
        "output": "Hi",
        "task": "talk",
        "split": "test",
    }
    without = data_file(tmp_path, "a.csv", "instruction,output\nGreet,Hi\n")
    assert read(INSTRUCTIONS, without) == [{"instruction": "Greet", "input": "", "output": "Hi"}]
    named = InstructionsSource(files=FILES, input="context")
    assert "expected 'context', found only instruction, output" in refused(named, without)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize(
    ("section", "name", "content", "expected"),
    [
        (MESSAGES, "a.csv", "text,kind\nhi,ham\n", ", line 2: expected 'label', found only text, kind; name"),
        (MESSAGES, "a.csv", "text,label\nhi,ham\nyo,spma\n", "3: expected a label out of ham, spam, found 'spma'"),
        (MESSAGES, "a.json", '[{"text": "a", "label": "HAM"}]', "row 1: expected a label out of ham, spam, found"),
        (MESSAGES, "a.jsonl", '{"text": " ", "label": "ham"}', ", line 1: expected text in 'text', found none"),
        (MESSAGES, "a.csv", "text,label\na,b,ham\n", ", line 2: expected 2 columns as in line 1, found 3"),
        (MESSAGES, "a.csv", 'text,label\n"a,ham\nb,ham\n', "expected cells with closed quotes"),
        (INSTRUCTIONS, "a.json", '[{"instruction": "a", "output": "b"},\n {"instruction": "c"}]', "row 2: expected"),
        (INSTRUCTIONS, "a.jsonl", '\n{"instruction": "a", "output": ""}', "line 2: expected text in 'output'"),
        (INSTRUCTIONS, "a.jsonl", '{"instruction": ["a"], "output": "b"}', "in 'instruction', found list"),
        (CORPUS, "a.jsonl", '{"text": "a"}\n{"text": "b"\n', ", line 2: expected one JSON object, found an error"),
        (CORPUS, "a.jsonl", '{"text": "a"}\n["b"]', ", line 2: expected one JSON object, found list"),
        (CORPUS, "a.json", '[{"text": "a"},\n\n{"text": b}]', ", line 3: expected a list of JSON objects"),
        (CORPUS, "a.json", '[{"text": "a"},\n', ", line 2: expected a list of JSON objects"),
        (CORPUS, "a.json", '["a"]', ", row 1: expected a JSON object, found str"),
        (CORPUS, "a.jsonl", '{"text": "\\ud83d"}', ", line 1: expected Unicode text in 'text', found half a character"),
        (CORPUS, "a.parquet", "text", ": expected a parquet file, found an error"),
        (CORPUS, "a.csv", "body\nhi\n", ", line 2: expected 'text', found only body; name the right one with text:"),
    ],
)  # fmt: skip
def test_wrong_rows(tmp_path: Path, section: Section, name: str, content: str, expected: str) -> None:
    assert expected in refused(section, data_file(tmp_path, name, content))


def test_missing_parquet_column(tmp_path: Path) -> None:
    section = MessagesSource(files=FILES, labels=["ham", "spam"], text="body")
    message = refused(section, data_file(tmp_path, "a.parquet", as_bytes("a.parquet", tmp_path)))
    assert ", row 1: expected 'body', found only text, label, split" in message


def test_wrong_split(tmp_path: Path) -> None:
    section = MessagesSource(files=FILES, labels=["ham", "spam"], split="split")
    file = data_file(tmp_path, "a.csv", "text,label,split\nhi,ham,first\n")
    assert ", line 2: expected a split, train, validation or test, found 'first'" in refused(section, file)


def test_rows_that_never_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "BLOCK", 10)
    monkeypatch.setattr(formats, "BLOCK", 10)
    monkeypatch.setattr(formats, "LARGEST_ROW", 50)
    assert "more than 50 characters" in refused(CORPUS, data_file(tmp_path, "a.jsonl", '{"text": "' + "a" * 100))
    file = data_file(tmp_path, "a.json", '[{"text": "' + "a" * 10_000)
    taken = []
    whole = DataFile.blocks
    monkeypatch.setattr(DataFile, "blocks", lambda self: (taken.append(b) or b for b in whole(self)))
    assert "line 1" in refused(CORPUS, file)
    assert sum(map(len, taken)) < 200


def test_columns_for_slices_stay_with_their_message(tmp_path: Path) -> None:
    section = MessagesSource(files=FILES, labels=["ham", "spam"], slices=["language", "year"])
    rows = "text,label,language,year,other\nhi,ham,de,2024,x\nyo,spam, ,7,y\n"
    assert read(section, data_file(tmp_path, "a.csv", rows)) == [
        {"text": "hi", "label": "ham", "slices": {"language": "de", "year": "2024"}},
        {"text": "yo", "label": "spam", "slices": {"language": "", "year": "7"}},
    ]
    lines = '{"text": "hi", "label": "ham", "language": null, "year": 2024}\n'
    assert read(section, data_file(tmp_path, "a.jsonl", lines))[0]["slices"] == {"language": "", "year": "2024"}
    lacking = data_file(tmp_path, "a.csv", "text,label,language\nhi,ham,de\n")
    assert "found only text, label, language; name the right one with slices:" in refused(section, lacking)
