"""Answers and losses of instruction-tuned models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm.checkpoint.folder import Checkpoint
from llm.data.examples import Pair
from llm.evaluation.instruct.instruction_following import evaluate_instruct, response_loss
from llm.model.gpt import GPT
from llm.tokenizer.bpe import Tokenizer
from llm.tokenizer.prompts import encode_prompt
from tests.evaluation.models import make_folder, params, write_rows


def test_answers_stay_with_their_pairs(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are sorted by length inside; a model that repeats its prompt's last word shows whether that is undone."""
    words = ["cat", "a red dog on the mat", "mat", "dog sat on the red mat", "red"]
    rows = [{"instruction": "say", "input": w, "output": w, "task": f"t{len(w) % 2}"} for w in words]
    write_rows(tmp_path / "instructions" / "test.jsonl", rows)
    write_rows(tmp_path / "instructions" / "val.jsonl", [])

    def echo(model: GPT, prompts: list[list[int]], **options: object) -> list[list[int]]:
        inputs = [tokenizer.decode(p).split("### Input:\n")[1].split("\n")[0] for p in prompts]
        return [tokenizer.encode(f" {text}\n") for text in inputs]

    monkeypatch.setattr("llm.evaluation.instruct.instruction_following.generate", echo)
    result = evaluate_instruct({"gpt": make_folder(tokenizer)}, "alpaca", tmp_path / "instructions", params())
    assert result.reports["gpt"].exact_match.value == 1.0
    assert {task: r.rows for task, r in result.tasks["gpt"].items()} == {"t0": 2, "t1": 3}
    assert [(e.pair.input, e.answers["gpt"]) for e in result.examples] == [(w, w) for w in words]
    assert [result.examples[i].pair.task for i in result.shown] == ["t0", "t1"]  # spread over the tasks
    assert list(result.reports) == ["gpt"], "no training pairs, no nearest one"
    write_rows(tmp_path / "instructions" / "train.jsonl", [{**row, "output": f"{row['output']}!"} for row in rows])
    result = evaluate_instruct({"gpt": make_folder(tokenizer)}, "alpaca", tmp_path / "instructions", params())
    assert [e.answers["nearest"] for e in result.examples] == [f"{w}!" for w in words]
    assert "nearest" in result.reports and "nearest" in result.tasks and "nearest" not in result.losses


def test_last_answers_of_conversations_are_asked_with_and_without_their_history(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [("user", "cat?"), ("assistant", "red"), ("user", "again"), ("assistant", "red")]
    talk = [{"role": role, "content": text} for role, text in said]
    pair = {"instruction": "again", "input": "", "output": "red", "task": "t"}
    write_rows(tmp_path / "test.jsonl", [{**pair, "messages": talk}, {**pair, "instruction": "say"}])
    write_rows(tmp_path / "val.jsonl", [])

    def recall(model: GPT, prompts: list[list[int]], **options: object) -> list[list[int]]:
        return [tokenizer.encode(" red" if "red" in tokenizer.decode(prompt) else " mat") for prompt in prompts]

    monkeypatch.setattr("llm.evaluation.instruct.instruction_following.generate", recall)
    result = evaluate_instruct({"gpt": make_folder(tokenizer)}, "alpaca", tmp_path, params())
    assert result.turns is not None and result.turns.with_history.rows == 1
    assert result.turns.with_history.exact_match.value == 1 and result.turns.without_history.exact_match.value == 0
    assert [example.answers["gpt"] for example in result.examples] == ["red", "mat"]
    write_rows(tmp_path / "test.jsonl", [pair])
    assert evaluate_instruct({"gpt": make_folder(tokenizer)}, "alpaca", tmp_path, params()).turns is None


def test_a_base_that_knows_a_template_is_asked_in_it(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("test", "val"):
        write_rows(tmp_path / f"{split}.jsonl", [{"instruction": "say", "input": "", "output": "cat", "task": ""}])
    asked: list[str] = []

    def listen(model: GPT, prompts: list[list[int]], **options: object) -> list[list[int]]:
        asked.extend(tokenizer.decode(prompt) for prompt in prompts)
        return [[] for _ in prompts]

    monkeypatch.setattr("llm.evaluation.instruct.instruction_following.generate", listen)
    plain = make_folder(tokenizer)
    config = plain.config.model_copy(update={"template": "chatml", "system": "the cat knows"})
    own = {"kind": "instruct", "chat_templates": {"default": "the {{ messages[0].content }}:"}}
    folders = {"gpt": plain, "base": Checkpoint(plain.model, tokenizer, config)}
    folders["own"] = Checkpoint(plain.model, tokenizer, config.model_copy(update=own))
    result = evaluate_instruct(folders, "alpaca", tmp_path, params())
    assert asked[2] == "the say:"
    assert asked[0] == tokenizer.decode(encode_prompt(tokenizer, "alpaca", "say"))
    assert asked[1] == tokenizer.decode(encode_prompt(tokenizer, "chatml", "say", system="the cat knows"))
    assert result.losses["gpt"] != result.losses["base"]


def test_response_loss_is_that_of_each_response_read_alone(tokenizer: Tokenizer) -> None:
    folder = make_folder(tokenizer)
    assert isinstance(folder.model, GPT)
    pairs = [Pair("say", "", "the cat sat", ""), Pair("what is red?", "the mat", "the red dog on the mat é", "")]
    nats, n_tokens = 0.0, 0
    for pair in pairs:
        prompt = encode_prompt(tokenizer, "alpaca", pair.instruction, pair.input)
        response = [*tokenizer.encode(pair.output), tokenizer.eot]
        with torch.no_grad():
            logits = folder.model(torch.tensor([prompt + response]))[0]
        nats -= float(logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None]).sum())
        n_tokens += len(response)
    loss = response_loss(folder, "alpaca", pairs, params())
    assert (loss.tokens, loss.characters) == (n_tokens, sum(len(pair.output) for pair in pairs))
    assert loss.nats == pytest.approx(nats, rel=1e-5)
    assert loss.loss == pytest.approx(nats / n_tokens, rel=1e-5)
    assert loss.loss_per_char == pytest.approx(nats / loss.characters, rel=1e-5)
