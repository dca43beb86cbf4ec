"""Clean and split the three data sets, train or load the tokenizer, encode the corpus, write the data card."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from llm.common.errors import InputError
from llm.common.files import replaced_folder, write_atomic
from llm.config import KINDS, SCRATCH, Params
from llm.download.hub import source_files
from llm.preprocess import clean_corpus, data_card, lengths, supervised
from llm.preprocess.clean import is_on
from llm.preprocess.corpus import Plan, line_batches, plan_corpus, training_texts
from llm.preprocess.encode import encode_corpus
from llm.preprocess.supervised import SplitRows
from llm.preprocess.text import read_raw_json
from llm.preprocess.workers import Workers
from llm.tokenizer.bpe import Tokenizer
from llm.tokenizer.build import ImportedTokenizer
from llm.tokenizer.conversation import ConversationEncoder
from llm.tokenizer.load import import_tokenizer, own_conversations
from stages.runtime.run import Run, main

logger = logging.getLogger("llm")
RAW, TOKENS = Path("data/raw"), Path("data/tokens")


def tokenize(run: Run) -> None:
    with replaced_folder(TOKENS) as draft:
        card = write_tokens(run, draft)
    card_json, card_md = Path("reports/data_card.json"), Path("reports/data_card.md")
    write_atomic(card_json, json.dumps(card, indent=2, ensure_ascii=False) + "\n")
    write_atomic(card_md, data_card.render(card))
    run.artifact(card_md)
    run.write_metrics(main_figures(card))
    for line in summary(card):
        logger.info("tokenize: %s", line)


def write_tokens(run: Run, folder: Path) -> dict[str, Any]:
    """Write everything but the reports, and return the data card."""
    params, seed = run.params.tokenize, run.params.seed
    labels = read_raw_json(RAW / "labels.json")
    messages = supervised.read_messages(RAW / "messages.jsonl", labels)
    pairs = supervised.read_instructions(RAW / "instructions.jsonl")
    split_messages = supervised.split_messages(messages, labels, params.messages, seed)
    split_pairs = supervised.split_instructions(pairs, params.instructions, seed)
    supervised.write_rows(folder / "messages", split_messages)
    supervised.write_rows(folder / "instructions", split_pairs)
    write_atomic(folder / "messages" / "labels.json", json.dumps(labels) + "\n")
    provenance = read_raw_json(RAW / "sources.json")
    quotable = [kind for kind in KINDS if provenance[kind]["quotable"]]
    write_atomic(folder / "quotable.json", json.dumps(quotable) + "\n")

    corpus = RAW / "corpus.jsonl"
    n_workers = min(run.params.runtime.workers or cores(), len(line_batches(corpus)))
    with Workers(n_workers) as workers:
        funnel = None
        if is_on(params.clean):
            raw, corpus = corpus, folder / "clean.jsonl"
            funnel = clean_corpus.clean_corpus(raw, corpus, params.clean, workers, run.state_dir)
            logger.info(clean_corpus.sentence(funnel))
        plan = plan_corpus(corpus, params.corpus, seed, workers)
        kind, imported = make_tokenizer(run.params, corpus, plan)
        tokenizer = imported.tokenizer
        too_long = check_lengths(run.params, imported, split_messages, split_pairs)
        tokenizer.save(folder / "tokenizer")
        encoded = encode_corpus(corpus, folder / "corpus", plan, folder / "tokenizer", params.tokens_per_shard, workers)
    for kind in KINDS:
        write_atomic(folder / kind / "source.json", json.dumps(source_card(provenance[kind]), indent=2) + "\n")

    card = {
        "sources": {kind: {key: provenance[kind][key] for key in ("source", "licence")} for kind in KINDS},
        "tokenizer": data_card.describe_tokenizer(kind, tokenizer, encoded.used),
        "corpus": data_card.describe_corpus(plan, encoded, params.corpus.split),
        "messages": data_card.describe_messages(messages, split_messages, tokenizer, params.messages.split),
        "instructions": data_card.describe_instructions(pairs, split_pairs, tokenizer, params.instructions.split),
    }
    if funnel is not None:
        corpus.unlink()
        card["corpus"]["cleaning"] = funnel.card()
    for kind, counts in too_long.items():
        card[kind]["too_long"] = counts
    if too_long:
        write_atomic(folder / "too_long.json", json.dumps(too_long, indent=2) + "\n")
    for kind in KINDS:
        if "left_out" in provenance[kind]:
            card[kind]["left_out"] = provenance[kind]["left_out"]["rows"]
    return data_card.without_texts(card, [kind for kind in KINDS if kind not in quotable])


def source_card(found: dict[str, Any]) -> dict[str, Any]:
    """Return a source as models state it: a private file by its digest alone, without its path."""

    def is_told(file: str) -> bool:
        own = Path(file).is_absolute() or ".." in Path(file).parts or Path(file).parts[:2] == ("data", "own")
        return bool(found["quotable"]) and not own

    files = [
        {key: file[key] for key in ("sha256", "bytes")} | ({"file": file["file"]} if is_told(file["file"]) else {})
        for file in found.get("files", [])  # none in data/raw of an earlier version
    ]
    return {key: found[key] for key in ("source", "licence", "quotable")} | {"files": files}


def make_tokenizer(params: Params, corpus: Path, plan: Plan) -> tuple[str, ImportedTokenizer]:
    """Return the tokenizer of the open weights, GPT-2's, or one trained on the train split, and its name."""
    section, init = params.tokenize.tokenizer, params.pretrain.init
    if init != SCRATCH:
        return init, import_tokenizer(source_files(init, weights=False))
    if section.kind == "gpt2":
        gpt2 = Tokenizer.gpt2(RAW / "gpt2" / "encoder.json", RAW / "gpt2" / "vocab.bpe")
        return section.kind, ImportedTokenizer(gpt2, None, None)
    texts = training_texts(corpus, plan, section.train_chars)
    tokenizer = Tokenizer.train(texts, section.vocab_size, exact=False)
    if tokenizer.vocab_size < section.vocab_size:
        logger.warning(
            "tokenize.tokenizer.vocab_size: the corpus is too small for %s tokens; takes the %s that it has",
            f"{section.vocab_size:,}",
            f"{tokenizer.vocab_size:,}",
        )
    return section.kind, ImportedTokenizer(tokenizer, None, None)


