"""Evaluate instruction-tuned models on held-out instructions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from llm.checkpoint.folder import Checkpoint
from llm.config import EvaluateParams, Template
from llm.data.batches import batches_by_length, collate_pairs
from llm.data.examples import Pair, first_filled, pair_examples, read_pairs
from llm.evaluation.baselines import nearest_answers
from llm.evaluation.metrics import AnswerReport, answer_report, by_task
from llm.inference.generate import generate
from llm.model.gpt import GPT
from llm.tokenizer.prompts import encode_prompt, end_tokens, stop_token
from llm.training.losses import mean_loss, next_token_loss

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class InstructResult(NamedTuple):
    """Results by model: gpt, base (before the finetuning), scratch (the from-scratch baseline), nearest.

    The last one copies the answer of the most similar training pair; it has no loss.
    """

    split: str
    template: Template
    reports: dict[str, AnswerReport]
    losses: dict[str, ResponseLoss]
    tasks: dict[str, dict[str, AnswerReport]]
    examples: list[Example]  # all pairs, in the order of the data
    shown: list[int]  # the examples in the report

    def best_alternative(self) -> str:
        """Return what has the highest exact match without this finetuning: the base model or the nearest pair."""
        others = {name: self.reports[name].exact_match.value for name in ("base", "nearest") if name in self.reports}
        return max(others, key=others.__getitem__)


class ResponseLoss(NamedTuple):
    """A model's loss on the expected responses, each with its stop token, in nats.

    The number of tokens depends on the tokenizer, that of characters does not.
    """

    nats: float
    tokens: int
    characters: int

    @property
    def loss(self) -> float:
        return self.nats / self.tokens

    @property
    def loss_per_char(self) -> float:
        return self.nats / max(1, self.characters)


class Example(NamedTuple):
    pair: Pair
    answers: dict[str, str]  # by model


def evaluate_instruct(
    folders: Mapping[str, Checkpoint], template: Template, instructions: Path, params: EvaluateParams
) -> InstructResult:
    """Evaluate greedy answers of each model in `folders`, `gpt` first, to the same held-out instructions.

    A model with its own template is prompted in that, the others in `template`.
    """
    read = {split: read_pairs(instructions / f"{split}.jsonl") for split in ("test", "val")}
    split, pairs = first_filled(read, instructions)
    answers = {name: answer(folder, template, pairs, params) for name, folder in folders.items()}
    if (path := instructions / "train.jsonl").is_file():
        answers["nearest"] = nearest_answers(read_pairs(path), pairs)
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
    """Return a model's greedy answers."""
    model, tokenizer, config = folder
    assert isinstance(model, GPT)
    template = config.template or template
    if config.chat_templates is not None and config.kind == "instruct":
        own = config.conversations(tokenizer)
        prompts = [own.encode([{"role": "user", "content": pair.instruction, "input": pair.input}]) for pair in pairs]
    else:
        prompts = [encode_prompt(tokenizer, template, pair.instruction, pair.input, config.system) for pair in pairs]
    answers = generate(
        model,
        prompts,
        max_new_tokens=params.max_new_tokens,
        stop=end_tokens(tokenizer, template) | config.stop_ids(tokenizer),
        batch_size=params.batch_size,
    )
    return [tokenizer.decode(ids).strip() for ids in answers]


@torch.no_grad()
def response_loss(
    folder: Checkpoint, template: Template, pairs: Sequence[Pair], params: EvaluateParams
) -> ResponseLoss:
    """Return the loss on the responses alone, without the part beyond the model's context."""
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
