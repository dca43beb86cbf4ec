"""How good a model is: bits per byte of text, a classification report, overlap of answers, all with honest intervals.

Shapes: N tokens of a text or rows of a test set, B windows of a batch, T tokens of a window, C emb_dim, V vocab_size,
K labels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from llm.config import InputError
from llm.model.gpt import GPT

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


# ---- text ------------------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """What a text cost a model: the negative log likelihood of its scored tokens, in nats."""

    nats: float
    tokens: int

    @property
    def loss(self) -> float:
        """Nats per scored token."""
        return self.nats / max(self.tokens, 1)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def bits_per_byte(self, n_bytes: int) -> float:
        """Comparable across tokenizers: `n_bytes` is the length of the text in UTF-8."""
        return self.nats / math.log(2) / max(n_bytes, 1)


MAX_TOKENS = 2**15  # of the windows that are scored together: a long context leaves room for few of them


class TokenSource(Protocol):
    """Token ids that need not fit into memory, such as `llm.data.examples.TokenShards`."""

    n_tokens: int

    def read(self, start: int, length: int) -> Tensor: ...


class _Memory:
    def __init__(self, idx: Tensor) -> None:
        self.idx, self.n_tokens = idx, len(idx)

    def read(self, start: int, length: int) -> Tensor:
        return self.idx[start : start + length]


@torch.inference_mode()
def score_tokens(model: GPT, idx: Tensor | TokenSource, batch_size: int = 16, max_tokens: int | None = None) -> Score:
    """Scores token ids [N], or the first `max_tokens` of them, each once.

    No token is put in front, so the first one has nothing that predicts it and is left unscored. A text longer than
    the context is read in windows of the full context that overlap by half: every token behind the first window is
    predicted from at least half a context.
    """
    tokens = _Memory(idx) if isinstance(idx, Tensor) else idx
    T = model.config.context_length
    if T < 2:
        raise InputError("a model with a context_length of 1 predicts nothing from a text; scoring needs 2 or more")
    n_tokens = min(tokens.n_tokens, max_tokens or tokens.n_tokens)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nats = 0.0
    try:
        # Window by window: where it starts, and the first token that it scores.
        windows = [(0, 1)] if n_tokens > 1 else []
        while windows and windows[-1][0] + T < n_tokens:
            windows.append((windows[-1][0] + T // 2, windows[-1][0] + T))
        rows = max(1, min(batch_size, MAX_TOKENS // T))
        for i in range(0, len(windows), rows):
            nats += _score_windows(model, tokens, windows[i : i + rows], n_tokens, device)
    finally:
        model.train(was_training)
    return Score(nats, max(n_tokens - 1, 0))


def _score_windows(
    model: GPT, tokens: TokenSource, windows: list[tuple[int, int]], n_tokens: int, device: torch.device
) -> float:
    T = min(model.config.context_length, n_tokens - windows[0][0])
    idx = torch.zeros(len(windows), T, dtype=torch.long)  # [B, T]; nothing reads the padding behind a short last window
    counted = torch.zeros(len(windows), T, dtype=torch.bool)  # [B, T]: the tokens that this window scores
    for b, (start, first) in enumerate(windows):
        window = tokens.read(start, min(T, n_tokens - start))
        idx[b, : len(window)] = window
        counted[b, first - start : len(window)] = True
    idx, counted = idx.to(device), counted.to(device)
    hidden = model.hidden(idx[:, :-1])[counted[:, 1:]]  # [scored, C]
    targets = idx[counted]  # [scored]
    rows = max(1, 2**24 // model.config.vocab_size)  # logits of at most 64 MB at a time
    nats = 0.0
    for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
        nats += F.cross_entropy(model.lm_head(h).float(), t, reduction="none").cpu().double().sum().item()
    return nats


# ---- labels ----------------------------------------------------------------------------------------------------------


class Interval(NamedTuple):
    """A share of successes and its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(successes: int, n: int) -> Interval:
    """Wilson's score interval (1927), 95 %: sound for few trials and for shares near 0 and 1, unlike p +- 2 sd."""
    if n == 0:
        return Interval(0.0, 0.0, 1.0)
    z = 1.959963984540054
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    margin = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Interval(p, min(p, max(0.0, centre - margin)), max(p, min(1.0, centre + margin)))


class LabelScores(NamedTuple):
    precision: float
    recall: float
    f1: float
    rows: int


class ClassificationReport(NamedTuple):
    """`precision`, `recall` and `f1` are of the positive label, the last one, where there are two, else macro means.

    `roc_auc` is None where it is not defined: a label without a row. With more than two labels it is the macro mean of
    one label against the rest.
    """

    rows: int
    accuracy: Interval
    precision: float
    recall: float
    f1: float
    roc_auc: float | None
    per_label: dict[str, LabelScores]
    confusion: Ints  # [K actual, K predicted]


