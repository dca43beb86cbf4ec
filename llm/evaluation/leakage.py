"""Audit the held-out texts of `data/tokens`, and compute the headlines without those that leaked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from llm.audit.leakage import Audit, audit_sets
from llm.config import HELD_OUT, SPLITS, EvaluateParams
from llm.data.examples import Pair, read_messages, read_pairs
from llm.data.shards import TokenShards, bits_per_byte
from llm.evaluation.base.base_model import BaseResult, text_bytes
from llm.evaluation.classifier.classification import ClassifierResult
from llm.evaluation.instruct.instruction_following import InstructResult
from llm.evaluation.metrics import Interval, exact_matches, wilson
from llm.tokenizer.bpe import Tokenizer


class Clean(NamedTuple):
    """A headline on the part of a test split that did not leak."""

    name: str  # of the set
    split: str
    left: int  # texts that are no leaks
    unlike: int  # and of no template
    clean: dict[str, Interval | float]  # by model: a share with its interval, or bits per byte
    without_templates: dict[str, Interval | float]


def audit_tokens(tokens: Path, tokenizer: Tokenizer, params: EvaluateParams) -> Audit:
    """Audit the held-out corpus, messages and instructions against their training parts and the corpus."""
    shards = {split: TokenShards(tokens / "corpus", split) for split in SPLITS}
    n_train = min(
        shards["train"].n_tokens,
        round(params.audit_bytes * shards["train"].n_tokens / max(shards["train"].n_bytes, 1)),
    )
    corpus = documents(tokenizer, shards["train"], n_train)
    held_out = {split: documents(tokenizer, shards[split], params.test_tokens) for split in HELD_OUT}
    sets: dict[str, Mapping[str, Sequence[str]]] = {"corpus": {"train": corpus, **held_out}}
    messages, instructions = tokens / "messages", tokens / "instructions"
    sets["messages"] = {split: [row.text for row in read_messages(messages / f"{split}.jsonl")] for split in SPLITS}
    sets["instructions"] = {
        split: [asked(row) for row in read_pairs(instructions / f"{split}.jsonl")] for split in SPLITS
    }
    return audit_sets(sets, corpus, most_near=params.audit_texts, corpus_total=shards["train"].n_bytes)


def asked(pair: Pair) -> str:
    """Return what a model is given: an instruction and its input, or a conversation up to its last answer."""
    if not pair.messages:
        return f"{pair.instruction}\n{pair.input}"
    return "\n".join(str(message.get("content")) for message in pair.messages[:-1])


def documents(tokenizer: Tokenizer, shards: TokenShards, most_tokens: int) -> list[str]:
    """Return the first documents of a split; the last one may be cut."""
    found = text_bytes(tokenizer, shards.read(0, min(shards.n_tokens, most_tokens)))
    texts = [document.decode("utf-8", "replace") for document in found]
    return texts if not texts or texts[-1] else texts[:-1]


def clean_headlines(
    audit: Audit, base: BaseResult, classifiers: ClassifierResult, instruct: InstructResult
) -> list[Clean]:
    """Return each headline's figures on the texts that did not leak."""
    sizes = [document.n_bytes for document in base.documents]
    bits = {
        name: [document.nats[name] for document in base.documents]
        for name in (base.documents[0].nats if base.documents else {})
    }

    def bpb(name: str, rows: Sequence[int]) -> float:
        return bits_per_byte(sum(bits[name][i] for i in rows), sum(sizes[i] for i in rows))

    right = {
        name: [said == actual for said, actual in zip(classifiers.predicted(name), classifiers.actual, strict=True)]
        for name in classifiers.probabilities
    }
    expected = [example.pair.output for example in instruct.examples]
    exact = {
        name: exact_matches([example.answers[name] for example in instruct.examples], expected)
        for name in instruct.reports
    }

    def share(hits: Sequence[bool], rows: Sequence[int]) -> Interval:
        return wilson(sum(hits[i] for i in rows), len(rows))

    found = []
    if part := audit.part("corpus", base.split):
        rows, unlike = _rows(part.leaked(), part.templates(), len(sizes))
        found.append(
            Clean(
                "corpus",
                base.split,
                len(rows),
                len(unlike),
                {name: bpb(name, rows) for name in bits},
                {name: bpb(name, unlike) for name in bits},
            )
        )
    for name, split, hits in (("messages", classifiers.split, right), ("instructions", instruct.split, exact)):
        if part := audit.part(name, split):
            rows, unlike = _rows(part.leaked(), part.templates(), len(part.test))
            clean: dict[str, Interval | float] = {model: share(each, rows) for model, each in hits.items()}
            others: dict[str, Interval | float] = {model: share(each, unlike) for model, each in hits.items()}
            found.append(Clean(name, split, len(rows), len(unlike), clean, others))
    return found


def _rows(leaked: set[int], templates: set[int], n: int) -> tuple[list[int], list[int]]:
    """Return the numbers of the texts that did not leak, and of those among them that are of no template."""
    clean = [i for i in range(n) if i not in leaked]
    return clean, [i for i in clean if i not in templates]
