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
    trained: list[tuple[str, bool, int]] = []
    monkeypatch.setattr(
        finetune, "train", lambda run, name, *_, from_base, seed: trained.append((name, from_base, seed))
    )
    params = SimpleNamespace(seed=123, evaluate=SimpleNamespace(seeds=seeds))
    section: Any = SimpleNamespace(scratch_control=True, model_copy=lambda update: SimpleNamespace(**update))
    run: Any = SimpleNamespace(params=params)
    finetune.train_seeds(run, "classifier", section, lambda run, base: None)  # type: ignore[arg-type, return-value]
    names = [(f"classifier_seeds/{n}{suffix}", not suffix, 123 + n) for n in (1, 2) for suffix in ("", "_scratch")]
    assert trained == (names if seeds == 3 else [])
    written = json.loads((tmp_path / "models/classifier_seeds/seeds.json").read_text())
    assert written == ({"1": 124, "2": 125} if seeds == 3 else {})