def classification_report(actual: Ints, probabilities: Floats, labels: Sequence[str]) -> ClassificationReport:
    """Scores probabilities [N, K] against the actual label numbers [N]; the prediction is the likeliest label."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    numbers = list(range(len(labels)))
    predicted = probabilities.argmax(axis=1)  # [N]
    precision, recall, f1, rows = precision_recall_fscore_support(actual, predicted, labels=numbers, zero_division=0.0)
    per_label = {
        label: LabelScores(float(precision[k]), float(recall[k]), float(f1[k]), int(rows[k]))
        for k, label in enumerate(labels)
    }
    binary = len(labels) == 2
    precision_, recall_, f1_ = (float(x[-1] if binary else x.mean()) for x in (precision, recall, f1))
    return ClassificationReport(
        rows=len(actual),
        accuracy=wilson(int((actual == predicted).sum()), len(actual)),
        precision=precision_,
        recall=recall_,
        f1=f1_,
        roc_auc=_roc_auc(actual, probabilities, len(labels)),
        per_label=per_label,
        confusion=confusion_matrix(actual, predicted, labels=numbers),
    )


def _roc_auc(actual: Ints, probabilities: Floats, n_labels: int) -> float | None:
    from sklearn.metrics import roc_auc_score

    if len(np.unique(actual)) < n_labels:
        return None
    if n_labels == 2:
        return float(roc_auc_score(actual, probabilities[:, 1]))
    return float(np.mean([roc_auc_score(actual == k, probabilities[:, k]) for k in range(n_labels)]))


def roc_points(actual: Ints, probabilities: Floats) -> tuple[Floats, Floats]:
    """False and true positive rates of the ROC curve: of the last label of two, else of all (row, label) decisions."""
    from sklearn.metrics import roc_curve

    n_labels = probabilities.shape[1]
    if n_labels == 2:
        hits, scores = actual == 1, probabilities[:, 1]
    else:
        hits, scores = (actual[:, None] == np.arange(n_labels)).ravel(), probabilities.ravel()
    false_positives, true_positives, _ = roc_curve(hits, scores)
    return false_positives, true_positives


# ---- answers ---------------------------------------------------------------------------------------------------------


class AnswerReport(NamedTuple):
    """How close answers come to the expected ones: exact match as a share, ROUGE-L (F) and chrF from 0 to 1 and 100."""

    rows: int
    exact_match: Interval
    rouge_l: float
    chrf: float


def fold(text: str) -> str:
    """The text with runs of white space as one space and none at its ends: what exact match compares."""
    return " ".join(text.split())


def answer_report(answers: Sequence[str], expected: Sequence[str]) -> AnswerReport:
    """Exact match, ROUGE-L (rouge-score; words of any script) and corpus chrF (sacrebleu) of answers."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.chrf import CHRF

    if not answers:
        return AnswerReport(0, wilson(0, 0), 0.0, 0.0)
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    rouge = [scorer.score(e, a)["rougeL"].fmeasure for a, e in zip(answers, expected, strict=True)]
    exact = sum(fold(a) == fold(e) for a, e in zip(answers, expected, strict=True))
    return AnswerReport(
        rows=len(answers),
        exact_match=wilson(exact, len(answers)),
        rouge_l=float(np.mean(rouge)),
        chrf=float(CHRF().corpus_score(list(answers), [list(expected)]).score),
    )


class _Words:
    """rouge-score's own tokenizer drops everything but a-z and 0-9."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


def by_task(answers: Sequence[str], expected: Sequence[str], tasks: Sequence[str]) -> dict[str, AnswerReport]:
    """One report for each task, sorted by name; empty where the source names no tasks."""
    rows: dict[str, list[int]] = {}
    for i, task in enumerate(tasks):
        rows.setdefault(task, []).append(i)
    if set(rows) <= {""}:
        return {}
    return {
        task: answer_report([answers[i] for i in rows[task]], [expected[i] for i in rows[task]])
        for task in sorted(rows)
    }


def numbers(report: ClassificationReport | AnswerReport) -> dict[str, Any]:
    """A report flat, for a metrics file."""
    if isinstance(report, AnswerReport):
        return {
            "exact_match": report.exact_match.value,
            "exact_match_low": report.exact_match.low,
            "exact_match_high": report.exact_match.high,
            "rouge_l": report.rouge_l,
            "chrf": report.chrf,
        }
    values = {
        "accuracy": report.accuracy.value,
        "accuracy_low": report.accuracy.low,
        "accuracy_high": report.accuracy.high,
        "precision": report.precision,
        "recall": report.recall,
        "f1": report.f1,
    }
    return values | ({} if report.roc_auc is None else {"roc_auc": report.roc_auc})