def check_lengths(
    params: Params, imported: ImportedTokenizer, messages: SplitRows, pairs: SplitRows
) -> dict[str, dict[str, Any]]:
    """Log and return what is longer than its training reads, by kind; raise `InputError` for too much of it."""
    template = params.finetune_instruct.template
    if template != "own":
        system = imported.system if imported.template == template else None
        encoder = ConversationEncoder(imported.tokenizer, template, system)
    elif params.pretrain.init == SCRATCH:
        raise InputError("finetune_instruct.template: own needs open weights as pretrain.init; take chatml")
    else:
        encoder = own_conversations(source_files(params.pretrain.init, weights=False), imported.tokenizer)
    message_limit, pair_limit = lengths.finetuning_limits(params)
    found = {"messages": (lengths.count_messages(messages, imported.tokenizer, message_limit), message_limit)}
    if pair_limit is not None:
        counts = lengths.count_pairs(pairs, encoder, pair_limit)
        found["instructions"] = counts, pair_limit
    cards = {}
    for kind, (counts, limit) in found.items():
        line = lengths.check_lengths(kind, counts, limit, params.tokenize.max_too_long)
        if line is not None:
            logger.warning(line)
            cards[kind] = lengths.lengths_card(counts, limit)
    return cards


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def summary(card: dict[str, Any]) -> list[str]:
    """Return a line on the tokens and one on the finetuning sets, for the terminal."""

    def counts(kind: str, key: str) -> str:
        return ", ".join(f"{values[key]:,} {split}" for split, values in card[kind]["splits"].items())

    finetuning = "; ".join(f"{kind}: {counts(kind, 'records')}" for kind in ("messages", "instructions"))
    size = card["tokenizer"]["vocab_size"]
    return [f"vocabulary of {size:,}; tokens: {counts('corpus', 'tokens')}", finetuning]


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
