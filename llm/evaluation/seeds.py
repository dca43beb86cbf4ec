"""Finetunings repeated with other seeds: mean, standard deviation and interval of a headline."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from llm.checkpoint.folder import load_checkpoint
from llm.config import EvaluateParams, InstructTemplate
from llm.data.examples import first_filled, read_labels, read_messages, read_pairs
from llm.evaluation import metrics
from llm.evaluation.instruct.instruction_following import answer
from llm.inference.classify import classify_texts


class Spread(NamedTuple):
    """A figure over seeds. The interval is of its mean over all seeds, not of another test set."""

    values: list[float]  # the first one is that of the model itself
    mean: float
    sd: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Return mean, standard deviation and Student's 95 % interval of the mean of two shares or more.

    The interval ends at 0 and 1: few seeds that differ much would tell of more than all.
    """
    from scipy.stats import t

    n, mean, sd = len(values), float(np.mean(values)), float(np.std(values, ddof=1))
    margin = float(t.ppf(0.975, n - 1)) * sd / math.sqrt(n)
    return Spread(list(values), mean, sd, max(0.0, mean - margin), min(1.0, mean + margin))


def repeated(folder: Path, suffix: str) -> Iterator[Path]:
    """Yield the model folders of further seeds, in order; `suffix` is empty, or that of from-scratch baselines."""
    number = 1
    while (path := folder / f"{number}{suffix}").is_dir():
        yield path
        number += 1


def accuracies(folders: Iterator[Path], messages: Path, batch_size: int, device: torch.device) -> list[float]:
    """Return the accuracy of each classifier on the held-out messages."""
    labels = read_labels(messages)
    _, test = first_filled({split: read_messages(messages / f"{split}.jsonl") for split in ("test", "val")}, messages)
    found = []
    for folder in folders:
        predicted = classify_texts(load_checkpoint(folder, device), [m.text for m in test], batch_size).argmax(dim=1)
        right = sum(labels[k] == message.label for k, message in zip(predicted.tolist(), test, strict=True))
        found.append(right / len(test))
    return found


def exact_matches(
    folders: Iterator[Path],
    template: InstructTemplate,
    instructions: Path,
    params: EvaluateParams,
    device: torch.device,
) -> list[float]:
    """Return the exact match of each model's answers to the held-out instructions."""
    _, pairs = first_filled({s: read_pairs(instructions / f"{s}.jsonl") for s in ("test", "val")}, instructions)
    found = []
    for folder in folders:
        answers = answer(load_checkpoint(folder, device), pairs, params.max_new_tokens, params.batch_size, template)
        found.append(sum(metrics.exact_matches(answers, [pair.output for pair in pairs])) / len(pairs))
    return found


def spreads(first: Mapping[str, float], more: Mapping[str, Sequence[float]]) -> dict[str, Spread]:
    """Return the spread of each headline that further seeds have, beside the value of the model itself."""
    return {name: spread([first[name], *values]) for name, values in more.items() if values and name in first}
