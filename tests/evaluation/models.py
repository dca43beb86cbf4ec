"""Tiny models and data sets to evaluate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from llm.checkpoint.folder import Checkpoint, CheckpointConfig
from llm.config import EvaluateParams
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT
from llm.tokenizer.bpe import Tokenizer
from tests.helpers import SHIPPED_FORM, gpt_config

TEXTS = ["the cat sat on the mat", "a dog ran to the cat", "the mat is red", "a red dog sat", "the cat ran"] * 8


def make_gpt(tokenizer: Tokenizer) -> GPT:
    torch.manual_seed(0)
    config = gpt_config(**SHIPPED_FORM, context_length=256, vocab_size=tokenizer.vocab_size)
    return GPT(config).eval()


def make_folder(tokenizer: Tokenizer, kind: str = "base", labels: list[str] | None = None) -> Checkpoint:
    gpt = make_gpt(tokenizer)
    model = GPTClassifier(gpt, len(labels)).eval() if labels else gpt
    config = CheckpointConfig(kind=kind, gpt=gpt.config, labels=labels, max_length=32 if labels else None)
    return Checkpoint(model, tokenizer, config)


def params(**changes: object) -> EvaluateParams:
    values: dict[str, object] = {
        "test_tokens": 1000,
        "ngram_order": 3,
        "baseline_bytes": 10**6,
        "max_new_tokens": 4,
        "batch_size": 3,
        "report_samples": 2,
        "prompts": ["the cat", ""],
        "audit_texts": 1000,
        "audit_bytes": 10**6,
        "robustness": 0,
        "learning_curve": False,
        "seeds": 1,
    }
    return EvaluateParams.model_validate(values | changes)


def write_corpus(folder: Path, tokenizer: Tokenizer, splits: dict[str, list[str]]) -> None:
    folder.mkdir()
    meta = {}
    for split, texts in splits.items():
        ids = [t for text in texts for t in [*tokenizer.encode(text), tokenizer.eot]]
        np.array(ids, dtype="<u2").tofile(folder / f"{split}-00000.bin")
        n_bytes = sum(len(text.encode()) for text in texts)
        meta[split] = {"shards": [f"{split}-00000.bin"] if ids else [], "tokens": len(ids), "bytes": n_bytes}
    content = {"dtype": "uint16", "vocab_size": tokenizer.vocab_size, "splits": meta}
    (folder / "meta.json").write_text(json.dumps(content))


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
