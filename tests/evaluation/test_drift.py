"""Drift of inputs: false alarms at the stated rate, and changes of each kind found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llm.checkpoint.folder import Checkpoint, CheckpointConfig, save_checkpoint
from llm.cli.main import main
from llm.evaluation.drift import Sample, detect_drift, draw
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT
from tests.helpers import LLAMA_FORM, gpt_config, randomize, tiny_tokenizer

WORDS = [f"w{i}" for i in range(30)]


def sample(rng: np.random.Generator, n: int = 60, length: float = 8, favourite: float = 0, spam: float = 0.5) -> Sample:
    """Draw texts; `favourite` is the share of words that are the first one."""
    tokens = [
        [WORDS[0] if rng.random() < favourite else WORDS[rng.integers(30)] for _ in range(1 + rng.poisson(length))]
        for _ in range(n)
    ]
    labels = [("ham", "spam")[int(rng.random() < spam)] for _ in range(n)]
    return Sample([" ".join(each) for each in tokens], tokens, [0.0] * n, labels, rng.random(n).tolist())


def test_false_alarms_stay_below_the_stated_rate() -> None:
    rng = np.random.default_rng(0)
    tests = [detect_drift(sample(rng, 30), sample(rng, 40), alpha=0.1, permutations=120) for _ in range(40)]
    alarms = sum(any(test.drift for test in each) for each in tests)
    assert alarms <= 10, "4 of 40 are due, and more than 10 have a probability of 0.1 %"
    p = np.array([[test.p for test in each] for each in tests])
    for name, column in zip([test.name for test in tests[0]], p.T, strict=True):
        if name != "single bytes":  # all alike here, so p is 1
            assert 0.3 < np.median(column) < 0.7, name


@pytest.mark.parametrize(
    ("change", "tests"),
    [
        ({"length": 16}, {"length"}),
        ({"favourite": 0.15}, {"tokens"}),
        ({"spam": 0.95}, {"labels"}),
        ({"favourite": 0.4, "length": 20}, {"tokens", "length", "two-sample classifier"}),
    ],
)
def test_a_change_is_found_by_its_test(change: dict[str, float], tests: set[str]) -> None:
    rng = np.random.default_rng(1)
    found = detect_drift(sample(rng, 120), sample(rng, 120, **change), permutations=1000)  # type: ignore[arg-type]
    assert tests <= {test.name for test in found if test.drift}
    if "favourite" in change:
        assert found[0].detail.startswith("'w0' +"), "the token that rose"


def test_single_bytes_and_confidence_count() -> None:
    rng = np.random.default_rng(2)
    a, b = sample(rng, 80), sample(rng, 80)
    b = b._replace(single_bytes=[0.3] * 40 + [0.0] * 40, confidence=[c / 3 for c in b.confidence or []])
    drifted = {test.name for test in detect_drift(a, b) if test.drift}
    assert {"single bytes", "confidence"} <= drifted
    assert not {"tokens", "length", "labels"} & drifted


def test_a_draw_is_the_same_each_time() -> None:
    texts = [str(i) for i in range(100)]
    assert draw(texts, 10) == draw(texts, 10) != draw(texts, 10, seed=1)
    assert draw(texts, 200) == texts and draw(texts, 10) == sorted(draw(texts, 10), key=int)


def test_the_command_of_a_cron_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    model = GPTClassifier(GPT(gpt_config(**LLAMA_FORM, vocab_size=tokenizer.vocab_size)), 2)
    randomize(model)
    config = CheckpointConfig(kind="classifier", gpt=model.gpt.config, labels=["ham", "spam"], max_length=16)
    save_checkpoint(Path("m"), Checkpoint(model, tokenizer, config))
    same = [f"the {a} sat on the mat {i % 7}" for i in range(30) for a in ("cat", "dog")]
    Path("a.txt").write_text("\n".join(same) + "\n")
    Path("b.jsonl").write_text("".join(json.dumps({"instruction": t, "input": "", "output": "x"}) + "\n" for t in same))
    strange = "".join(json.dumps({"text": f"日本語 {i} spam spam"}) + "\n" for i in range(40)) + '{"text": ""}\n'
    Path("c.jsonl").write_text(strange, encoding="utf-8")
    assert main(["drift", "a.txt", "b.jsonl", "--model", "m"]) == 0
    assert capsys.readouterr().out.startswith("No drift. Without drift 1 % of such runs at most say otherwise.")
    assert main(["drift", "a.txt", "c.jsonl", "--model", "m", "--json"]) == 1
    found = {test["name"]: test for test in json.loads(capsys.readouterr().out)}
    assert set(found) == {"tokens", "length", "single bytes", "labels", "confidence", "two-sample classifier"}
    assert found["single bytes"]["drift"] and found["tokens"]["drift"]
    assert main(["drift", "a.txt", "c.jsonl"]) == 1
    capsys.readouterr()
    Path("few.txt").write_text("one\n")
    for arguments, message in (
        (["a.txt", "few.txt"], "few.txt: 1 texts (expected at least 10); collect more"),
        (["a.txt", "none.csv"], "none.csv"),
        (["a.txt", "a.txt", "--alpha", "0"], "--alpha: expected 0.005 to 1, got 0; correct it"),
    ):
        assert main(["drift", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
