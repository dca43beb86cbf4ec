"""Requirements of the release gate, each on crafted figures and files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm.config import ReleaseParams
from llm.evaluation.comparison import compare, mean_metric, ratio_metric
from llm.evaluation.predictions import Predictions
from llm.release.gate import (
    blocked,
    check_champion,
    check_cost,
    check_leaks,
    check_near_leaks,
    check_predictions,
    check_released,
    check_thresholds,
    right_answers,
    to_markdown,
)

PARAMS = ReleaseParams(
    at_least={"classifier": {"accuracy": 0.9, "f1": 0.5}, "other": {"x": 1.0}},
    at_most={"classifier": {"ece": 0.05}},
    no_worse_by={"accuracy": 0.02, "bits_per_byte": 0.1},
    slower_by=0.5,
    larger_by=0.5,
    leaks=0,
    near_leaks=0.02,
)


@pytest.mark.parametrize(
    ("figures", "short"),
    [
        ({"accuracy": 0.95, "accuracy_low": 0.9, "f1": 0.5, "ece": 0.01, "ece_high": 0.05}, []),
        ({"accuracy": 0.95, "accuracy_low": 0.89, "f1": 0.5, "ece": 0.01}, ["accuracy, low end"]),
        ({"accuracy": 0.95, "f1": 0.49, "ece": 0.01, "ece_high": 0.06}, ["f1", "ece, high end"]),
        ({"accuracy": 0.95, "f1": 0.6}, ["ece"]),
    ],
)
def test_thresholds_are_held_against_the_worse_end(figures: dict[str, float], short: list[str]) -> None:
    rows = list(check_thresholds(PARAMS, {"classifier": figures}, ["classifier"]))
    assert [row.what for row in blocked(rows)] == short and len(rows) == 3
    assert ("not measured" in {row.found for row in rows}) == (short == ["ece"])


def test_a_champion_is_lost_to_by_no_more_than_is_allowed() -> None:
    champion = [1.0] * 1000
    for wrong, passes in ((0, True), (5, True), (14, False), (100, False)):
        results = compare([mean_metric("accuracy", champion, [0.0] * wrong + [1.0] * (1000 - wrong))])
        (row,) = check_champion("classifier", results, PARAMS.no_worse_by)
        assert (row.verdict == "passes") == passes, row  # 14 of 1,000: the interval reaches beyond 2 points
        assert row.what == "accuracy beside the champion"
    import numpy as np

    sizes, bits = np.full(50, 10.0), np.linspace(8, 12, 50)
    for factor, passes in ((0.9, True), (1.05, True), (1.3, False)):
        results = compare([ratio_metric("bits per byte", bits, bits * factor, sizes)])
        (row,) = check_champion("base", results, PARAMS.no_worse_by)
        assert (row.verdict == "passes") == passes, row
    assert not list(check_champion("base", results, {}))


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_leaks_are_counted_in_the_data_and_read_from_reports(tmp_path: Path) -> None:
    tokens, metrics = tmp_path / "tokens", tmp_path / "metrics"
    metrics.mkdir()
    write_rows(tokens / "messages/train.jsonl", [{"text": "See you at SIX!", "label": "ham"}])
    write_rows(
        tokens / "messages/test.jsonl", [{"text": "see you at six", "label": "ham"}, {"text": "b", "label": "x"}]
    )
    pair = {"instruction": "Name it.", "input": "a", "output": "b", "task": ""}
    write_rows(tokens / "instructions/train.jsonl", [pair])
    told = [{"role": role, "content": text} for role, text in (("user", "Anna bakes."), ("assistant", "Yes."))]
    turns = {"messages": [*told, {"role": "user", "content": "Name it."}, {"role": "assistant", "content": "b"}]}
    write_rows(tokens / "instructions/test.jsonl", [pair | {"input": "c"}, pair | turns])
    (metrics / "tokenize.json").write_text('{"corpus": {"test_leaked": 3, "val_leaked": 2}, "messages": {"test": 2}}')
    (metrics / "evaluate.json").write_text('{"leaks_messages_test": {"exact": 2, "leaked": 9}, "clean": {"x": 1}}')
    rows = list(check_leaks(tokens, metrics, 0))
    assert [(row.what, row.found) for row in blocked(rows)] == [
        ("leaks: test messages in train", "1"),
        ("leaks: evaluate leaks_messages_test.exact", "2"),
        ("leaks: tokenize corpus.test_leaked", "3"),
    ]
    assert blocked(list(check_leaks(tokens, metrics, 3))) == []
    away = list(check_leaks(tmp_path / "none", metrics, 3))
    assert {row.verdict for row in away[:2]} == {"not checked"} and len(blocked(away)) == 2
    assert blocked(away, strict=False) == []


def test_other_answers_than_reported_ones_are_found() -> None:
    def said(answers: list[str], keys: str = "k") -> Predictions:
        return Predictions("messages", "x", [(f"{keys}{i}",) for i in range(200)], ["a"] * 200, answers)

    assert check_predictions("m", said(["a"] * 200), said(["a"] * 200)).verdict == "passes"
    assert check_predictions("m", said(["a"] * 200), said(["a"] * 198 + ["b"] * 2)).verdict == "passes"
    row = check_predictions("m", said(["a"] * 200), said(["a"] * 190 + ["b"] * 10))
    assert (row.verdict, row.found[:41]) == ("falls short", "10 of 200 differ: template, tokenizer or ")
    assert "another test set" in check_predictions("m", said(["a"] * 200, "j"), said(["a"] * 200)).found
    assert check_predictions("m", None, said(["a"] * 200)).verdict == "not checked"


def test_a_model_is_held_against_the_champion_as_it_was_released() -> None:
    def said(wrong: int, start: str = "k") -> Predictions:
        keys = [(f"{start}{i}",) for i in range(1000)]
        return Predictions("messages", "x", keys, ["a"] * 1000, ["b"] * wrong + ["a"] * (1000 - wrong))

    released = right_answers(said(3))
    assert len(released) == 1000 and sum(released.values()) == 997 and not any("k1" in key for key in released)
    for wrong, passes in ((0, True), (5, True), (60, False)):
        (row,) = check_released("classifier", released, said(wrong), PARAMS.no_worse_by)
        assert row.what == "accuracy beside the champion as it was released"
        assert (row.verdict == "passes") == passes, row
    (other,) = check_released("classifier", released, said(60, "j"), PARAMS.no_worse_by)
    (none,) = check_released("classifier", {}, said(60), PARAMS.no_worse_by)
    assert (other.verdict, other.found) == ("passes", "another test set")
    assert (none.verdict, none.found) == ("passes", "no record of its answers")
    assert not list(check_released("classifier", released, said(60), {}))


def test_a_share_of_nearly_equal_test_texts_is_too_much() -> None:
    metrics = {"classifier": {"messages": 1000}, "leaks_messages_test": {"near": 15, "corpus": 6, "leaked": 21}}
    (row,) = check_near_leaks(metrics, 0.02)
    assert (row.verdict, row.found, row.needs) == ("falls short", "21 of 1,000", "<= 2 %")
    assert next(check_near_leaks(metrics, 0.021)).verdict == "passes"
    assert not list(check_near_leaks({"classifier": {"messages": 1000}}, 0.02))


def test_costs_and_the_table() -> None:
    assert check_cost("m", "speed", "s", 1.5, 1.0, 0.5).verdict == "passes"
    slow = check_cost("m", "speed", "s", 1.6, 1.0, 0.5)
    table = to_markdown([check_cost("m", "size", "bytes", 1, 1, 0), slow._replace(found="a | b")])
    assert table.splitlines()[2].startswith("| m | speed |") and "a \\| b" in table
