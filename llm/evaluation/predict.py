"""Predictions of a model folder on a test set, for a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from llm.checkpoint.folder import Checkpoint, load_checkpoint
from llm.common.device import pick_device
from llm.common.errors import InputError
from llm.data.examples import Pair, read_lines
from llm.data.shards import TokenShards
from llm.evaluation.base.base_model import text_bytes
from llm.evaluation.instruct.instruction_following import answer
from llm.evaluation.predictions import Key, Predictions
from llm.inference.classify import classify_texts, decide
from llm.inference.score import score_tokens
from llm.model.gpt import GPT
from llm.tokenizer.bpe import Tokenizer

TOKENS = Path("data/tokens")
MAX_TOKENS = 200_000  # of held-out text that base models are compared on
MAX_NEW_TOKENS = 64  # of an answer


def predict(folder: Path, name: str, data: Path | None, device: str) -> dict[str, Predictions]:
    """Return a model's predictions, by their kind.

    `data` is JSON lines: text and label for a classifier, instruction, input and output for an instruction-tuned model,
    text for a base model. The default is the test part of `data/tokens`.
    """
    checkpoint = load_checkpoint(folder, pick_device(device))
    kind = checkpoint.config.kind
    if kind == "base":
        return {"text": score_texts(checkpoint, name, held_out_texts(data))}
    path = data or TOKENS / ("messages" if kind == "classifier" else "instructions") / "test.jsonl"
    columns = ("text", "label") if kind == "classifier" else ("instruction", "output")
    rows = read_lines(path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not all(isinstance(row.get(column), str) for column in columns):
            raise InputError(f"{path}, line {number}: expected texts {' and '.join(columns)} for a {kind} model")
    if not rows:
        raise InputError(f"{path}: no row to predict; name another file by --data")
    if kind == "classifier":
        return {"messages": label(checkpoint, name, [(row["text"], row["label"]) for row in rows])}
    pairs = [
        Pair(row["instruction"], row.get("input") or "", row["output"], "", row.get("messages", ()), row.get("tools"))
        for row in rows
    ]
    return {"instructions": answer_pairs(checkpoint, name, pairs)}


def label(checkpoint: Checkpoint, name: str, messages: Sequence[tuple[str, str]]) -> Predictions:
    labels = checkpoint.config.labels or []
    if unknown := {label for _, label in messages} - set(labels):
        raise InputError(f"{name}: has the labels {', '.join(labels)}, the test set also {', '.join(sorted(unknown))}")
    probabilities = classify_texts(checkpoint, [text for text, _ in messages])
    right = [labels.index(label) for _, label in messages]
    keys: list[Key] = [(text,) for text, _ in messages]
    return Predictions(
        "messages",
        name,
        keys,
        [label for _, label in messages],
        [decide(checkpoint.config, dict(zip(labels, row, strict=True))) for row in probabilities.tolist()],
        [-math.log(max(row[k], 1e-6)) for row, k in zip(probabilities.tolist(), right, strict=True)],
    )


def answer_pairs(checkpoint: Checkpoint, name: str, pairs: Sequence[Pair]) -> Predictions:
    texts = answer(checkpoint, pairs, MAX_NEW_TOKENS, batch_size=64)
    keys: list[Key] = [
        (pair.instruction, pair.input, *([str(pair.messages)] if pair.messages else [])) for pair in pairs
    ]
    return Predictions("instructions", name, keys, [pair.output for pair in pairs], texts)


def score_texts(checkpoint: Checkpoint, name: str, texts: Sequence[str]) -> Predictions:
    """Score each text behind a separator, so that its first token counts too."""
    model, tokenizer, _ = checkpoint
    assert isinstance(model, GPT)
    nats = [score_tokens(model, torch.tensor([tokenizer.eot, *tokenizer.encode(text)])).nats for text in texts]
    sizes = [len(text.encode()) for text in texts]
    return Predictions("text", name, [(text,) for text in texts], [""] * len(texts), [""] * len(texts), nats, sizes)


def held_out_texts(data: Path | None) -> list[str]:
    """Return the documents of a JSON lines file, or the first ones of the held-out corpus."""
    if data is not None:
        rows = read_lines(data)
        if not all(isinstance(row, dict) and isinstance(row.get("text"), str) for row in rows):
            raise InputError(f"{data}: expected JSON lines with a text each")
        texts = [row["text"] for row in rows if row["text"]]
    else:
        shards = TokenShards(TOKENS / "corpus", "test")
        ids = shards.read(0, min(shards.n_tokens, MAX_TOKENS))
        documents = text_bytes(Tokenizer.load(TOKENS / "tokenizer"), ids)
        texts = [document.decode("utf-8", "replace") for document in documents if document]
    if not texts:
        raise InputError(f"{data or TOKENS / 'corpus'}: no text to score; name a file by --data")
    return texts
