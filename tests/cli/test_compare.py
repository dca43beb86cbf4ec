"""`python -m llm compare`: two models on the same examples, in words, figures and an exit status."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from llm.checkpoint.folder import Checkpoint, CheckpointConfig, save_checkpoint
from llm.cli.main import main
from llm.evaluation.comparison import mcnemar
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT
from tests.helpers import LLAMA_FORM, gpt_config, randomize, tiny_tokenizer
from tests.pipelines import execute


class Result(NamedTuple):
    status: int
    out: str
    err: str


Cli = Callable[..., Result]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.chdir(tmp_path)

    def run(*argv: str | Path) -> Result:
        status = main(["compare", *map(str, argv)])
        return Result(status, *capsys.readouterr())

    return run


def write(path: str, rows: list[dict[str, Any]]) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Path(path)


def messages(n: int, wrong: set[int], scratch_wrong: set[int] = frozenset()) -> list[dict[str, Any]]:
    labels = [("ham", "spam")[i % 2] for i in range(n)]
    other = {"ham": "spam", "spam": "ham"}

    def said(i: int, errors: set[int]) -> str:
        return other[labels[i]] if i in errors else labels[i]

    return [
        {
            "text": f"message {i}",
            "label": labels[i],
            "predicted": {"gpt": said(i, wrong), "scratch": said(i, scratch_wrong)},
            "probabilities": {said(i, wrong): 0.9, other[said(i, wrong)]: 0.1},
        }
        for i in range(n)
    ]


def test_verdicts_and_exit_statuses(cli: Cli) -> None:
    write("good/messages.jsonl", messages(400, set(range(5))))
    write("bad/messages.jsonl", messages(400, set(range(30))))
    write("other/messages.jsonl", messages(400, set(range(200, 206))))
    better = cli("bad", "good")
    assert better.status == 0 and "- accuracy: B is better than A by 6.2 points (p = " in better.out
    assert (
        "They differ on 25 examples, the first 10:" in better.out and "| message 5 | spam | ham | spam |" in better.out
    )
    worse = cli("good", "bad")
    assert worse.status == 3 and "- accuracy: B is worse than A by 6.2 points" in worse.out
    same = cli("good", "other")
    assert same.status == 0 and same.err == ""
    assert re.search(
        r"accuracy: B and A are not to be told apart \(p = 1; a difference of \d\.\d points would", same.out
    )
    assert cli("good", "other", "--require", "better").status == 3
    assert cli("bad", "good", "--require", "better").status == 0


def test_json_has_all_figures_and_examples(cli: Cli) -> None:
    write("a/messages.jsonl", messages(300, {1, 2, 3}))
    write("b/messages.jsonl", messages(300, {3, 4}))
    assert cli("a", "b", "--json", "--out", "c.json") == (0, "", "")
    found = json.loads(Path("c.json").read_text())["messages"]
    accuracy, f1, loss = found["metrics"]
    assert (accuracy["a"], accuracy["b"]) == pytest.approx((297 / 300, 298 / 300))
    assert (accuracy["only_a"], accuracy["only_b"]) == (1, 2)
    assert accuracy["p_mcnemar"] == pytest.approx(mcnemar(1, 2)) and accuracy["p_holm"] == 1
    assert 0 < accuracy["smallest"] < 0.1 and accuracy["low"] <= accuracy["difference"] <= accuracy["high"]
    assert (f1["metric"], loss["metric"], f1["p_mcnemar"]) == ("macro F1", "loss", None)
    assert loss["a"] == pytest.approx(np.mean([-np.log(0.1)] * 3 + [-np.log(0.9)] * 297))
    assert [row["example"] for row in found["differences"]] == [["message 1"], ["message 2"], ["message 4"]]
    assert found["differences"][0] == {"example": ["message 1"], "expected": "spam", "a": "ham", "b": "spam"}
    assert found["verdict"] == "not to be told apart"


def test_models_of_one_file_and_folders_of_several_kinds(cli: Cli) -> None:
    write("reports/predictions/messages.jsonl", messages(200, {1}, set(range(40))))
    pairs = [
        {"instruction": "say", "input": f"w{i}", "output": f"w{i}", "answers": {"gpt": f"w{i} ", "scratch": "no"}}
        for i in range(50)
    ]
    write("reports/predictions/instructions.jsonl", pairs)
    result = cli("reports:scratch", "reports:gpt")
    assert result.status == 0
    assert "## Messages: 200 examples" in result.out and "## Instructions: 50 examples" in result.out
    assert "- exact match: B is better than A by 100.0 points" in result.out and "ROUGE-L" in result.out
    assert "corrected for 4 metrics" in result.out
    alone = cli("reports/predictions/messages.jsonl:scratch", "reports/predictions/messages.jsonl")
    assert "corrected for 2 metrics" in alone.out  # scratch has no probabilities, so no loss is compared
    assert "no model 'base' (found gpt, scratch)" in cli("reports:base", "reports").err


def test_order_and_repeated_examples_do_not_matter(cli: Cli) -> None:
    rows = messages(60, {7}) + messages(60, {7})
    write("a.jsonl", rows)
    write("b.jsonl", rows[::-1])
    assert "They differ on 0 examples." in cli("a.jsonl", "b.jsonl").out


def test_files_of_classify_and_of_others_are_read(cli: Cli) -> None:
    Path("a.csv").write_text("text,given_label,label,probability_ham\none,ham,ham,1\ntwo,spam,ham,1\n")
    Path("b.csv").write_text("id,question,expected,prediction\n1,one,ham,ham\n2,two,spam,spam\n")
    assert "exact match" in cli("b.csv", "b.csv").out
    assert "a.csv has messages, b.csv has instructions; compare what is alike" in cli("a.csv", "b.csv").err
    write("b.jsonl", [{"text": text, "label": x, "predicted": x} for text, x in (("two", "spam"), ("one", "ham"))])
    result = cli("a.csv", "b.jsonl")
    assert result.status == 0 and "| two | spam | ham | spam |" in result.out


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            messages(9, set()),
            r"not the same examples: a.jsonl has 10, b.jsonl 9; 1 of a.jsonl are not in b.jsonl, .*9'",
        ),
        (messages(11, set()), r"1 of b.jsonl are not in a.jsonl, the first is 'message 10'"),
        (
            [r | {"label": "ham"} for r in messages(10, set())],
            r"not the same truth for 5 examples: 'message 1' is 'spam'",
        ),
        ([{"instruction": "x", "output": "y", "answer": "z"}], r"a.jsonl has messages, b.jsonl has instructions"),
        ([{"text": "x", "label": "y"}], r"b.jsonl, line 1: no prediction with its truth"),
        ([{"label": "y", "predicted": "y"}], r"b.jsonl, line 1: no example \(expected one of id, text"),
        ([], r"b.jsonl: no prediction in it"),
    ],
)
def test_what_cannot_be_compared_is_one_line(cli: Cli, rows: list[dict[str, Any]], message: str) -> None:
    write("a.jsonl", messages(10, set()))
    write("b.jsonl", rows)
    result = cli("a.jsonl", "b.jsonl", "--out", "c.md")
    assert result.status == 1 and re.search(message, result.err), result.err
    assert result.err.count("\n") == 1 and not Path("c.md").exists()


def test_a_name_that_is_nothing_is_one_line(cli: Cli) -> None:
    write("a/messages.jsonl", messages(10, set()))
    result = cli("a", "no-such-thing")
    assert result.status == 1 and result.err.count("\n") == 1
    assert "no-such-thing: no file or folder, nor a revision with reports/predictions at hand" in result.err
    Path("empty").mkdir()
    assert "empty: no predictions (expected messages.jsonl or instructions.jsonl)" in cli("a", "empty").err


def model_folder(name: str, kind: str, seed: int) -> str:
    tokenizer = tiny_tokenizer()
    gpt = GPT(gpt_config(**LLAMA_FORM, vocab_size=tokenizer.vocab_size))
    labels = ["ham", "spam"] if kind == "classifier" else None
    model: GPT | GPTClassifier = GPTClassifier(gpt, 2) if labels else gpt
    randomize(model, seed) if seed else randomize(model)
    template = "chatml" if kind == "instruct" else None
    config = CheckpointConfig(
        kind=kind, gpt=gpt.config, labels=labels, max_length=12 if labels else None, template=template
    )
    save_checkpoint(Path(name), Checkpoint(model, tokenizer, config))
    return name


@pytest.mark.parametrize("kind", ["classifier", "base", "instruct"])
def test_model_folders_are_run_on_a_test_set(cli: Cli, kind: str) -> None:
    a, b = model_folder("a", kind, 0), model_folder("b", kind, 1)
    pair = {"instruction": "say", "output": "cat"}
    rows = [{"text": f"the cat {i}", "label": ("ham", "spam")[i % 2], "input": str(i), **pair} for i in range(12)]
    data = write("test.jsonl", rows)
    result = cli(a, b, "--data", data, "--json")
    assert result.status in (0, 3), result.err
    found = json.loads(result.out)[{"base": "text", "classifier": "messages", "instruct": "instructions"}[kind]]
    assert found["examples"] == 12 and found["differences"]
    metrics = {"base": "bits per byte", "classifier": "accuracy, macro F1, loss", "instruct": "exact match, ROUGE-L"}
    assert ", ".join(m["metric"] for m in found["metrics"]) == metrics[kind]
    same = json.loads(cli(a, a, "--data", data, "--json").out)
    assert [m["difference"] for part in same.values() for m in part["metrics"]] == [0] * len(found["metrics"])
    assert "missing" in cli(a, b).err, "no data/tokens here"


def test_foreign_text_stays_text(cli: Cli) -> None:
    rows = messages(10, {0})
    rows[0]["text"] = "x | <b>y</b> \x1b[31m\n# no heading"
    write("a.jsonl", rows)
    write("b.jsonl", [r | {"predicted": r["label"]} for r in rows])
    out = cli("a.jsonl", "b.jsonl").out
    assert "\x1b" not in out and "\n# no" not in out and "<b>" not in out.replace("\\<b\\>", "")


@pytest.mark.slow
def test_experiments_of_dvc_are_revisions(cli: Cli, tmp_path: Path) -> None:
    stage = {"cmd": "mkdir -p reports/predictions && cp in.jsonl reports/predictions/messages.jsonl"}
    Path("dvc.yaml").write_text(
        json.dumps({"stages": {"e": {**stage, "deps": ["in.jsonl"], "outs": ["reports/predictions"]}}})
    )
    execute(tmp_path, "git", "init", "-q")
    execute(tmp_path, "dvc", "init", "-q")
    write("in.jsonl", messages(200, set(range(40))))
    execute(tmp_path, "dvc", "repro", "-q")
    execute(tmp_path, "git", "add", "-A")
    execute(tmp_path, "git", "commit", "-qm", "one")
    write("in.jsonl", messages(200, set()))
    execute(tmp_path, "dvc", "exp", "run", "-q", "-n", "bold-try")
    result = cli("HEAD", "bold-try")
    assert result.status == 0 and "- accuracy: B is better than A by 20.0 points" in result.out, result.err
    assert cli("bold-try", "HEAD").status == 3
