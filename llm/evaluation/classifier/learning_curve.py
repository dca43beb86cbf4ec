"""Learning curve: accuracy over the number of training messages."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from llm.checkpoint.folder import Checkpoint, CheckpointConfig
from llm.config import ClassifyParams, RuntimeParams
from llm.data.batches import batches_by_length, collate_labels, example_batches
from llm.data.examples import Message, class_weights, message_examples
from llm.evaluation.baselines import classical_classifiers
from llm.evaluation.metrics import Interval, share_interval
from llm.inference.classify import classify_texts
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT
from llm.training.calibration import calibrated, held_out_logits
from llm.training.fit import TrainingTask, fit
from llm.training.freeze import freeze
from llm.training.losses import label_loss, label_metrics

LabelledData = tuple[Sequence[Message], Sequence[Message], Sequence[Message]]  # train, val, test
PARTS = (8, 4, 2)  # of the training messages: an eighth, a quarter, half


class CurvePoint(NamedTuple):
    """Accuracy of one classifier after training on so many messages."""

    classifier: str
    messages: int
    accuracy: Interval


def classical_curve(
    name: str, train: Sequence[Message], val: Sequence[Message], test: Sequence[Message], labels: Sequence[str]
) -> list[CurvePoint]:
    """Return the learning curve of a classical method below the whole training part; each part holds the smaller ones.

    The order of the messages is drawn once, whatever the seed of the trainings.
    """
    points = []
    for some in _parts(train):
        found = classical_classifiers(some, val, [message.text for message in test], labels, {name})
        if name in found:
            predicted = [labels[k] for k in found[name].argmax(axis=1)]
            points.append(CurvePoint(name, len(some), _accuracy(predicted, test)))
    return points


def gpt_curve(
    base: Checkpoint,
    params: ClassifyParams,
    runtime: RuntimeParams,
    seed: int,
    data: LabelledData,
    labels: Sequence[str],
) -> list[CurvePoint]:
    """Return the learning curve of the classifier made from `base`, on the same parts of the training messages.

    Each part trains a model of its own, for as many steps as the whole would.
    """
    train, val, test = data
    points = []
    for some in _parts(train):
        trained = train_classifier(base, some, val, labels, params, runtime, seed)
        probabilities = classify_texts(trained, [message.text for message in test])
        predicted = [labels[k] for k in probabilities.argmax(dim=1).tolist()]
        points.append(CurvePoint("gpt", len(some), _accuracy(predicted, test)))
    return points


def train_classifier(
    base: Checkpoint,
    train: Sequence[Message],
    val: Sequence[Message],
    labels: Sequence[str],
    params: ClassifyParams,
    runtime: RuntimeParams,
    seed: int,
) -> Checkpoint:
    """Finetune a copy of the base into a classifier, as the stage does; keep no state on disk."""
    assert isinstance(base.model, GPT)
    torch.manual_seed(seed)
    gpt = copy.deepcopy(base.model).float()
    length = min(params.max_length, gpt.config.context_length)
    device = gpt.tok_emb.weight.device
    model = GPTClassifier(gpt, len(labels)).to(device)
    freeze(model, params)
    train_set, val_set = (message_examples(part, base.tokenizer, labels, length) for part in (train, val))
    weights = class_weights(train_set, len(labels)).to(device) if params.class_weights == "balanced" else None
    val_batches = partial(batches_by_length, val_set, collate_labels, params.batch_size)
    task = TrainingTask(
        loss_function=partial(label_loss, class_weights=weights),
        batches=example_batches(train_set, collate_labels, params.batch_size, params.grad_accum_steps, seed),
        val_batches=val_batches,
        evaluate=partial(label_metrics, model, class_weights=weights),
        title=f"{len(train):,} messages",
    )
    fit(model, task, params, runtime)
    config = CheckpointConfig(kind="classifier", gpt=gpt.config, labels=list(labels), max_length=length)
    logits = held_out_logits(model.eval(), val_batches())
    return Checkpoint(model, base.tokenizer, calibrated(config, *logits, params))


def _parts(train: Sequence[Message]) -> Iterator[list[Message]]:
    """Yield an eighth, a quarter and half of the messages, in an order that is drawn once; none of a single label."""
    order = np.random.default_rng(0).permutation(len(train))
    for part in PARTS:
        some = [train[i] for i in order[: len(train) // part]]
        if len({message.label for message in some}) > 1:
            yield some


def _accuracy(predicted: Sequence[str], test: Sequence[Message]) -> Interval:
    right = sum(said == message.label for said, message in zip(predicted, test, strict=True))
    return share_interval(right, len(test))
