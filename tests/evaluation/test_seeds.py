"""Several seeds: the spread of a headline, from the folders of further models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llm.checkpoint.folder import save_checkpoint
from llm.evaluation.seeds import accuracies, exact_matches, repeated, spread, spreads
from llm.reporting.report import seeds_section
from llm.reporting.tables import seed_metrics
from llm.tokenizer.bpe import Tokenizer
from tests.evaluation.models import TEXTS, make_folder, params, write_rows

CPU = torch.device("cpu")


def test_spread_is_students_interval() -> None:
    found = spread([0.9, 0.92, 0.94])
    assert (found.mean, found.sd) == (pytest.approx(0.92), pytest.approx(0.02))
    assert found.high - found.mean == pytest.approx(4.3027 * 0.02 / 3**0.5, abs=1e-5)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)


def test_interval_of_a_share_ends_at_all_and_nothing() -> None:
    assert spread([0.996, 0.955]).high == 1.0 and spread([0.004, 0.045]).low == 0.0


def test_one_seed_has_no_spread() -> None:
    assert spreads({"accuracy": 0.9}, {"accuracy": [], "exact_match": []}) == {}
    assert seeds_section({}) == "" and seed_metrics({}) == {}


def test_further_seeds_are_evaluated_like_the_first(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"text": text, "label": "dog" if "dog" in text else "cat"} for text in TEXTS[:10]]
    for split in ("train", "val", "test"):
        write_rows(tmp_path / "messages" / f"{split}.jsonl", rows)
    (tmp_path / "messages/labels.json").write_text(json.dumps(["cat", "dog"]))
    folder = make_folder(tokenizer, "classifier", ["cat", "dog"])
    for name, bias in (("1", 50.0), ("2", -50.0), ("2_scratch", 0.0)):
        with torch.no_grad():
            folder.model.head.bias.copy_(torch.tensor([bias, 0.0]))  # type: ignore[union-attr, operator]
        save_checkpoint(tmp_path / "seeds" / name, folder)
    assert [path.name for path in repeated(tmp_path / "seeds", "")] == ["1", "2"]
    assert not list(repeated(tmp_path / "seeds", "_scratch")), "they begin at 1"
    cats = sum(row["label"] == "cat" for row in rows) / 10
    found = accuracies(repeated(tmp_path / "seeds", ""), tmp_path / "messages", 4, CPU)
    assert found == [cats, 1 - cats]
    result = spreads({"accuracy": cats}, {"accuracy": found})
    assert result["accuracy"].values == [cats, cats, 1 - cats]
    text = seeds_section(result)
    assert "| label messages, accuracy | 3 | " in text and f"{100 * cats:.1f}, {100 * cats:.1f}, " in text
    assert seed_metrics(result)["accuracy_over_seeds"]["mean"] == pytest.approx((1 + cats) / 3)


def test_answers_of_further_seeds_are_matched(tmp_path: Path, tokenizer: Tokenizer) -> None:
    row = {"instruction": "say", "input": "", "output": "no such answer", "task": ""}
    for split in ("test", "val"):
        write_rows(tmp_path / "instructions" / f"{split}.jsonl", [row])
    save_checkpoint(tmp_path / "seeds" / "1", make_folder(tokenizer))
    folders = repeated(tmp_path / "seeds", "")
    assert exact_matches(folders, "alpaca", tmp_path / "instructions", params(), CPU) == [0.0]
