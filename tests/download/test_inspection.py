"""Files of every shape that people have: the proposal works as it is printed, and what is no data is not known."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from llm.cli.main import main
from llm.common.errors import InputError
from llm.config import parse_params
from llm.download.fetching.fetch import fetch
from llm.download.inspection import inspect_file, params_lines
from llm.download.records.readers import write_records
from tests.conftest import ROOT
from tests.download.files import zipped
from tests.download.test_extract import docx, pdf, xlsx

MAILS = [(f"Could you send me invoice number {i}, please?", "question") for i in range(6)]
MAILS += [(f"The parcel {i} has arrived broken - this is the second time!", "complaint") for i in range(6)]
QA = [{"instruction": f"Name number {i}.", "input": "", "output": f"It is {i}, as said."} for i in range(4)]
LONG = "It was a long evening in the harbour, and the boats lay still. " * 4


def rows(text: str, label: str) -> list[dict[str, Any]]:
    return [{text: mail, label: kind} for mail, kind in MAILS]


def renamed(**names: str) -> list[dict[str, Any]]:
    return [{names.get(key, key): value for key, value in pair.items() if names.get(key) != ""} for pair in QA]


def lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def table(separator: str, header: str | None, records: list[dict[str, Any]]) -> str:
    cells = [separator.join(str(value) for value in record.values()) for record in records]
    return "\n".join(([header] if header else []) + cells) + "\n"


def parquet(records: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), buffer)
    return buffer.getvalue()


TALK = [
    {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate("Hi? Hello. So? Well.".split())
]
SHAREGPT = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate("Hi? Hello. So? Well.".split())]
QUOTED = '"' + json.dumps(TALK).replace('"', '""') + '"'
BY_COMMA = [{"text": mail.replace(",", ""), "label": kind} for mail, kind in MAILS]
RUSSIAN = [{"text": f"Когда придёт мой заказ номер {i}? Я жду его уже неделю.", "label": "вопрос"} for i in range(5)]
RUSSIAN += [{"text": f"Посылка {i} пришла сломанной, это ужасно.", "label": "жалоба"} for i in range(5)]
KNOWN: dict[str, tuple[str, str | bytes, str, int]] = {  # name, content, kind, records
    "plain text": ("a.txt", LONG, "corpus", 1),
    "a PDF": ("a.pdf", pdf("The boats lay still."), "corpus", 1),
    "a Word document": ("letter.docx", docx(LONG), "corpus", 1),
    "an Excel sheet": ("a.xlsx", xlsx(Mails=[["text", "label"], *map(list, MAILS)]), "messages", 12),
    "markdown": ("a.md", "# Title\n\n" + LONG, "corpus", 1),
    "code": ("a.py", "import os\n\nprint(os.name, 1)\n", "corpus", 1),
    "text without ending": ("notes", LONG, "corpus", 1),
    "packed text": ("a.txt.gz", gzip.compress(LONG.encode()), "corpus", 1),
    "UTF-16 text": ("a.txt", LONG.encode("utf-16"), "corpus", 1),
    "text column": ("a.jsonl", lines([{"text": LONG}] * 3), "corpus", 3),
    "story column": ("a.jsonl", lines([{"id": i, "story": LONG} for i in range(3)]), "corpus", 3),
    "longest column": ("a.json", json.dumps([{"url": "x", "prose": LONG}] * 3), "corpus", 3),
    "corpus in parquet": ("a.parquet", parquet([{"content": LONG, "n": 3}] * 3), "corpus", 3),
    "csv": ("a.csv", table(";", "text;label", rows("text", "label")), "messages", 12),
    "csv of other columns": ("a.csv", table(";", "body;kind", rows("body", "kind")), "messages", 12),
    "csv label first": ("a.csv", table(",", "category,message", [dict(reversed(r.items())) for r in BY_COMMA]),
                        "messages", 12),
    "csv without header": ("a.csv", table(",", None, BY_COMMA), "messages", 12),
    "Excel's csv": ("a.csv", "sep=;\r\n" + table(";", "text;label", rows("text", "label")), "messages", 12),
    "tsv": ("a.tsv", table("\t", "text\tlabel", rows("text", "label")), "messages", 12),
    "SMS collection": ("SMSSpamCollection", table("\t", None, [dict(reversed(r.items())) for r in rows("a", "b")]),
                       "messages", 12),
    "bars in a .txt": ("a.txt.bak", table("|", "text|label", rows("text", "label")), "messages", 12),
    "windows-1251": ("a.csv", table(";", "text;label", RUSSIAN).encode("cp1251"), "messages", 10),
    "columns that only content tells": ("a.jsonl", lines(rows("what_they_wrote", "desk")), "messages", 12),
    "numbers as labels": ("a.jsonl", lines([{"review": LONG, "label": i % 2} for i in range(6)]), "messages", 6),
    "messages in parquet": ("train.parquet", parquet(rows("sentence", "sentiment")), "messages", 12),
    "zipped messages": ("a.zip", zipped({"a/b.csv": table(";", "text;label", rows("text", "label")).encode()}),
                        "messages", 12),
    "its own splits": ("a.jsonl", lines([row | {"part": "x", "split": "dev"} for row in rows("text", "label")]),
                       "messages", 12),
    "Alpaca": ("a.json", json.dumps(QA), "instructions", 4),
    "instructions in lines": ("a.jsonl", lines(renamed(input="")), "instructions", 4),
    "prompt and completion": ("a.jsonl", lines(renamed(instruction="prompt", output="completion", input="")),
                              "instructions", 4),
    "Dolly": ("a.jsonl", lines([p | {"category": "open_qa"} for p in
                                renamed(output="response", input="context")]), "instructions", 4),
    "question and answer": ("a.csv", table(";", "question;answer", renamed(instruction="question", output="answer",
                            input="")), "instructions", 4),
    "question and answer in a .tsv": ("a.tsv", table("\t", "Question\tAnswer", renamed(instruction="Question",
                                      output="Answer", input="")), "instructions", 4),
    "joined JSON": ("a.json", json.dumps(QA) + "\n" + json.dumps(QA), "instructions", 8),
    "ndjson": ("a.ndjson", lines(QA), "instructions", 4),
    "OpenAI's messages": ("a.jsonl", lines([{"messages": TALK}] * 3), "instructions", 3),
    "ShareGPT": ("a.json", json.dumps([{"id": "x", "conversations": SHAREGPT}] * 2), "instructions", 2),
    "a conversation in parquet": ("a.parquet", parquet([{"messages": TALK, "source": "x"}] * 2), "instructions", 2),
    "messages as text in a .csv": ("a.csv", "id,messages\n1," + QUOTED + "\n2," + QUOTED + "\n", "instructions", 2),
    "two conversations a row": ("a.jsonl", lines([{"long": TALK, "short": TALK[:2]}] * 2), "instructions", 2),
    "Gemini's contents": ("a.jsonl", lines([{"contents": [
        {"role": "user", "parts": [{"text": "Hi?"}]}, {"role": "model", "parts": [{"text": "Hello."}]}]}]),
        "instructions", 1),
    "prompt and completion of messages": ("a.jsonl", lines([{"prompt": TALK[:1], "completion": TALK[1:2]}] * 2),
                                          "instructions", 2),
    "preferred texts": ("a.jsonl", lines([{"prompt": "Hi?", "chosen": "Hello.", "rejected": "Go."}] * 2),
                        "instructions", 2),
    "preferred messages": ("a.jsonl", lines([{"chosen": TALK, "rejected": [*TALK[:3], TALK[1]]}] * 2),
                           "instructions", 2),
    "preferred dialogues": ("a.jsonl", lines([{"chosen": "\n\nHuman: Hi?\n\nAssistant: Hello.",
                            "rejected": "\n\nHuman: Hi?\n\nAssistant: Go."}] * 2), "instructions", 2),
    "SQuAD": ("a.json", json.dumps({"version": "1", "data": [{"title": "T", "paragraphs": [{"context": LONG, "qas": [
        {"question": "Where?", "answers": [{"text": "There", "answer_start": 1}]},
        {"question": "When?", "answers": [{"text": "Late", "answer_start": 1}]}]}]}]}), "instructions", 2),
    "SQuAD in rows": ("a.jsonl", lines([{"question": "Where?", "context": LONG, "answers": {"text": ["There", "Here"],
                      "answer_start": [1, 1]}}] * 2), "instructions", 2),
    "rows under a key": ("a.json", json.dumps({"info": LONG, "items": rows("text", "label")}), "messages", 12),
    "pandas, split": ("a.json", json.dumps({"columns": ["text", "label"], "index": list(range(12)),
                      "data": [list(row.values()) for row in rows("text", "label")]}), "messages", 12),
    "pandas, columns": ("a.json", json.dumps({name: {str(i): row[name] for i, row in enumerate(rows("text", "label"))}
                        for name in ("text", "label")}), "messages", 12),
    "pandas, index": ("a.json", json.dumps({str(i): row for i, row in enumerate(rows("text", "label"))}),
                      "messages", 12),
    "pandas, table": ("a.json", json.dumps({"schema": {"fields": [{"name": "text"}]}, "data": rows("text", "label")}),
                      "messages", 12),
    "a list for each column": ("a.json", json.dumps({name: [row[name] for row in rows("text", "label")]
                               for name in ("text", "label")}), "messages", 12),
}  # fmt: skip


@pytest.mark.parametrize("shape", KNOWN)
def test_the_proposal_reads_the_whole_file(shape: str, tmp_path: Path) -> None:
    name, content, kind, n = KNOWN[shape]
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    found = inspect_file(str(path))
    assert found.kind == kind
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    proposed = yaml.safe_load(params_lines(found))
    values["data"] |= proposed["data"]
    values["sources"] |= proposed["sources"]
    section = getattr(parse_params(values).sources["mine"], kind)
    files = [file for entry in section.files for file in fetch(section.entry(entry), tmp_path / "cache")]
    written = write_records(section, files, tmp_path / "out.jsonl")
    assert written.counts == [n]
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert records[:3] == found.records
    assert all(("split" in record) == (shape == "its own splits") for record in records)
    if kind == "messages":
        assert len({record["label"] for record in records}) == 2
        assert all(len(record["text"]) > len(record["label"]) for record in records)


UNKNOWN: dict[str, tuple[str, str | bytes, str]] = {
    "a broken PDF": ("a.pdf", b"%PDF-1.7\n", "expected a PDF, found an error"),
    "a broken workbook": ("a.xlsx", zipped({"xl/workbook.xml": b"<x/>"}), "expected an Excel workbook, found an error"),
    "a picture": ("a.csv", b"\x89PNG\r\n\x1a\n" + bytes(50), "found an image"),
    "random bytes": ("a", bytes(range(256)) * 4, "found no ending"),
    "a pointer": ("a.csv", "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n", "git lfs pull"),
    "nothing": ("a.txt", b"", "an empty file"),
    "blanks": ("a.txt", b" \n\n ", "found none"),
    "a login page": ("a.csv", "<!doctype html><html><body>Log in</body></html>", "found an HTML page"),
    "a conversation without an answer": (
        "a.jsonl",
        lines([{"messages": [{"role": "user", "content": "hi"}]}]),
        "expected an answer",
    ),
    "tagged words": ("a.jsonl", lines([{"tokens": ["It", "sat"], "tags": [0, 1]}] * 3), "a list of tokens"),
    "translations": ("a.jsonl", lines([{"translation": {"en": "cat", "de": "Katze"}}] * 3), "translation.en"),
    "choices": ("a.jsonl", lines([{"q": "Which?", "choices": ["a", "b"], "answer": 1}] * 3), "a choice of answers"),
    "numbers": ("a.csv", "x,y\n1,2\n3,4\n5,6\n", "no column looks like a text"),
    "a list of numbers": ("a.json", "[1, 2, 3]", "expected a JSON object"),
    "several files": ("a.zip", zipped({"a.txt": b"a", "b.txt": b"b"}), "say which with member:"),
    "another encoding": ("a.txt", b"only a caf\xe9 au lait", "expected UTF-8"),
}


@pytest.mark.parametrize("shape", UNKNOWN)
def test_what_no_source_reads_is_not_known(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, content, reason = UNKNOWN[shape]
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    before = sorted(tmp_path.iterdir())
    assert main(["inspect", name]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"python -m llm inspect: {name}: not known: ")
    assert reason in printed.err and printed.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_prints_form_records_and_params(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.csv").write_text(table(";", "body;kind", rows("body", "kind") + rows("body", "kind")))
    assert main(["inspect", "train.csv"]) == 0
    out = capsys.readouterr().out
    assert "looks like: a table with 2 columns (body, kind) separated by semicolons, with a header, UTF-8" in out
    assert "read as:    messages" in out and "its name says train" in out
    first = {"text": MAILS[0][0], "label": "question"}
    assert json.dumps(first) in out and out.count('"label": "question"') == 3
    assert '      labels: ["complaint", "question"]\n      text: "body"\n      label: "kind"\n' in out
    with zipfile.ZipFile("a.zip", "w") as archive:
        archive.writestr("a.txt", LONG)
        archive.writestr("b.csv", "x")
    assert main(["inspect", "a.zip", "--member", "a.txt"]) == 0
    assert '        member: "a.txt"' in capsys.readouterr().out
    assert main(["inspect", "nowhere.csv"]) == 1


def test_texts_are_shown_and_not_obeyed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines([{"text": "\x1b[2J" + LONG, "\x1b[0m": 1}]))
    assert main(["inspect", str(path)]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("where", ["folder", "nothing"])
def test_only_files_are_looked_at(where: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    refuse: Callable[[], object] = lambda: inspect_file(str(tmp_path / where))  # noqa: E731
    with pytest.raises(InputError, match="expected a file, found"):
        refuse()
