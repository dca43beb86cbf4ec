"""Evaluate the classifiers on held-out messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm.checkpoint.folder import Checkpoint
from llm.common.errors import InputError
from llm.data.examples import first_filled, read_labels, read_messages
from llm.evaluation.baselines import classical_classifiers
from llm.evaluation.comparison import mcnemar
from llm.evaluation.metrics import ClassificationReport, Curve, classification_report, label_roc, roc_points
from llm.inference.classify import classify_texts, doubt

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
OURS = ("gpt", "scratch")  # all other classifiers are classical


class ClassifierResult(NamedTuple):
    """Results by classifier: gpt, scratch (the from-scratch baseline), then the classical ones."""

    split: str
    train_rows: int
    labels: list[str]
    reports: dict[str, ClassificationReport]
    roc: dict[str, Curve]
    texts: list[str]
    actual: list[str]
    probabilities: dict[str, Floats]  # [messages, labels]
    doubts: Sequence[str | None] = ()  # why the label of a message means little, where it does

    def label_roc(self) -> dict[str, Curve]:
        """Return the GPT's ROC curve of each label against the rest."""
        numbers = np.array([self.labels.index(label) for label in self.actual])
        areas, probabilities = self.reports["gpt"].label_auc, self.probabilities["gpt"]
        return {label: label_roc(numbers, probabilities, k) for k, label in enumerate(self.labels) if label in areas}

    def best_classical(self) -> str:
        """Return the classical classifier with the highest accuracy."""
        classical = {name: report.accuracy.value for name, report in self.reports.items() if name not in OURS}
        return max(classical, key=classical.__getitem__)

    def paired(self, a: str, b: str) -> tuple[int, int, float]:
        """Return how many messages `a` alone and `b` alone has right, and McNemar's p-value."""
        right_a, right_b = (np.array(self.predicted(name)) == np.array(self.actual) for name in (a, b))
        only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
        return only_a, only_b, mcnemar(only_a, only_b)

    def predicted(self, name: str = "gpt") -> list[str]:
        """Return a classifier's label for each message."""
        return [self.labels[k] for k in self.probabilities[name].argmax(axis=1)]


def evaluate_classifiers(folders: Mapping[str, Checkpoint], messages: Path, batch_size: int) -> ClassifierResult:
    """Evaluate the classifiers in `folders`, `gpt` first, and the classical ones on the same held-out messages."""
    labels = read_labels(messages)
    train, val = read_messages(messages / "train.jsonl"), read_messages(messages / "val.jsonl")
    split, test = first_filled({"test": read_messages(messages / "test.jsonl"), "val": val}, messages)
    texts = [message.text for message in test]
    actual = np.array([labels.index(message.label) for message in test])

    probabilities: dict[str, Floats] = {}
    for name, folder in folders.items():
        if folder.config.labels != labels:
            raise InputError(f"{messages}: has labels {labels}, the classifier {folder.config.labels}; train it again")
        probabilities[name] = classify_texts(folder, texts, batch_size).double().numpy()
    probabilities |= classical_classifiers(train, val, texts, labels)
    reports = {name: classification_report(actual, p, labels) for name, p in probabilities.items()}
    return ClassifierResult(
        split=split,
        train_rows=len(train),
        labels=labels,
        reports=reports,
        roc={name: roc_points(actual, p) for name, p in probabilities.items() if reports[name].roc_auc is not None},
        texts=texts,
        actual=[message.label for message in test],
        probabilities=probabilities,
        doubts=[doubt(folders["gpt"].tokenizer, text) for text in texts],
    )
