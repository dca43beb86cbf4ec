"""Scores of text against a token-by-token loop; labels and answers against scikit-learn, formulas and known values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from llm.common.errors import InputError
from llm.evaluation import metrics
from llm.evaluation.metrics import answer_report, by_task, classification_report, fold, numbers, roc_points, wilson
from llm.inference.score import Score, score_tokens
from llm.model.gpt import GPT
from tests.helpers import SHIPPED_FORM, gpt_config


def make_gpt(context_length: int = 8, positions: str = "rotary") -> GPT:
    torch.manual_seed(0)
    form = SHIPPED_FORM | {"n_layers": 2, "head_dim": 4, "vocab_size": 50, "tie_embeddings": False}
    config = gpt_config(**form | {"context_length": context_length, "positions": positions})
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)  # a fresh model is nearly uniform: differences between windows would not show
    return model.eval()


@torch.no_grad()
def naive_nats(model: GPT, ids: list[int]) -> float:
    """One forward pass for each token, from the definition: windows of the context, overlapping by half."""
    T = model.config.context_length
    nats = 0.0
    for i in range(1, len(ids)):
        start = 0
        while i >= start + T:
            start += T // 2
        logits = model(torch.tensor([ids[start:i]]))[0, -1].double()
        nats -= logits.log_softmax(-1)[ids[i]].item()
    return nats


@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 9, 12, 13, 40, 61])
@pytest.mark.parametrize("context_length", [8, 7])
def test_score_equals_a_loop_over_tokens(length: int, context_length: int) -> None:
    model = make_gpt(context_length, "learned")
    ids = torch.randint(0, 50, (length,), generator=torch.Generator().manual_seed(1))
    score = score_tokens(model, ids, batch_size=3)
    assert score.tokens == max(length - 1, 0)
    assert score.nats == pytest.approx(naive_nats(model, ids.tolist()), rel=1e-5, abs=1e-9)


def test_long_windows_are_scored_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_gpt()
    ids = torch.randint(0, 50, (100,), generator=torch.Generator().manual_seed(1))
    expected, rows = score_tokens(model, ids), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda idx: rows.append(len(idx)) or hidden(idx))
    monkeypatch.setattr(metrics, "MAX_TOKENS", 20)  # two windows of 8
    assert score_tokens(model, ids).nats == pytest.approx(expected.nats, rel=1e-5)
    assert set(rows) <= {1, 2} and 2 in rows


def test_score_does_not_depend_on_the_batch_size_or_the_training_mode() -> None:
    model = make_gpt()
    ids = torch.randint(0, 50, (100,), generator=torch.Generator().manual_seed(1))
    expected = score_tokens(model, ids, batch_size=1)
    assert score_tokens(model, ids, batch_size=64).nats == pytest.approx(expected.nats, rel=1e-5)
    model.train()
    model.set_dropout(0.5)
    assert score_tokens(model, ids).nats == pytest.approx(expected.nats, rel=1e-5)  # no dropout
    assert model.training


def test_score_of_shards_reads_no_more_than_max_tokens() -> None:
    ids = torch.randint(0, 50, (100,), generator=torch.Generator().manual_seed(1))

    class Shards:
        n_tokens = 100

        def read(self, start: int, length: int) -> torch.Tensor:
            assert start + length <= 30
            return ids[start : start + length]

    model = make_gpt()
    assert score_tokens(model, Shards(), max_tokens=30) == score_tokens(model, ids[:30])


def test_score_needs_a_context_of_two() -> None:
    with pytest.raises(InputError, match="context_length of 1"):
        score_tokens(make_gpt(1, "learned"), torch.tensor([1, 2, 3]))


def test_bits_per_byte_and_perplexity() -> None:
    score = Score(nats=math.log(2) * 30, tokens=10)
    assert score.bpb(15) == pytest.approx(2.0)
    assert score.perplexity == pytest.approx(8.0)
    assert Score(1e6, 2).perplexity > 1e300  # large, not an error


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe 1998, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_agrees_with_published_intervals(successes: int, n: int, low: float, high: float) -> None:
    interval = wilson(successes, n)
    assert interval.value == successes / n
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


def test_wilson_at_the_ends() -> None:
    assert wilson(20, 20).high == 1.0 and wilson(20, 20).low < 1.0
    assert wilson(0, 0) == (0.0, 0.0, 1.0)


def test_two_labels_are_scored_for_the_last_one() -> None:
    actual = np.array([0, 0, 0, 0, 1, 1])
    spam = np.array([0.1, 0.2, 0.3, 0.8, 0.7, 0.4])
    report = classification_report(actual, np.column_stack([1 - spam, spam]), ["ham", "spam"])
    assert report.confusion.tolist() == [[3, 1], [1, 1]]
    assert report.accuracy.value == pytest.approx(4 / 6)
    assert (report.precision, report.recall, report.f1) == (0.5, 0.5, 0.5)
    assert report.per_label["ham"] == (0.75, 0.75, 0.75, 4)
    assert report.roc_auc == pytest.approx(6 / 8)  # of 8 pairs of ham and spam, 6 in the right order
    x, y = roc_points(actual, np.column_stack([1 - spam, spam]))
    assert np.trapezoid(y, x) == pytest.approx(6 / 8)


def test_more_labels_are_averaged() -> None:
    actual = np.array([0, 0, 1, 1, 2, 2])
    probabilities = np.eye(3)[[0, 0, 1, 2, 2, 2]]
    report = classification_report(actual, probabilities, ["a", "b", "c"])
    assert report.recall == pytest.approx((1 + 0.5 + 1) / 3)
    assert report.precision == pytest.approx((1 + 1 + 2 / 3) / 3)
    assert report.roc_auc == pytest.approx((1 + 0.75 + 0.875) / 3)
    x, y = roc_points(actual, probabilities)
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)


def test_a_label_without_a_row_leaves_the_auc_open() -> None:
    report = classification_report(np.array([0, 0]), np.array([[0.9, 0.1], [0.2, 0.8]]), ["ham", "spam"])
    assert report.roc_auc is None
    assert "roc_auc" not in numbers(report)
    assert report.confusion.shape == (2, 2)


def test_answers() -> None:
    report = answer_report(["The plural is  hens.\n", "a red horse", ""], ["The plural is hens.", "a red cow", "yes"])
    assert report.exact_match.value == pytest.approx(1 / 3)
    assert report.rouge_l == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert 0 < report.chrf < 100
    assert answer_report(["same"], ["same"]).chrf == pytest.approx(100)
    assert answer_report([], []).rows == 0


def test_rouge_counts_words_of_any_script() -> None:
    assert answer_report(["красный дом"], ["красный дом"]).rouge_l == pytest.approx(1.0)
    assert answer_report(["gr\u00fcn"], ["gr"]).rouge_l == 0.0


def test_fold_keeps_case_and_punctuation() -> None:
    assert fold(" a \n b\t") == "a b"
    assert fold("A.") != fold("a")


def test_by_task() -> None:
    reports = by_task(["1", "2", "x"], ["1", "2", "3"], ["sum", "sum", "count"])
    assert [(task, r.rows, r.exact_match.value) for task, r in reports.items()] == [("count", 1, 0.0), ("sum", 2, 1.0)]
    assert by_task(["1"], ["1"], [""]) == {}
