"""Classifiers on one held-out part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from llm.common.errors import InputError
from llm.evaluation.classifier.classification import evaluate_classifiers
from llm.evaluation.classifier.learning_curve import CurvePoint, LabelledData
from llm.evaluation.metrics import wilson
from llm.tokenizer.bpe import Tokenizer
from tests.evaluation.models import TEXTS, make_folder, write_rows
from tests.evaluation.test_baselines import METHODS


def test_classifiers_share_one_test_part(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"text": text, "label": "dog" if "dog" in text else "cat"} for text in TEXTS]
    folder = tmp_path / "messages"
    for split, part in (("train", rows), ("val", rows[:5]), ("test", rows[:10])):
        write_rows(folder / f"{split}.jsonl", part)
    (folder / "labels.json").write_text('["cat", "dog"]')
    classifier = make_folder(tokenizer, "classifier", ["cat", "dog"])
    result = evaluate_classifiers({"gpt": classifier}, folder, 4)
    assert list(result.reports) == ["gpt", *METHODS]
    assert {r.rows for r in result.reports.values()} == {10}
    assert result.reports["tfidf"].accuracy.value == 1.0
    assert result.reports[result.best_classical()].accuracy.value == 1.0
    only_gpt, only_tfidf, _ = result.paired("gpt", "tfidf")
    assert (only_gpt, only_tfidf) == (0, 10 - round(10 * result.reports["gpt"].accuracy.value))
    right = sum(a == p for a, p in zip(result.actual, result.predicted(), strict=True))
    assert result.reports["gpt"].accuracy.value == right / 10

    points = [CurvePoint("gpt", 5, wilson(1, 2))]
    given: list[tuple[int, ...]] = []

    def curve(data: LabelledData, labels: Sequence[str]) -> list[CurvePoint]:
        given.append((*map(len, data), len(labels)))
        return points

    details = evaluate_classifiers({"gpt": classifier}, folder, 4, curve=curve).details
    assert details is not None and details.learning_curve[-1:] == points and given == [(40, 5, 10, 2)]
    assert result.details is not None and details.learning_curve[:-1] == result.details.learning_curve

    (folder / "labels.json").write_text('["dog", "cat"]')
    with pytest.raises(InputError, match="train it again"):
        evaluate_classifiers({"gpt": classifier}, folder, 4)
