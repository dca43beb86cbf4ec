"""Details of the finetuned classifier: mistakes, slices, label errors, learning curve, robustness."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from llm.data.examples import Message
from llm.evaluation.classifier.classifier_details import (
    confident_mistakes,
    label_details,
    mean_precision,
    script,
    slices,
)
from llm.evaluation.classifier.label_errors import find_label_errors, suspects
from llm.evaluation.classifier.learning_curve import classical_curve, gpt_curve
from llm.evaluation.classifier.robustness import changed, evaluate_changes, typos
from llm.evaluation.metrics import classification_report
from llm.tokenizer.bpe import Tokenizer
from tests.helpers import runtime_params
from tests.trainings import classify_params, new_base

LABELS = ["ham", "spam"]
WORDS = {"ham": "bread harbour baker morning school garden", "spam": "prize winner money claim urgent offer"}


def messages(n: int, seed: int) -> list[Message]:
    rng = random.Random(seed)
    labels = [rng.choice(LABELS) for _ in range(n)]
    return [
        Message(" ".join(rng.choices(WORDS[label].split(), k=5)) + f" {i}", label) for i, label in enumerate(labels)
    ]


def test_planted_label_errors_are_found() -> None:
    clean = messages(300, 0)
    wrong = random.Random(1).sample(range(200), 20)
    train = [m._replace(label="ham" if m.label == "spam" else "spam") if i in wrong else m for i, m in enumerate(clean)]
    found = find_label_errors({"train": train[:200], "test": clean[200:]}, LABELS)
    assert found.searched == 300
    said = {s.text for s in found.suspects}
    planted = {clean[i].text for i in wrong}
    assert len(said & planted) >= 13 and len(said - planted) <= 1
    assert {s.split for s in found.suspects if s.text in planted} == {"train"}
    assert all(s.given != s.suggested for s in found.suspects)
    assert not find_label_errors({"train": clean}, LABELS).suspects
    assert find_label_errors({"train": clean[:3]}, LABELS) == (0, [])


def test_suspects_need_a_confident_other_label() -> None:
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.1, 0.9], [0.05, 0.95], [0.48, 0.52]])
    given = np.array([0, 0, 1, 1, 0, 0])
    assert suspects(given, probabilities)[0] == (4, 1)


def test_most_confident_mistakes_come_first() -> None:
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.01, 0.99], [0.2, 0.8]])
    found = confident_mistakes(["a", "b", "c", "d"], np.array([0, 0, 0, 1]), probabilities, LABELS)
    assert [(m.text, m.actual, m.predicted, m.probability) for m in found] == [
        ("c", "ham", "spam", 0.99),
        ("b", "ham", "spam", 0.6),
    ]


def test_slices_are_by_length_and_script() -> None:
    texts = [f"{'word ' * (1 + i // 10)}{i:03}" for i in range(40)] + [f"слово слово {i:03}" for i in range(8)]
    right = np.array([1.0] * 40 + [0.0] * 8)
    found = slices(texts, right, 1 - right, np.arange(48))
    scripts = {each.name: each for each in found if each.kind == "script"}
    assert (scripts["latin"].rows, scripts["latin"].gpt.value, scripts["latin"].classical.value) == (40, 1.0, 0.0)
    assert scripts["cyrillic"].gpt.value == 0.0
    lengths = [each for each in found if each.kind == "length"]
    assert sum(each.rows for each in lengths) == 48 and len(lengths) >= 3
    assert not [each for each in slices(texts[:40], right[:40], right[:40], np.arange(40)) if each.kind == "script"]
    assert (script("2 × été"), script("жщ ab c"), script("42")) == ("latin", "latin", "none")


def test_slices_are_by_the_columns_of_the_source() -> None:
    columns = [{"language": "de" if i < 20 else "en" if i < 45 else "fr", "only": "one"} for i in range(48)]
    columns[47] = {"only": "one"}
    right = np.array([1.0] * 20 + [0.0] * 28)
    found = slices(["a word"] * 48, right, 1 - right, np.arange(48), columns)
    assert [(each.kind, each.name, each.rows) for each in found] == [("language", "en", 25), ("language", "de", 20)]
    assert [each.gpt.value for each in found] == [0.0, 1.0], "the most frequent value first, rare ones left out"
    many = [{"shop": f"shop {i % 20:02}"} for i in range(200)]
    assert len(slices(["a word"] * 200, np.ones(200), np.ones(200), np.arange(200), many)) == 12


def test_figures_of_rare_labels() -> None:
    rng = np.random.default_rng(0)
    actual = np.array([0] * 80 + [1] * 15 + [2] * 5)
    probabilities = rng.dirichlet([1, 1, 1], 100) + 2 * np.eye(3)[actual]
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    probabilities[99] = [0.8, 0.1, 0.1]
    report = classification_report(actual, probabilities, ["a", "b", "c"])
    details, curves, macro = label_details(report, actual, probabilities, ["a", "b", "c"])
    assert details["c"].recall.value == 0.8
    assert details["c"].recall.low < 0.5 < 0.9 < details["a"].recall.low, "few messages tell little"
    assert macro.value == pytest.approx(np.mean([s.f1 for s in report.per_label.values()]))
    assert details["b"].average_precision == pytest.approx(1.0)
    assert mean_precision(details) == pytest.approx(np.mean([each.average_precision for each in details.values()]))
    assert set(curves) == {"a", "b", "c"}


def test_learning_curve_grows_with_the_messages() -> None:
    train, val, test = messages(160, 0), messages(30, 1), messages(100, 2)
    points = classical_curve("tfidf", train, val, test, LABELS)
    assert [point.messages for point in points] == [20, 40, 80]
    assert points[-1].accuracy.value >= points[0].accuracy.value > 0.5
    assert points == classical_curve("tfidf", train, val, test, LABELS)


def test_learning_curve_of_the_gpt_grows_with_the_messages() -> None:
    data = messages(160, 0), messages(30, 1), messages(100, 2)
    base = new_base(Tokenizer.train([message.text for message in data[0]], 400, exact=False), seed=0)
    before = {name: p.clone() for name, p in base.model.state_dict().items()}
    params = classify_params(max_steps=40, eval_interval=20)
    points = gpt_curve(base, params, runtime_params(), 3, data, LABELS)
    assert [(point.classifier, point.messages) for point in points] == [("gpt", 20), ("gpt", 40), ("gpt", 80)]
    assert points[-1].accuracy.value >= points[0].accuracy.value and points[-1].accuracy.value > 0.9
    assert points == gpt_curve(base, params, runtime_params(), 3, data, LABELS)
    assert all(torch.equal(p, before[name]) for name, p in base.model.state_dict().items()), "the base is not touched"


def test_changes_keep_the_label_and_hit_their_classifier() -> None:
    test, train = messages(40, 3), messages(60, 4)

    def small_letters(texts: Sequence[str]) -> NDArray[np.float64]:
        spam = [any(word in text for word in WORDS["spam"].split()) for text in texts]
        return np.eye(2)[np.array(spam, dtype=int)]

    def any_letters(texts: Sequence[str]) -> NDArray[np.float64]:
        return small_letters([text.lower() for text in texts])

    found = {each.name: each for each in evaluate_changes(test, train, LABELS, any_letters, small_letters)}
    assert set(found) == {"as it is", "upper case", "lower case", "typos", "padding", "ham appended"}
    assert found["as it is"].gpt.value == found["padding"].gpt.value == found["ham appended"].gpt.value == 1.0
    upper = found["upper case"]
    spam = sum(message.label == "spam" for message in test)
    assert upper.gpt.value == 1.0 and upper.classical.value == pytest.approx(1 - spam / 40)
    assert (upper.only_gpt, upper.only_classical) == (spam, 0) and upper.p < 0.01
    assert "ham appended" not in " ".join(changed(test, train, ["a", "b", "c"]))


def test_typos_swap_letters_of_one_word_in_ten() -> None:
    text = "understanding " * 500
    found = typos(text, random.Random(0)).split()
    assert 25 < sum(word != "understanding" for word in found) < 80
    assert all(sorted(word) == sorted("understanding") for word in found)
    assert all(word[0] == "u" for word in found)
    assert typos("a cat 7", random.Random(0)) == "a cat 7"
