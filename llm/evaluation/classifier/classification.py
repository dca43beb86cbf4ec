"""Evaluate the classifiers on held-out messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm.checkpoint.folder import Checkpoint
from llm.common.errors import InputError
from llm.data.examples import Message, first_filled, read_labels, read_messages
from llm.evaluation.baselines import classical_classifiers
from llm.evaluation.classifier.calibration import evaluate_calibration
from llm.evaluation.classifier.classifier_details import (
    ClassifierDetails,
    confident_mistakes,
    label_details,
    mean_precision,
    slices,
)
from llm.evaluation.classifier.label_errors import find_label_errors
from llm.evaluation.classifier.learning_curve import CurvePoint, LabelledData, classical_curve
from llm.evaluation.classifier.robustness import Change, evaluate_changes
from llm.evaluation.comparison import mcnemar
from llm.evaluation.intervals import clustered_share, clusters_of
from llm.evaluation.metrics import ClassificationReport, Curve, classification_report, label_roc, roc_points
from llm.inference.classify import classify_texts, doubt

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
SMALLEST = 1e-30  # probability whose logarithm is taken
TrainingCurve = Callable[[LabelledData, Sequence[str]], list[CurvePoint]]
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
    details: ClassifierDetails | None = None  # of gpt

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


def evaluate_classifiers(
    folders: Mapping[str, Checkpoint],
    messages: Path,
    batch_size: int,
    *,
    robustness: int = 0,
    curve: TrainingCurve | None = None,
) -> ClassifierResult:
    """Evaluate the classifiers in `folders`, `gpt` first, and the classical ones on the same held-out messages.

    The first `robustness` messages are classified again with changes that keep their label. `curve` trains on fewer
    messages.
    """
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
    result = ClassifierResult(
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
    data = {"train": train, "val": val, "test": test if split == "test" else []}
    details = evaluate_details(result, folders["gpt"], data, test)
    if robustness:
        changes = evaluate_robustness(result, folders["gpt"], data, test[:robustness], batch_size)
        details = details._replace(robustness=changes)
    if curve is not None:
        details = details._replace(learning_curve=[*details.learning_curve, *curve((train, val, test), labels)])
    return result._replace(details=details)


def evaluate_details(
    result: ClassifierResult, folder: Checkpoint, data: Mapping[str, Sequence[Message]], test: Sequence[Message]
) -> ClassifierDetails:
    """Return the details of the finetuned classifier beside the best classical one."""
    labels, texts, best = result.labels, result.texts, result.best_classical()
    actual = np.array([labels.index(label) for label in result.actual])
    right, classical = (
        (result.probabilities[name].argmax(axis=1) == actual).astype(np.float64) for name in ("gpt", best)
    )
    clusters = clusters_of(texts)
    figures, curves, macro = label_details(result.reports["gpt"], actual, result.probabilities["gpt"], labels)
    logits = (folder.config.temperature or 1.0) * np.log(result.probabilities["gpt"].clip(SMALLEST))
    return ClassifierDetails(
        clusters=len(np.unique(clusters)),
        accuracy=clustered_share(right, clusters),
        macro_f1=macro,
        average_precision=mean_precision(figures),
        labels=figures,
        precision_recall=curves,
        calibration=evaluate_calibration(folder.config, logits, actual, clusters),
        mistakes=confident_mistakes(texts, actual, result.probabilities["gpt"], labels),
        slices=slices(texts, right, classical, clusters, [message.slices for message in test]),
        label_errors=find_label_errors(data, labels),
        learning_curve=classical_curve(best, data["train"], data["val"], test, labels),
        robustness=[],
    )


def evaluate_robustness(
    result: ClassifierResult,
    folder: Checkpoint,
    data: Mapping[str, Sequence[Message]],
    test: Sequence[Message],
    batch_size: int,
) -> list[Change]:
    """Return the accuracy of the finetuned and of the best classical classifier on changed messages."""
    best = result.best_classical()

    def gpt(texts: Sequence[str]) -> Floats:
        return classify_texts(folder, texts, batch_size).double().numpy()

    def classical(texts: Sequence[str]) -> Floats:
        return classical_classifiers(data["train"], data["val"], texts, result.labels, {best})[best]

    return evaluate_changes(test, data["train"], result.labels, gpt, classical)
