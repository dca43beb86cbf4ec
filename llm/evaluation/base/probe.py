"""Probe base models without any finetuning.

Few-shot classification and question answering by likelihood, calibrated by the same prompt with an empty input (Zhao et
al. 2021); the last word of sentences (cloze); minimal pairs of grammar; bits per byte by position; recited passages.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llm.audit.memorisation import memorised
from llm.checkpoint.folder import Checkpoint
from llm.common.errors import InputError
from llm.data.examples import read_labels, read_messages, read_pairs
from llm.data.shards import TokenShards, bits_per_byte
from llm.evaluation.base.slices import position_nats, position_ranges, token_sizes
from llm.evaluation.comparison import mcnemar, paired_share
from llm.evaluation.leakage import documents
from llm.evaluation.metrics import Interval, wilson
from llm.inference.score import score_continuations
from llm.model.gpt import GPT
from llm.tokenizer.bpe import Tokenizer

SHOTS = (0, 1, 4, 16)
DRAWS = 8  # of examples in front of the questions
CHOICES = 4  # answers to choose from
NUMBERS = "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve"
GRAMMAR: dict[str, tuple[str, Callable[[re.Match[str]], str]]] = {  # where a sentence is spoilt, and how
    "a or an": (r"\b(a|an)(?= [a-z])", lambda m: "an" if m[1] == "a" else "a"),
    "plural behind a number": (rf"\b({NUMBERS}) ([a-z]+)s\b", lambda m: f"{m[1]} {m[2]}"),
    "is or are": (r"\b(is|are)\b", lambda m: "are" if m[1] == "is" else "is"),
    "order of words": (r"\b(the) ([a-z]+)\b", lambda m: f"{m[2]} {m[1]}"),
}


class Question(NamedTuple):
    """A question, the answers to choose from, and the number of the right one."""

    text: str
    choices: list[str]
    right: int


class Shots(NamedTuple):
    """The accuracy behind so many examples, and how many of these the context has room for on average."""

    shots: int
    fitting: float
    accuracy: Interval
    right: list[bool]


def few_shot(model: GPT, tokenizer: Tokenizer, questions: Sequence[Question], pool: Sequence[Question]) -> list[Shots]:
    """Answer each question by the likeliest choice, behind 0 to 16 examples of the pool, calibrated.

    A choice counts by its likelihood behind the question against that behind an empty one. Ties are wrong.
    """
    found, rng = [], random.Random(0)
    for shots in SHOTS:
        draws = [rng.sample(range(len(pool)), min(shots, len(pool))) for _ in range(DRAWS)]
        heads = ["".join(_example(pool[i], pool[i].choices[pool[i].right]) for i in draw) for draw in draws]
        pairs, fitting = [], []
        for number, question in enumerate(questions):
            head = heads[number % DRAWS]
            for text in (question.text, ""):
                prompt = f"{head}{_example(question._replace(text=text), '')}".rstrip()
                context = [tokenizer.eot, *tokenizer.encode(prompt)]
                pairs += [(context, tokenizer.encode(f" {choice}")) for choice in question.choices]
            size = max(len(question) for _, question in pairs[-len(question.choices) :])
            room = model.config.context_length + 1 - size
            cut = max(0, len(context) - room) / len(context)
            fitting.append(shots * (1 - cut))
        scores = iter([-found.nats for found in score_continuations(model, pairs)])
        right = []
        for question in questions:
            asked, empty = ([next(scores) for _ in question.choices] for _ in range(2))
            gains = [a - b for a, b in zip(asked, empty, strict=True)]
            right.append(all(gains[question.right] > g for i, g in enumerate(gains) if i != question.right))
        found.append(Shots(shots, float(np.mean(fitting)), wilson(sum(right), len(right)), right))
    return found


def shots_figures(found: Shots, none: Shots) -> dict[str, float]:
    """Return the figures behind some examples, beside those behind none on the same questions."""
    figures = {"fitting": found.fitting, **found.accuracy._asdict()}
    if found.shots == none.shots:
        return figures
    won, lost = (
        sum(b and not a for a, b in zip(x.right, y.right, strict=True)) for x, y in ((none, found), (found, none))
    )
    gain, low, high = (2 * share - 1 for share in paired_share(won, lost, len(found.right)))
    return {**figures, "gain": gain, "gain_low": low, "gain_high": high, "p_against_0": mcnemar(lost, won)}


def _example(question: Question, answer: str) -> str:
    return f"Question: {question.text}\nAnswer: {answer}\n\n"


def label_questions(tokens: Path, split: str, most: int) -> list[Question]:
    labels = read_labels(tokens / "messages")
    rows = read_messages(tokens / "messages" / f"{split}.jsonl")[:most]
    return [Question(row.text, labels, labels.index(row.label)) for row in rows]


def answer_questions(tokens: Path, split: str, most: int) -> list[Question]:
    """Return instruction pairs, each with other answers to the same task to choose from."""
    rows, rng = read_pairs(tokens / "instructions" / f"{split}.jsonl"), random.Random(0)
    others: dict[str, list[str]] = {}
    for row in rows:
        others.setdefault(row.task, []).append(row.output)
    found = []
    for row in rng.sample(rows, min(most, len(rows))):
        wrong = sorted(set(others[row.task]) - {row.output})
        if len(wrong) >= CHOICES - 1:
            choices = [row.output, *rng.sample(wrong, CHOICES - 1)]
            rng.shuffle(choices)
            found.append(Question(f"{row.instruction} {row.input}".strip(), choices, choices.index(row.output)))
    return found


def minimal_pairs(texts: Sequence[str], most: int) -> dict[str, list[tuple[str, str]]]:
    """Return for each rule of grammar sentences of the texts beside themselves with the rule broken once."""
    sentences = list(dict.fromkeys(s for text in texts for s in re.findall(r"[A-Z][^.!?\n\"]{10,150}[.!?]", text)))
    found: dict[str, list[tuple[str, str]]] = {}
    for rule, (where, spoil) in GRAMMAR.items():
        pairs = [(sentence, re.sub(where, spoil, sentence, count=1)) for sentence in sentences]
        found[rule] = [(good, bad) for good, bad in pairs if good != bad][:most]
    return found


def judge_pairs(model: GPT, tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> Interval:
    """Return how often the right sentence of two is the likelier one; ties are wrong."""
    rows = [([tokenizer.eot], tokenizer.encode(text)) for pair in pairs for text in pair]
    nats = [found.nats for found in score_continuations(model, rows)]
    return wilson(sum(good < bad for good, bad in zip(nats[::2], nats[1::2], strict=True)), len(pairs))


def cloze(model: GPT, tokenizer: Tokenizer, texts: Sequence[str], most: int) -> Interval:
    """Return how often the likeliest tokens behind a text's beginning are the last word of its last sentence."""
    rows = []
    for text in texts:
        if match := re.search(r"^(.+)( \w+)[.!?\"]*\s*$", text, re.DOTALL):
            rows.append(([tokenizer.eot, *tokenizer.encode(match[1])], tokenizer.encode(match[2])))
    found = score_continuations(model, rows[:most])
    return wilson(sum(each.greedy for each in found), len(found))


