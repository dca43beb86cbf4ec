"""Finetunings repeated with other seeds: one run stays as it was."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stages.runtime import finetune


@pytest.mark.parametrize("seeds", [1, 3])
def test_each_further_seed_trains_a_model_and_its_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: int
) -> None:
    monkeypatch.chdir(tmp_path)
    trained: list[tuple[str, str, bool, int]] = []
    monkeypatch.setattr(
        finetune,
        "train",
        lambda run, name, rates, _, from_base, seed: trained.append((name, str(rates), from_base, seed)),
    )
    params = SimpleNamespace(seed=123, evaluate=SimpleNamespace(seeds=seeds))

    class Section(str):
        scratch_control = True

        def from_scratch(self) -> str:
            return "for random weights"

    section: Any = Section("of the finetuning")
    run: Any = SimpleNamespace(params=params)
    finetune.train_seeds(run, "classifier", section, lambda run, base: None)  # type: ignore[arg-type, return-value]
    assert trained == [
        row
        for n in range(1, seeds)
        for row in (
            (f"classifier_seeds/{n}", "of the finetuning", True, 123 + n),
            (f"classifier_seeds/{n}_scratch", "for random weights", False, 123 + n),
        )
    ]
    written = json.loads((tmp_path / "models/classifier_seeds/seeds.json").read_text())
    assert written == ({"1": 124, "2": 125} if seeds == 3 else {})
