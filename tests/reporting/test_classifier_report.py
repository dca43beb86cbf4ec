"""The report's section on the classifier: figures with intervals, and no text of a private source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llm.checkpoint.folder import CheckpointConfig, Decision
from llm.data.examples import Message
from llm.evaluation.classifier.calibration import evaluate_calibration, softmax
from llm.evaluation.classifier.classifier_details import ClassifierDetails, confident_mistakes, label_details, slices
from llm.evaluation.classifier.label_errors import LabelErrors, Suspect
from llm.evaluation.classifier.learning_curve import CurvePoint
from llm.evaluation.classifier.robustness import evaluate_changes
from llm.evaluation.intervals import clustered_share
from llm.evaluation.metrics import classification_report, wilson
from llm.reporting import report, tables
from llm.reporting.classifier_pictures import draw_calibration
from llm.reporting.classifier_report import details_section
from tests.helpers import gpt_config
from tests.reporting.test_report import EVIL, results

LABELS = ["ham", "spam"]


@pytest.fixture(scope="module")
def details() -> ClassifierDetails:
    rng = np.random.default_rng(0)
    logits = np.column_stack((np.zeros(60), rng.normal(0, 2, 60)))
    probabilities = softmax(logits)
    actual = (rng.random(60) < probabilities[:, 1]).astype(np.int64)
    texts = [f"{EVIL} secret {'word ' * (i // 6)}{i}" for i in range(60)]
    right = (probabilities.argmax(axis=1) == actual).astype(float)
    found = classification_report(actual, probabilities, LABELS)
    figures, curves, macro = label_details(found, actual, probabilities, LABELS)
    config = CheckpointConfig(
        kind="classifier", gpt=gpt_config(), labels=LABELS, max_length=8, decision=Decision(label="spam", threshold=0.8)
    )
    rows = [Message(text, LABELS[k]) for text, k in zip(texts, actual, strict=True)]
    both = lambda given: np.tile([0.4, 0.6], (len(given), 1))  # noqa: E731
    return ClassifierDetails(
        clusters=50,
        accuracy=clustered_share(right, np.arange(60)),
        macro_f1=macro,
        average_precision=figures["spam"].average_precision,
        labels=figures,
        precision_recall=curves,
        calibration=evaluate_calibration(config, logits, actual, np.arange(60)),
        mistakes=confident_mistakes(texts, actual, probabilities, LABELS),
        slices=slices(texts, right, right, np.arange(60), [{"own": EVIL if i % 2 else "b"} for i in range(60)]),
        label_errors=LabelErrors(60, [Suspect("train", EVIL, "ham", "spam", 0.9)]),
        learning_curve=[CurvePoint("tfidf", 50, wilson(40, 50)), CurvePoint("gpt", 50, wilson(30, 50))],
        robustness=evaluate_changes(rows, rows, LABELS, both, both),
    )


def test_section_says_what_was_found(details: ClassifierDetails) -> None:
    text = "\n".join(details_section(details, "tfidf", [], True))
    assert f"share of right labels, is {details.calibration.ece.value:.3f} (" in text
    assert "from a probability of 0.8 on: precision" in text
    assert "| upper case |" in text and "| length: " in text
    assert (
        "logistic regression reaches 50: 80.0 % (67.0-88.8). With fewer training messages GPT reaches 50: 60.0" in text
    )
    assert "| own\\: b |" in text and EVIL not in text
    assert "Of 60 messages of all parts 1 (1.7 %)" in text
    assert "train: ham, perhaps spam (0.900)" in text
    assert "\x1b" not in text and "\u202e" not in text


def test_messages_of_a_private_source_are_withheld(details: ClassifierDetails) -> None:
    text = "\n".join(details_section(details, "tfidf", [], False))
    assert "secret" not in text and text.count("Withheld") == 2


def test_details_reach_report_metrics_and_predictions(details: ClassifierDetails) -> None:
    base, classifiers, instruct = results(LABELS)
    found = base, classifiers._replace(details=details), instruct
    sections = tables.metrics(*found)
    assert sections["classifier"]["ece"] == details.calibration.ece.value
    assert sections["classifier"]["macro_f1_low"] == details.macro_f1.low
    assert sections["classifier_on_fewer_messages"] == {"50": 0.6}
    assert all(isinstance(v, int | float) for section in sections.values() for v in section.values())
    assert '"suggested": "spam"' in tables.predictions(*found)["label_errors.jsonl"]
    sources = {"corpus": "c", "messages": "m", "instructions": "i"}
    text = report.markdown(*found, sources, ["calibration.png"], ["corpus"])
    assert "### Can its probabilities be believed?" in text and "](figures/calibration.png)" in text
    assert text.count("secret") == 0


def test_picture_has_the_same_bytes_twice(tmp_path: Path, details: ClassifierDetails) -> None:
    for name in ("one.png", "two.png"):
        draw_calibration(details, tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
