"""lm-evaluation-harness on a model folder: its likelihoods are ours, and a task of this repository runs offline."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llm.checkpoint.folder import save_checkpoint
from llm.cli.main import main
from llm.common.errors import InputError
from llm.evaluation.base.harness import cut, evaluate_tasks, harness_lm
from llm.inference.score import score_continuations, score_tokens
from llm.model.gpt import GPT
from llm.tokenizer.bpe import Tokenizer
from tests.evaluation.models import make_folder

ROOT = Path(__file__).resolve().parents[2]
TEXT = "the cat sat on the mat"


def requests(*arguments: tuple[object, ...]) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=each) for each in arguments]


def test_a_continuation_costs_what_it_adds_to_its_context(tokenizer: Tokenizer) -> None:
    model = make_folder(tokenizer).model
    assert isinstance(model, GPT)
    ids = tokenizer.encode(TEXT)
    pairs = [(ids[:n], ids[n:]) for n in (1, 3, 5)] + [(ids * 90, ids), (ids, [])]
    found = score_continuations(model, pairs, batch_size=2)
    for (context, continuation), score in zip(pairs[:3], found, strict=False):
        whole, alone = (score_tokens(model, torch.tensor(x)).nats for x in ([*context, *continuation], context))
        assert score.nats == pytest.approx(whole - alone, abs=1e-4)
        assert score.tokens == len(continuation)
    cut_off = (ids * 90 + ids)[-model.config.context_length - 1 :]
    with torch.no_grad():
        logits = model(torch.tensor([cut_off[:-1]]))[0, -len(ids) :]
    assert found[3].nats == pytest.approx(float(-logits.log_softmax(-1)[range(len(ids)), ids].sum()), rel=1e-4)
    assert found[4] == (0.0, 0, True)
    likeliest = [int(logits[0].argmax())]
    assert score_continuations(model, [(cut_off[: -len(ids)], likeliest)])[0].greedy
    with pytest.raises(InputError, match="expected a context and"):
        score_continuations(model, [([], ids)])
    with pytest.raises(InputError, match="at most 256 tokens"):
        score_continuations(model, [(ids, ids * 99)])


def test_likelihoods_of_the_harness_are_ours(tokenizer: Tokenizer) -> None:
    pytest.importorskip("lm_eval")
    checkpoint = make_folder(tokenizer)
    assert isinstance(checkpoint.model, GPT)
    lm = harness_lm(checkpoint)
    [(first, _), (empty, _)] = lm.loglikelihood(requests(("the cat", " sat on"), ("", TEXT)), disable_tqdm=True)
    ids = tokenizer.encode(TEXT)
    behind_separator = score_tokens(checkpoint.model, torch.tensor([tokenizer.eot, *ids])).nats
    assert empty == pytest.approx(-behind_separator, rel=1e-5)
    whole = tokenizer.encode("the cat sat on")
    n = len(tokenizer.encode("the cat"))
    assert first == pytest.approx(-score_continuations(checkpoint.model, [(whole[:n], whole[n:])])[0].nats)
    [short, long] = lm.loglikelihood_rolling(requests((TEXT,), ((TEXT + " ") * 80,)), disable_tqdm=True)
    assert short == pytest.approx(empty, rel=1e-5)
    many = torch.tensor([tokenizer.eot, *tokenizer.encode((TEXT + " ") * 80)])
    assert len(many) > 256 and long == pytest.approx(-score_tokens(checkpoint.model, many).nats, rel=1e-6)


def test_texts_end_where_the_task_says(tokenizer: Tokenizer) -> None:
    pytest.importorskip("lm_eval")
    lm = harness_lm(make_folder(tokenizer))
    settings: list[dict[str, object]] = [{"max_gen_toks": 6, "until": []}, {"max_gen_toks": 3, "until": ["zzz"]}]
    long, short = lm.generate_until(requests(("the cat", settings[0]), ("the cat", settings[1])))
    assert long.startswith(short) and len(tokenizer.encode(short)) <= 3
    assert cut("one two three", ["three", " two"]) == "one" and cut("one", "x") == "one" and cut("one", [""]) == "one"


def test_other_kinds_of_models_are_refused(tokenizer: Tokenizer) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(InputError, match="expected base or instruct, got classifier"):
        harness_lm(make_folder(tokenizer, "classifier", ["a", "b"]))


@pytest.mark.slow
def test_a_task_of_the_repository_runs_offline(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(ROOT)
    for name, value in (("HF_DATASETS_OFFLINE", "1"), ("HF_HUB_OFFLINE", "1"), ("HF_HOME", str(tmp_path / "hf"))):
        monkeypatch.setenv(name, value)
    checkpoint = make_folder(tokenizer)
    save_checkpoint(tmp_path / "model", checkpoint)
    tasks = ["--tasks", "sample_opposites", "--include-path", "tests/evaluation/tasks"]
    assert main(["harness", str(tmp_path / "model"), *tasks, "--out", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    lm, right = harness_lm(checkpoint), 0
    for line in Path("tests/evaluation/tasks/opposites.jsonl").read_text().splitlines():
        row = json.loads(line)
        question = f"What is the opposite of {row['word']}?"
        asked = requests(*((question, f" {choice}") for choice in row["choices"]))
        scores = [score for score, _ in lm.loglikelihood(asked, disable_tqdm=True)]
        right += scores.index(max(scores)) == row["answer"]
    assert found["results"]["sample_opposites"]["acc,none"] == pytest.approx(right / 3)
    with pytest.raises(InputError, match="no_such_task: no such task"):
        evaluate_tasks(checkpoint, ["no_such_task"])
