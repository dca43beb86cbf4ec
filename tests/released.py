"""A workspace that the release gate reads: predictions, figures and `dvc.lock` of the models that stand in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm.audit.leakage import audit_sets
from llm.common.digests import path_md5
from llm.data.examples import read_messages, read_pairs
from llm.evaluation.leakage import asked
from llm.evaluation.metrics import wilson
from llm.evaluation.predict import predict

TOKENS, REPORTS = Path("data/tokens"), Path("reports")
MODELS = {"classifier": "messages", "instruct": "instructions"}


def copy_workspace(store: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy a workspace to `place` and go there; both have the same registry."""
    shutil.copytree(store, place, ignore=shutil.ignore_patterns("mlflow.db*", "mlruns"))
    monkeypatch.chdir(place)
    monkeypatch.setenv("DVC_ROOT", str(store))
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return place


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluate() -> None:
    """Write what the pipeline would: predictions, figures with the audit, and the lock."""
    figures: dict[str, dict[str, float]] = {}
    for name, kind in MODELS.items():
        (said,) = predict(Path("models", name), name, None, "cpu").values()
        pairs = zip(said.keys, said.expected, said.predicted, strict=True)
        if kind == "messages":
            rows = [{"text": key[0], "label": truth, "predicted": {"gpt": p}} for key, truth, p in pairs]
        else:
            rows = [
                {"instruction": key[0], "input": key[1], "output": truth, "answers": {"gpt": p}}
                for key, truth, p in pairs
            ]
        write_rows(REPORTS / f"predictions/{kind}.jsonl", rows)
        right = sum(p == truth for p, truth in zip(said.predicted, said.expected, strict=True))
        share, metric = wilson(right, len(rows)), "accuracy" if kind == "messages" else "exact_match"
        figures[name] = {metric: share.value, f"{metric}_low": share.low, f"{metric}_high": share.high}
        figures[name]["messages" if kind == "messages" else "pairs"] = len(rows)
        figures[f"leaks_{kind}_test"] = dict(leaks(kind))
    (REPORTS / "metrics").mkdir(parents=True, exist_ok=True)
    (REPORTS / "metrics/evaluate.json").write_text(json.dumps(figures))
    write_lock()


def leaks(kind: str) -> dict[str, int]:
    """Return the counts of the audit of one test set."""
    folder = TOKENS / kind
    texts = {}
    for split in ("train", "test"):
        path = folder / f"{split}.jsonl"
        texts[split] = [m.text for m in read_messages(path)] if kind == "messages" else [*map(asked, read_pairs(path))]
    return audit_sets({kind: texts}, most_near=10_000).parts[0].counts()


def write_lock() -> None:
    models = [{"path": f"models/{name}", "md5": f"{path_md5(Path('models', name))}.dir"} for name in MODELS]
    data = {"path": "data/tokens/messages", "md5": f"{path_md5(TOKENS / 'messages')}.dir"}
    report = "reports/metrics/evaluate.json"
    stages = {
        "train": {"deps": [data], "outs": models},
        "evaluate": {"deps": models, "outs": [{"path": report, "md5": path_md5(Path(report))}]},
    }
    Path("dvc.lock").write_text(yaml.safe_dump({"stages": stages}))
