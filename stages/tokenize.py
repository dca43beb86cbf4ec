"""Cleans and splits the three data sets, trains or loads the tokenizer, encodes the corpus, writes the data card."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from llm.common.files import write_atomic
from llm.config import KINDS, SCRATCH
from llm.preprocess import data_card as datacard
from llm.preprocess import supervised as labelled
from llm.preprocess.corpus import Workers, batches_of, encode_corpus, plan_corpus, training_texts
from llm.preprocess.text import read_raw_json
from llm.tokenizer.bpe import Tokenizer
from stages.runtime.run import Run, main

RAW, TOKENS = Path("data/raw"), Path("data/tokens")


def tokenize(run: Run) -> None:
    draft = TOKENS.with_name("tokens.tmp")  # renamed at the end, so that data/tokens is whole or absent
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        card = write_tokens(run, draft)
        shutil.rmtree(TOKENS, ignore_errors=True)
        draft.replace(TOKENS)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    card_json, card_md = Path("reports/data_card.json"), Path("reports/data_card.md")
    write_atomic(card_json, json.dumps(card, indent=2, ensure_ascii=False) + "\n")
    write_atomic(card_md, datacard.render(card))
    run.artifact(card_md)
    run.write_metrics(main_figures(card))


def write_tokens(run: Run, folder: Path) -> dict[str, Any]:
    """Writes everything but the reports, and returns the data card."""
    params, seed = run.params.tokenize, run.params.seed
    labels = read_raw_json(RAW / "labels.json")
    messages = labelled.read_messages(RAW / "messages.jsonl", labels)
    pairs = labelled.read_instructions(RAW / "instructions.jsonl")
    split_messages = labelled.split_messages(messages, labels, params.messages, seed)
    split_pairs = labelled.split_instructions(pairs, params.instructions, seed)
    labelled.write_rows(folder / "messages", split_messages)
    labelled.write_rows(folder / "instructions", split_pairs)
    write_atomic(folder / "messages" / "labels.json", json.dumps(labels) + "\n")
    provenance = read_raw_json(RAW / "sources.json")
    quotable = [kind for kind in KINDS if provenance[kind]["quotable"]]
    write_atomic(folder / "quotable.json", json.dumps(quotable) + "\n")

    corpus = RAW / "corpus.jsonl"
    n_workers = min(run.params.runtime.workers or cores(), len(batches_of(corpus)))
    with Workers(n_workers) as workers:
        plan = plan_corpus(corpus, params.corpus, seed, workers)
        kind, init = params.tokenizer.kind, run.params.pretrain.init
        if init != SCRATCH:
            from llm.convert.hf import import_tokenizer  # late: it brings torch, which no worker process needs

            tokenizer = import_tokenizer(init).tokenizer
        elif kind == "gpt2":
            tokenizer = Tokenizer.gpt2(RAW / "gpt2" / "encoder.json", RAW / "gpt2" / "vocab.bpe")
        else:
            texts = training_texts(corpus, plan, params.tokenizer.train_chars)
            tokenizer = Tokenizer.train(texts, params.tokenizer.vocab_size)
        tokenizer.save(folder / "tokenizer")
        encoded = encode_corpus(corpus, folder / "corpus", plan, folder / "tokenizer", params.tokens_per_shard, workers)

    card = {
        "sources": {kind: {key: provenance[kind][key] for key in ("source", "licence")} for kind in KINDS},
        "tokenizer": datacard.describe_tokenizer(kind if init == SCRATCH else init, tokenizer, encoded.used),
        "corpus": datacard.describe_corpus(plan, encoded, params.corpus.split),
        "messages": datacard.describe_messages(messages, split_messages, tokenizer, params.messages.split),
        "instructions": datacard.describe_instructions(pairs, split_pairs, tokenizer, params.instructions.split),
    }
    return datacard.without_texts(card, [kind for kind in KINDS if kind not in quotable])


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main_figures(card: dict[str, Any]) -> dict[str, Any]:
    splits = card["corpus"]["splits"]
    figures: dict[str, Any] = {
        "vocab_size": card["tokenizer"]["vocab_size"],
        "corpus": {f"{name}_tokens": values["tokens"] for name, values in splits.items()}
        | {f"{name}_bytes_per_token": values["bytes_per_token"] for name, values in splits.items() if values["tokens"]}
        | {f"{name}_leaked": count for name, count in card["corpus"]["leaked_units"].items()},
    }
    for kind in ("messages", "instructions"):
        figures[kind] = {name: values["records"] for name, values in card[kind]["splits"].items()}
        figures[kind] |= {f"{name}_leaked": counts["by_key"] for name, counts in card[kind]["leaked"].items()}
    return figures


if __name__ == "__main__":
    main("tokenize", tokenize)
