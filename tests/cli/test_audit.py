"""The command that audits two files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm.checkpoint.folder import Checkpoint, CheckpointConfig, save_checkpoint
from llm.cli.main import main
from llm.model.gpt import GPT
from tests.datasets import document
from tests.helpers import LLAMA_FORM, gpt_config, randomize, tiny_tokenizer

STORY = "Anna rode to the mill with two sacks of corn before the rain came down over the hills"
OTHER = "The baker of the village sold no bread on Sunday, so the children went without their breakfast"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("train.csv").write_text(f'Label,Text\nham,"{STORY}"\nspam,"{OTHER}"\n' * 2)
    Path("test.csv").write_text(f'Label,Text\nham,"{OTHER.upper()}"\nspam,Something else that nobody has ever said\n')
    Path("clean.jsonl").write_text(json.dumps({"text": "Nothing of this was ever said to anybody"}) + "\n")
    Path("lines.txt").write_text(f"Nothing of it\n\n{STORY}\n")
    Path("pairs.jsonl").write_text(json.dumps({"instruction": STORY, "input": OTHER, "output": "yes"}) + "\n")
    Path("book.txt").write_text(f"It begins here.\n\n{STORY}\n\n{OTHER} and more")
    return tmp_path


def found(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, int]]:
    status = main(["audit", *arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)["parts"][0]["counts"]


def test_leaks_are_told_by_the_exit_status(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "train.csv", "test.csv"]) == 1
    assert f"| normalised | {OTHER.upper()} | {OTHER} |" in capsys.readouterr().out
    assert found(capsys, "train.csv", "clean.jsonl") == (
        0,
        {"exact": 0, "normalised": 0, "near": 0, "template": 0, "corpus": 0, "leaked": 0},
    )


def test_files_of_every_form_are_read(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, counts = found(capsys, "train.csv", "lines.txt")
    assert (status, counts["exact"], counts["leaked"]) == (1, 1, 1)
    status, counts = found(capsys, "pairs.jsonl", "pairs.jsonl", "--corpus", "book.txt")
    assert (status, counts["exact"], counts["corpus"], counts["leaked"]) == (1, 1, 1, 1)
    assert found(capsys, "clean.jsonl", "lines.txt", "--corpus", "book.txt")[1]["corpus"] == 1


def test_the_result_is_written_whole_to_a_file(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "train.csv", "lines.txt", "--json", "--out", "out/audit.json"]) == 1
    assert json.loads(Path("out/audit.json").read_text())["parts"][0]["counts"]["exact"] == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.csv", "none.csv"], "none.csv: expected a file, found nothing"),
        (["train.csv", "empty.txt"], "empty.txt: no row to read"),
        (["train.csv", "blank.txt"], "blank.txt: no text in it"),
        (["train.csv", "broken.jsonl"], "broken.jsonl"),
        (["train.csv", "test.csv", "--corpus", "none.txt"], "none.txt: expected a file"),
        (["train.csv", "numbers.csv"], "numbers.csv"),
    ],
)
def test_wrong_input_is_one_line(
    files: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    Path("empty.txt").write_text("")
    Path("blank.txt").write_text(" \n\n")
    Path("broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    Path("numbers.csv").write_text("a,b\n1,2\n3,4\n")
    assert main(["audit", *arguments, "--out", "audit.md"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m llm audit: ") and message in line
    assert not Path("audit.md").exists()


def test_a_model_is_asked_whether_it_has_seen_the_texts(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny_tokenizer()
    model = randomize(GPT(gpt_config(**LLAMA_FORM, vocab_size=280, context_length=64)))
    save_checkpoint(Path("base"), Checkpoint(model, tokenizer, CheckpointConfig(kind="base", gpt=model.config)))
    for name, start in (("seen.txt", 0), ("new.txt", 50)):
        Path(name).write_text("".join(f"{document(start + i, 1)[:80]}\n" for i in range(12)))
    assert main(["audit", "seen.txt", "new.txt", "--min-k", "base", "--k", "10", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["membership"]
    assert (found["share"], found["train"], found["test"]) == (0.1, 12, 12) and found["min_k"]["low"] < 0.5
    assert main(["audit", "seen.txt", "new.txt", "--min-k", "base", "--most-scored", "11"]) == 0
    assert "11 training and 11 held-out texts" in capsys.readouterr().out
    for more, message in (
        (["--min-k", "base", "--k", "0"], "expected a share of 0 to 100 %"),
        (["--min-k", "base", "--most-scored", "3"], "min-k: 3 training texts have 10 tokens or more"),
        (["--min-k", "nowhere"], "nowhere"),
    ):
        assert main(["audit", "seen.txt", "new.txt", *more]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert message in line