def bpb_by_position(model: GPT, tokenizer: Tokenizer, shards: TokenShards, most_tokens: int) -> dict[str, float]:
    """Return the bits per byte of held-out tokens by how many stand in front of them in the model's context."""
    ids = shards.read(0, min(shards.n_tokens, most_tokens))
    sizes, (positions, nats) = token_sizes(tokenizer, ids), position_nats(model, ids)
    ranges = position_ranges(positions)
    return {
        name: bits_per_byte(float(nats[inside].sum()), int(sizes[inside].sum()))
        for name, inside in ranges.items()
        if inside.any()
    }


def probe(checkpoint: Checkpoint, tokens: Path, questions: int, passages: int, seed: int) -> dict[str, Any]:
    """Return all figures of one model."""
    model, tokenizer, config = checkpoint
    if not isinstance(model, GPT):
        raise InputError(f"wrong kind of model (expected base or instruct, got {config.kind}); use models/base")
    train, test = (TokenShards(tokens / "corpus", split) for split in ("train", "test"))
    texts = documents(tokenizer, test, 200_000)
    result: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    for name, ask in (("labels", label_questions), ("answers", answer_questions)):
        found = few_shot(model, tokenizer, ask(tokens, "test", questions), ask(tokens, "train", 1000))
        result[name] = {
            "questions": len(found[0].right),
            **{f"shots_{each.shots}": shots_figures(each, found[0]) for each in found},
        }
    result["cloze"] = cloze(model, tokenizer, texts, questions)._asdict()
    pairs = minimal_pairs(texts, questions)
    result["grammar"] = {
        rule: {"pairs": len(of), **judge_pairs(model, tokenizer, of)._asdict()} for rule, of in pairs.items() if of
    }
    result["bpb_by_position"] = bpb_by_position(model, tokenizer, test, 50_000)
    for split, shards in (("train", train), ("test", test)):
        recited = memorised(model, shards, passages, seed)._asdict()
        result[f"recited_{split}"] = {name: value for name, value in recited.items() if name != "longest"}
    return result
