"""The stage: `data/raw/` is whole or absent."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml

from llm.common.errors import InputError
from llm.config import parse_params
from stages.download import download
from stages.runtime.run import Run

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))


class FakeRun(SimpleNamespace):
    def __init__(self, **changes: str) -> None:
        values = json.loads(json.dumps(SHIPPED))
        values["data"] |= {key: value for key, value in changes.items() if key != "tokenizer"}
        values["tokenize"]["tokenizer"]["kind"] = changes.get("tokenizer", "bpe")
        values["sources"]["mine"] = {
            "licence": "private",
            "corpus": {"files": [{"path": "data/own/*.txt"}]},
            "messages": {"files": [{"path": "data/own/mails.csv"}], "labels": ["ham", "spam"]},
            "instructions": {"files": [{"path": "data/own/pairs.jsonl"}]},
        }
        super().__init__(params=parse_params(values), datasets=[])

    def dataset(self, name: str, digest: str, source: str, context: str) -> None:
        self.datasets.append((name, digest, source, context))


def run(**changes: str) -> FakeRun:
    fake = FakeRun(**changes)
    download(cast(Run, fake))
    return fake


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("data/raw", name).read_text(encoding="utf-8").split("\n")[:-1]]


def files() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path("data").rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "data/own"
    own.mkdir(parents=True)
    (own / "a.txt").write_text("first\n", encoding="utf-8")
    (own / "b.txt").write_text("second\n", encoding="utf-8")
    (own / "mails.csv").write_text("text,label\nhello,ham\nWIN,spam\n", encoding="utf-8")
    (own / "pairs.jsonl").write_text('{"instruction": "Greet", "output": "Hi"}\n', encoding="utf-8")
    (tmp_path / "data/sample").symlink_to(ROOT / "data/sample")


MINE = {"corpus": "mine", "messages": "mine", "instructions": "mine"}


def test_own_data() -> None:
    fake = run(**MINE)
    assert rows("corpus.jsonl") == [{"doc": 0, "text": "first\n"}, {"doc": 1, "text": "second\n"}]
    assert rows("messages.jsonl") == [{"text": "hello", "label": "ham"}, {"text": "WIN", "label": "spam"}]
    assert rows("instructions.jsonl") == [{"instruction": "Greet", "input": "", "output": "Hi"}]
    assert json.loads(Path("data/raw/labels.json").read_text()) == ["ham", "spam"]
    sources = json.loads(Path("data/raw/sources.json").read_text())
    assert [(f["file"], f["bytes"], f["records"]) for f in sources["corpus"]["files"]] == [
        ("data/own/a.txt", 6, 1),
        ("data/own/b.txt", 7, 1),
    ]
    assert [context for *_, context in fake.datasets] == ["corpus", "messages", "instructions"]
    assert all(len(digest) == 32 for _, digest, _, _ in fake.datasets)
    before = files()
    run(**MINE)
    assert files() == before


def test_the_sample() -> None:
    run()
    assert len({row["doc"] for row in rows("corpus.jsonl")}) > 100
    assert {row["label"] for row in rows("messages.jsonl")} == {"ham", "spam"}
    assert {"instruction", "input", "output", "task", "split"} == rows("instructions.jsonl")[0].keys()


def test_an_error_leaves_what_was_there_and_nothing_else() -> None:
    run(**MINE)
    before = files()
    own = Path("data/own/pairs.jsonl")
    own.write_text('{"instruction": "Greet"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="output"):
        run(**MINE)
    own.write_bytes(before["data/own/pairs.jsonl"])
    assert files() == before
    assert not Path("data/raw.partial").exists()


def test_what_is_left_out_and_found_out_is_recorded() -> None:
    Path("data/own/pairs.jsonl").write_text(
        '{"instruction": "Greet", "output": "Hi"}\n{"instruction": "Greet", "output": ""}\n', encoding="utf-8"
    )
    fake = FakeRun(**MINE)
    mine = fake.params.sources["mine"]
    changed = {
        "instructions": mine.instructions.model_copy(update={"skip_invalid": True}),
        "messages": mine.messages.model_copy(update={"labels": ["auto"]}),
    }
    sources = fake.params.sources | {"mine": mine.model_copy(update=changed)}
    fake.params = fake.params.model_copy(update={"sources": sources})
    download(cast(Run, fake))
    left_out = json.loads(Path("data/raw/sources.json").read_text())["instructions"]["left_out"]
    assert left_out == {"rows": 1, "reasons": [{"reason": "expected text in 'output', found none", "rows": 1}]}
    assert "line 2" in Path("data/raw/instructions.left_out.jsonl").read_text()
    assert json.loads(Path("data/raw/labels.json").read_text()) == ["ham", "spam"]


def test_what_a_killed_run_left_is_no_part_of_the_next() -> None:
    Path("data/raw.partial/gpt2").mkdir(parents=True)
    Path("data/raw.partial/gpt2/vocab.bpe").write_text("half")
    run(**MINE)
    assert sorted(path.name for path in Path("data/raw").iterdir()) == [
        "corpus.jsonl",
        "instructions.jsonl",
        "labels.json",
        "messages.jsonl",
        "sources.json",
    ]


def test_the_books_data(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_DATA_MIRROR", str(mirror))
    run(corpus="the-verdict", messages="sms-spam", instructions="book-instructions", tokenizer="gpt2")
    assert sum(len(row["text"]) for row in rows("corpus.jsonl")) == 20_479
    labels = [row["label"] for row in rows("messages.jsonl")]
    assert (len(labels), labels.count("ham"), labels.count("spam")) == (5_574, 4_827, 747)
    assert len(rows("instructions.jsonl")) == 1_100
    assert len(json.loads(Path("data/raw/gpt2/encoder.json").read_text())) == 50_257
    assert Path("data/raw/gpt2/vocab.bpe").read_text(encoding="utf-8").startswith("#version")


def test_novels(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_DATA_MIRROR", str(mirror))
    run(corpus="novels", messages="mine", instructions="mine")
    books: dict[int, str] = {}
    for row in rows("corpus.jsonl"):
        assert len(row["text"]) <= 1_000_000
        books[row["doc"]] = books.get(row["doc"], "") + row["text"]
    assert len(books) == 3
    for text in books.values():
        assert (
            "gutenberg" not in text[:200].lower() + text[-2000:].lower() and "\r" not in text and "\ufeff" not in text
        )
