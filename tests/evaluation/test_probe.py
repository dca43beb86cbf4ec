"""Few-shot questions, minimal pairs, cloze, positions and recited passages, with models whose answers are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llm.audit import memorisation
from llm.audit.memorisation import PASSAGE, memorised
from llm.data.shards import TokenShards
from llm.evaluation.base import probe
from llm.evaluation.base.probe import (
    Question,
    Shots,
    bpb_by_position,
    cloze,
    few_shot,
    judge_pairs,
    minimal_pairs,
    shots_figures,
)
from llm.evaluation.metrics import wilson
from llm.inference.score import Continuation, token_nats
from llm.model.gpt import GPT
from llm.tokenizer.bpe import Tokenizer
from tests.evaluation.models import TEXTS, make_gpt, write_corpus


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT:
    return make_gpt(tokenizer)


def scorer(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, cost: object) -> list[str]:
    """Let `cost(context, continuation)` stand for the model; return the contexts that it is asked about."""
    asked: list[str] = []

    def scored(_: GPT, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Continuation]:
        found = []
        for context, continuation in pairs:
            asked.append(tokenizer.decode(context))
            nats = cost(asked[-1], tokenizer.decode(continuation))  # type: ignore[operator]
            found.append(Continuation(nats, len(continuation), nats == 0))
        return found

    monkeypatch.setattr(probe, "score_continuations", scored)
    return asked


def test_answers_are_calibrated_by_an_empty_question(
    model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that prefers one label whatever it reads is right as far as it tells the questions apart."""

    def cost(context: str, choice: str) -> float:
        question = context.rpartition("Question:")[2]
        return (1 if choice == " dog" else 9) - (choice.strip() in question)

    asked = scorer(tokenizer, monkeypatch, cost)
    questions = [Question("the cat sat", ["dog", "cat"], 1), Question("a dog ran", ["dog", "cat"], 0)] * 3
    questions.append(Question("the mat", ["dog", "cat"], 0))  # nothing tells: a tie, which is wrong
    pool = [question._replace(text=question.text * 9) for question in questions[:6]] * 3
    found = few_shot(model, tokenizer, questions, pool)
    assert [each.shots for each in found] == [0, 1, 4, 16]
    assert all(each.right == [True] * 6 + [False] for each in found)
    assert found[1].accuracy.value == pytest.approx(6 / 7)
    assert found[0].fitting == 0 and found[1].fitting == 1 and found[3].fitting < 16
    assert asked[0].endswith("Question: the cat sat\nAnswer:") and asked[2].endswith("Question: \nAnswer:")


def test_gain_of_examples_is_paired() -> None:
    """Nine questions right with examples alone, one right without them alone."""
    none = Shots(0, 0.0, wilson(41, 100), [True] * 41 + [False] * 59)
    four = Shots(4, 3.5, wilson(49, 100), [False] + [True] * 49 + [False] * 50)
    figures = shots_figures(four, none)
    assert (figures["value"], figures["fitting"]) == (0.49, 3.5)
    assert figures["gain"] == pytest.approx(0.08)
    assert 0.01 < figures["gain_low"] < 0.03 and 0.14 < figures["gain_high"] < 0.17
    assert figures["p_against_0"] == pytest.approx(22 / 1024)
    assert set(shots_figures(none, none)) == {"fitting", "value", "low", "high"}


def test_minimal_pairs_differ_by_one_rule_and_ties_are_wrong(
    model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = minimal_pairs(["Simon saw an owl by the mill. There are three bells here.", "Nobody came at all!"], 10)
    assert found["a or an"] == [("Simon saw an owl by the mill.", "Simon saw a owl by the mill.")]
    assert found["plural behind a number"] == [("There are three bells here.", "There are three bell here.")]
    assert found["is or are"] == [("There are three bells here.", "There is three bells here.")]
    assert found["order of words"] == [("Simon saw an owl by the mill.", "Simon saw an owl by mill the.")]
    scorer(tokenizer, monkeypatch, lambda context, text: 5.0)
    assert judge_pairs(model, tokenizer, [("a cat", "cat a")]).value == 0
    scorer(tokenizer, monkeypatch, lambda context, text: 1.0 if text.startswith("a") else 2.0)
    assert judge_pairs(model, tokenizer, [("a cat", "cat a"), ("the cat", "a the")]).value == 0.5


def test_cloze_asks_for_the_last_word(model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = scorer(tokenizer, monkeypatch, lambda context, word: float(word != " mat"))
    found = cloze(model, tokenizer, ["The cat sat. It sat on the mat.", "a dog ran to the cat!\n", "one"], 9)
    assert found.value == 0.5
    assert [text.split(">")[-1] for text in asked] == ["The cat sat. It sat on the", "a dog ran to the"]


def test_positions_are_seen_in_every_window(tmp_path: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Each window begins anew, so that a position is an average over windows, not of the first one alone."""
    write_corpus(tmp_path / "corpus", tokenizer, {"test": TEXTS * 4})
    shards = TokenShards(tmp_path / "corpus", "test")
    found = bpb_by_position(model, tokenizer, shards, 30)
    assert list(found) == ["1-15", "16-63"]
    ids = shards.read(0, 256 + 30)

    def n_bytes(tokens: list[int]) -> int:
        return sum(len(tokenizer.decode_bytes([i])) for i in tokens if i != tokenizer.eot)

    nats = [token_nats(model, torch.from_numpy(window)) for window in (ids[:256], ids[256:])]
    assert found["1-15"] == pytest.approx(nats[0][:15].sum() / np.log(2) / n_bytes(ids[1:16].tolist()))
    both = bpb_by_position(model, tokenizer, shards, 256 + 30)
    assert list(both) == ["1-15", "16-63", "64-127", "128-255"]
    expected = sum(values[:15].sum() for values in nats) / np.log(2)
    assert both["1-15"] == pytest.approx(expected / n_bytes([*ids[1:16].tolist(), *ids[257:272].tolist()]))


def test_recited_passages_are_counted(tmp_path: Path, model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = SimpleNamespace(n_tokens=5000, read=lambda start, length: np.arange(start, start + length))

    def recite(_: GPT, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Go on counting, from every second prompt up to its tenth token only."""
        said = [[p[-1] + 1 + i for i in range(max_new_tokens)] for p in prompts]
        return [ids[:10] + [0] * (max_new_tokens - 10) if n % 2 else ids for n, ids in enumerate(said)]

    monkeypatch.setattr(memorisation, "generate", recite)
    found = memorised(model, tokens, passages=8, seed=0)  # type: ignore[arg-type]
    assert (found.passages, found.verbatim, found.mean_tokens) == (8, 4, (PASSAGE + 10) / 2)
    assert len(found.longest) == PASSAGE and found.longest[1] == found.longest[0] + 1
