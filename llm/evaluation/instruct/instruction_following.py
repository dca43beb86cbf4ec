"""Evaluate instruction-tuned models on held-out instructions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from llm.checkpoint.folder import Checkpoint
from llm.config import EvaluateParams, InstructTemplate
from llm.data.batches import batches_by_length, collate_pairs
from llm.data.examples import Pair, first_filled, pair_examples, read_pairs
from llm.evaluation.baselines import nearest_answers
from llm.evaluation.instruct.answer_form import Answer, FormReport, form_report
from llm.evaluation.metrics import AnswerReport, answer_report, by_task
from llm.inference.generate import generate
from llm.model.gpt import GPT
from llm.tokenizer.conversation import ConversationEncoder, as_messages, fit_turns
from llm.tokenizer.prompts import end_tokens
from llm.training.losses import mean_loss, next_token_loss

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class InstructResult(NamedTuple):
    """Results by model: gpt, base (before the finetuning), scratch (the from-scratch baseline), nearest.

    The last one copies the answer of the most similar training pair; it has no loss.
    """

    split: str
    template: InstructTemplate
    reports: dict[str, AnswerReport]
    losses: dict[str, ResponseLoss]
    tasks: dict[str, dict[str, AnswerReport]]
    examples: list[Example]  # all pairs, in the order of the data
    shown: list[int]  # the examples in the report
    turns: TurnsReport | None = None  # of the conversations of several turns, where there are any

    def forms(self) -> dict[str, FormReport]:
        """Return the form of each model's answers."""
        names = self.examples[0].answers if self.examples else {}
        expected, tasks = ([getattr(each.pair, name) for each in self.examples] for name in ("output", "task"))
        return {name: form_report([e.answers[name] for e in self.examples], expected, tasks) for name in names}

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


class TurnsReport(NamedTuple):
    """The last answers of conversations: as they are, and asked without anything that was said before."""

    with_history: AnswerReport
    without_history: AnswerReport
    single: AnswerReport | None  # the pairs that are no conversation, if there are any


class Example(NamedTuple):
    pair: Pair
    answers: dict[str, str]  # by model


def evaluate_instruct(
    folders: Mapping[str, Checkpoint], template: InstructTemplate, instructions: Path, params: EvaluateParams
) -> InstructResult:
    """Evaluate greedy answers of each model in `folders`, `gpt` first, to the same held-out instructions.

    A model with its own template is prompted in that, the others in `template`.
    """
    read = {split: read_pairs(instructions / f"{split}.jsonl") for split in ("test", "val")}
    split, pairs = first_filled(read, instructions)

    def ask(folder: Checkpoint, asked: Sequence[Pair]) -> list[str]:
        return answer(folder, asked, params.max_new_tokens, params.batch_size, template)

    def report(texts: Sequence[str], chosen: Sequence[int]) -> AnswerReport:
        return answer_report([texts[i] for i in chosen], [pairs[i].output for i in chosen])

    answers = {name: ask(folder, pairs) for name, folder in folders.items()}
    turns = [i for i, pair in enumerate(pairs) if is_conversation(pair)]
    alone = [pairs[i]._replace(messages=()) for i in turns]
    single = [i for i, pair in enumerate(pairs) if not is_conversation(pair)]
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
        turns=TurnsReport(
            report(answers["gpt"], turns),
            answer_report(ask(folders["gpt"], alone), [expected[i] for i in turns]),
            report(answers["gpt"], single) if single else None,
        )
        if turns
        else None,
    )


def answer(
    folder: Checkpoint,
    pairs: Sequence[Pair],
    max_new_tokens: int,
    batch_size: int,
    template: InstructTemplate | None = None,
) -> list[str]:
    """Return a model's greedy answers, of a conversation those to its last question.

    The oldest turns are left out where they are too long for the context. `template` is for a base model.
    """
    model, tokenizer, config = folder
    assert isinstance(model, GPT)
    encoder = encoder_of(folder, template)
    budget = max(1, config.gpt.context_length - max_new_tokens)
    prompts = [
        fit_turns(as_messages(pair._asdict())[:-1], partial(encoder.encode, tools=pair.tools), budget)[1]
        for pair in pairs
    ]
    answers = generate(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        stop=end_tokens(tokenizer, encoder.template) | config.stop_ids(tokenizer),
        batch_size=batch_size,
    )
    return [Answer(tokenizer.decode(ids).strip(), len(ids) < max_new_tokens) for ids in answers]


def is_conversation(pair: Pair) -> bool:
    """Return whether a question was answered before the last one."""
    return sum(message["role"] == "assistant" for message in pair.messages) > 1


def encoder_of(folder: Checkpoint, template: InstructTemplate | None) -> ConversationEncoder:
    """Return the encoder of a model's conversations, in `template` where it knows none."""
    config = folder.config
    name = config.template or template
    if name is None or name == "own" or (config.chat_templates is not None and config.kind == "instruct"):
        return config.conversations(folder.tokenizer)
    return ConversationEncoder(folder.tokenizer, name, config.system)


@torch.no_grad()
def response_loss(
    folder: Checkpoint, template: InstructTemplate, pairs: Sequence[Pair], params: EvaluateParams
) -> ResponseLoss:
    """Return the loss on the responses alone, without the part beyond the model's context."""
    model, tokenizer, config = folder
    assert isinstance(model, GPT)
    name = config.template or template
    encoder = config.conversations(tokenizer) if name == "own" else ConversationEncoder(tokenizer, name, config.system)
    examples = pair_examples(pairs, encoder, config.gpt.context_length, loss_on="last")
    responses = [example.ids[example.loss_start + 1 :] for example in examples]
    n_tokens = sum(map(len, responses))
    mean = mean_loss(model, next_token_loss, batches_by_length(examples, collate_pairs, params.batch_size))
    ends = end_tokens(tokenizer, encoder.template) | config.stop_ids(tokenizer)
    texts = [tokenizer.decode([i for i in ids if i not in ends]) for ids in responses]
    return ResponseLoss(mean * n_tokens, n_tokens, sum(map(len, texts)))
