"""Evaluate the three models on held-out data beside their baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from llm.checkpoint.folder import Checkpoint
from llm.common.errors import InputError
from llm.config import EvaluateParams, Template
from llm.data.batches import batches_by_length, collate_pairs
from llm.data.examples import Pair, pair_examples, read_labels, read_messages, read_pairs
from llm.data.shards import TokenShards
from llm.evaluation.baselines import NGram, classical_classifiers, xz_bytes
from llm.evaluation.metrics import (
    AnswerReport,
    ClassificationReport,
    answer_report,
    by_task,
    classification_report,
    roc_points,
)
from llm.inference.classify import classify_texts
from llm.inference.generate import generate
from llm.inference.sampling import GREEDY, Sampling
from llm.inference.score import Score, score_tokens
from llm.model.gpt import GPT
from llm.tokenizer.bpe import Tokenizer
from llm.tokenizer.prompts import encode_prompt, end_tokens, stop_token
from llm.training.losses import mean_loss, next_token_loss

Row = TypeVar("Row")
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


# ---- text ------------------------------------------------------------------------------------------------------------


class Completion(NamedTuple):
    prompt: str
    greedy: str
    sampled: str


class BaseResult(NamedTuple):
    split: str  # the held-out part that was scored: test, or val where there is no test
    n_bytes: int  # of the held-out text in UTF-8, without separators
    train_bytes: int  # of the training text
    baseline_bytes: int  # of it, what the n-gram model and xz read
    parameters: int
    gpt: Score
    ngram: Score
    xz_bytes: int
    completions: list[Completion]

    def bpb(self) -> dict[str, float]:
        return {
            "gpt": self.gpt.bpb(self.n_bytes),
            "ngram": self.ngram.bpb(self.n_bytes),
            "xz": 8 * self.xz_bytes / max(self.n_bytes, 1),
        }


def evaluate_base(folder: Checkpoint, corpus: Path, params: EvaluateParams, seed: int) -> BaseResult:
    """Scores a base model, an n-gram model and xz on the same held-out text, and lets the model complete prompts."""
    model, tokenizer, _ = folder
    assert isinstance(model, GPT)
    train = TokenShards(corpus, "train")
    split, held_out = next(
        ((s, shards) for s in ("test", "val") if (shards := TokenShards(corpus, s)).n_tokens > 1), (None, None)
    )
    if split is None or held_out is None:
        raise InputError(f"{corpus}: neither test nor val holds text to score; raise tokenize.corpus.test")
    n_tokens = min(held_out.n_tokens, params.test_tokens)
    n_train = min(train.n_tokens, round(params.baseline_bytes * train.n_tokens / max(train.n_bytes, 1)))
    held_out_ids, train_ids = held_out.read(0, n_tokens), train.read(0, n_train)
    text, train_text = text_bytes(tokenizer, held_out_ids), text_bytes(tokenizer, train_ids)

    ngram = NGram(train_ids, params.ngram_order, tokenizer.vocab_size)
    return BaseResult(
        split=split,
        n_bytes=sum(map(len, text)),
        train_bytes=train.n_bytes,
        baseline_bytes=sum(map(len, train_text)),
        parameters=sum(p.numel() for p in model.parameters()),
        gpt=score_tokens(model, held_out, max_tokens=n_tokens),
        ngram=Score(float(ngram.nats(held_out_ids).sum()), n_tokens - 1),
        xz_bytes=xz_bytes(b"\0".join(train_text), b"\0".join(text)),
        completions=complete(model, tokenizer, params, seed),
    )


def text_bytes(tokenizer: Tokenizer, ids: Ints) -> list[bytes]:
    """The documents in UTF-8; one that ends in a separator token leaves an empty one behind it."""
    ends = np.flatnonzero(ids == tokenizer.eot)
    documents = np.split(ids, ends + 1)
    return [tokenizer.decode_bytes(document[document != tokenizer.eot].tolist()) for document in documents]


def complete(model: GPT, tokenizer: Tokenizer, params: EvaluateParams, seed: int) -> list[Completion]:
    """What the model makes of the prompts: its likeliest words, and a sample at temperature 0.8."""
    prompts = [tokenizer.encode(prompt) or [tokenizer.eot] for prompt in params.prompts]
    greedy, sampled = (
        generate(
            model, prompts, max_new_tokens=params.max_new_tokens, sampling=sampling, seed=seed, stop=(tokenizer.eot,)
        )
        for sampling in (GREEDY, Sampling(temperature=0.8))
    )
    return [
        Completion(prompt, tokenizer.decode(g), tokenizer.decode(s))
        for prompt, g, s in zip(params.prompts, greedy, sampled, strict=True)
    ]


# ---- messages --------------------------------------------------------------------------------------------------------


class ClassifierResult(NamedTuple):
    """`reports`, `roc` and `probabilities` by classifier: gpt, scratch (random weights), then the classical ones."""

    split: str
    train_rows: int
    labels: list[str]
    reports: dict[str, ClassificationReport]
    roc: dict[str, tuple[Floats, Floats]]
    texts: list[str]
    actual: list[str]
    probabilities: dict[str, Floats]  # [messages, labels]

    def predicted(self, name: str = "gpt") -> list[str]:
        """The label that a classifier gives to each message."""
        return [self.labels[k] for k in self.probabilities[name].argmax(axis=1)]


def evaluate_classifiers(folders: Mapping[str, Checkpoint], messages: Path, batch_size: int) -> ClassifierResult:
    """The classifiers in `folders`, `gpt` first, and the classical ones, all on the same held-out messages."""
    labels = read_labels(messages)
    train, val = read_messages(messages / "train.jsonl"), read_messages(messages / "val.jsonl")
    split, test = first_filled({"test": read_messages(messages / "test.jsonl"), "val": val}, messages)
    texts = [message.text for message in test]
    actual = np.array([labels.index(message.label) for message in test])

    probabilities: dict[str, Floats] = {}
    for name, folder in folders.items():
        if folder.config.labels != labels:
            raise InputError(f"{messages}: has labels {labels}, the classifier {folder.config.labels}; train it again")
        probabilities[name] = classify_texts(folder, texts, batch_size).double().numpy()
    probabilities |= classical_classifiers(train, val, texts, labels)
    reports = {name: classification_report(actual, p, labels) for name, p in probabilities.items()}
    return ClassifierResult(
        split=split,
        train_rows=len(train),
        labels=labels,
        reports=reports,
        roc={name: roc_points(actual, p) for name, p in probabilities.items() if reports[name].roc_auc is not None},
        texts=texts,
        actual=[message.label for message in test],
        probabilities=probabilities,
    )


# ---- instructions ----------------------------------------------------------------------------------------------------


class InstructResult(NamedTuple):
    """`reports` and `tasks` by model: gpt, base (before the finetuning), scratch (random weights)."""

    split: str
    template: Template
    reports: dict[str, AnswerReport]
    losses: dict[str, ResponseLoss]
    tasks: dict[str, dict[str, AnswerReport]]
    examples: list[Example]  # all pairs, in the order of the data
    shown: list[int]  # those of them to read in the report


class ResponseLoss(NamedTuple):
    """What a model pays in nats for the expected responses, each with the token that ends it, given the prompts.

    Tokenizers cut the same responses into other numbers of tokens; the characters are the same for all.
    """

    nats: float
    tokens: int
    characters: int

    @property
    def per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def per_character(self) -> float:
        return self.nats / max(1, self.characters)


class Example(NamedTuple):
    pair: Pair
    answers: dict[str, str]  # by model


def evaluate_instruct(
    folders: Mapping[str, Checkpoint], template: Template, instructions: Path, params: EvaluateParams
) -> InstructResult:
    """Greedy answers of each model in `folders`, `gpt` first, to the same held-out instructions.

    A model that knows a template is prompted in its own; `template` is for the others.
    """
    read = {split: read_pairs(instructions / f"{split}.jsonl") for split in ("test", "val")}
    split, pairs = first_filled(read, instructions)
    answers = {name: answer(folder, template, pairs, params) for name, folder in folders.items()}
    expected, tasks = [pair.output for pair in pairs], [pair.task for pair in pairs]
    by_tasks = sorted(range(len(pairs)), key=lambda i: tasks[i])
    shown = np.linspace(0, len(pairs) - 1, min(params.report_samples, len(pairs))).round().astype(int)
    return InstructResult(
        split=split,
        template=template,
        reports={name: answer_report(texts, expected) for name, texts in answers.items()},
        losses={name: response_loss(folder, template, pairs, params) for name, folder in folders.items()},
        tasks={name: by_task(texts, expected, tasks) for name, texts in answers.items()},
        examples=[Example(pair, {name: texts[i] for name, texts in answers.items()}) for i, pair in enumerate(pairs)],
        shown=[by_tasks[k] for k in shown],
    )


def answer(folder: Checkpoint, template: Template, pairs: Sequence[Pair], params: EvaluateParams) -> list[str]:
    """A model's greedy answers."""
    model, tokenizer, config = folder
    assert isinstance(model, GPT)
    template = config.template or template
    prompts = [encode_prompt(tokenizer, template, pair.instruction, pair.input, config.system) for pair in pairs]
    answers = generate(
        model,
        prompts,
        max_new_tokens=params.max_new_tokens,
        stop=end_tokens(tokenizer, template),
        batch_size=params.batch_size,
    )
    return [tokenizer.decode(ids).strip() for ids in answers]


@torch.no_grad()
def response_loss(
    folder: Checkpoint, template: Template, pairs: Sequence[Pair], params: EvaluateParams
) -> ResponseLoss:
    """The loss on the responses alone; what does not fit into the model's context is left out."""
    model, tokenizer, config = folder
    assert isinstance(model, GPT)
    template = config.template or template
    examples = pair_examples(pairs, tokenizer, template, True, config.gpt.context_length, config.system)
    responses = [example.ids[example.loss_start + 1 :] for example in examples]
    n_tokens = sum(map(len, responses))
    mean = mean_loss(model, next_token_loss, batches_by_length(examples, collate_pairs, params.batch_size))
    end = stop_token(tokenizer, template)
    texts = [tokenizer.decode([i for i in ids if i != end]) for ids in responses]
    return ResponseLoss(mean * n_tokens, n_tokens, sum(map(len, texts)))


def first_filled(splits: Mapping[str, Sequence[Row]], folder: Path) -> tuple[str, Sequence[Row]]:
    """The first split that has rows, with its name."""
    for name, rows in splits.items():
        if rows:
            return name, rows
    raise InputError(f"{folder}: neither {' nor '.join(splits)} holds a row to evaluate on; add data")
