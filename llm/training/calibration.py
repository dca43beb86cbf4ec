"""Calibration of a classifier on its val part: a temperature, and a threshold for a stated cost or precision.

Shapes: N messages, K labels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm.checkpoint.folder import CheckpointConfig, Decision
from llm.common.errors import InputError
from llm.config import ClassifyParams, DecisionParams
from llm.data.batches import Batch
from llm.model.classifier import GPTClassifier

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

LIMITS = (0.05, 20.0)  # of a temperature
log = logging.getLogger("llm")


@torch.no_grad()
def held_out_logits(model: GPTClassifier, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Return the logits [N, K] and the labels [N] of all batches, on the CPU."""
    device = next(model.parameters()).device
    logits, labels = [], []
    for batch in (batch.to(device) for batch in batches):
        found = model(batch.idx, batch.lengths, batch.cached_hidden, batch.start_layer)
        logits.append(found.double().cpu())
        labels.append(batch.targets.cpu())
    return torch.cat(logits), torch.cat(labels)


def calibrated(config: CheckpointConfig, logits: Tensor, labels: Tensor, params: ClassifyParams) -> CheckpointConfig:
    """Return a classifier's config with the temperature and the decision that its val part asks for."""
    temperature = fit_temperature(logits, labels) if params.calibrate else None
    probabilities = (logits / (temperature or 1.0)).softmax(dim=1).numpy()
    fields = {"temperature": temperature, "unsure_below": params.unsure_below or None}
    decision = choose_decision(probabilities, labels.numpy(), config.labels or [], params.decision)
    return CheckpointConfig.model_validate(dict(config) | fields | {"decision": decision})


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature T of softmax(logits / T) with the lowest loss (Guo et al. 2017).

    The targets are Platt's (1999): the messages of each label count one more of each label, which nobody saw. Without a
    mistake on val, T would else go to 0.
    """
    from scipy.optimize import minimize_scalar

    n, k = logits.shape
    known = torch.nn.functional.one_hot(labels, k).double()  # [N, K]
    targets = (known * (known.sum(dim=0)[labels] + 1)[:, None] + (1 - known)) / (known.sum(dim=0)[labels] + k)[:, None]

    def loss(log_temperature: float) -> float:
        return float(-(targets * (logits / math.exp(log_temperature)).log_softmax(dim=1)).sum() / n)

    found = minimize_scalar(loss, bounds=[math.log(limit) for limit in LIMITS], method="bounded")
    return float(f"{math.exp(found.x):.6g}")


def choose_decision(
    probabilities: Floats, labels: NDArray[np.int64], names: Sequence[str], params: DecisionParams
) -> Decision | None:
    """Return the threshold of one label's probability that the rule asks for; None for the likeliest label."""
    if params.rule == "none":
        return None
    label = names[-1] if params.label is None else params.label
    if label not in names:
        raise InputError(
            f"finetune_classify.decision.label: no label {label!r} (expected one of {', '.join(names)}); correct it"
        )
    k = names.index(label)
    scores, hits = probabilities[:, k], labels == k
    if params.rule == "cost":
        threshold = cheapest_threshold(scores, hits, params.false_alarm_cost, params.miss_cost)
    else:
        threshold = precise_threshold(scores, hits, params.precision)
    return Decision(label=label, threshold=float(f"{threshold:.6g}"))


def _at_thresholds(scores: Floats, hits: Bools) -> tuple[Floats, Floats, Floats]:
    """Return ascending thresholds between the scores, and how many hits and false alarms each lets through."""
    values, places = np.unique(scores, return_inverse=True)
    middles = (values[1:] + values[:-1]) / 2
    thresholds = np.concatenate((values[:1] / 2, middles, (values[-1:] + 1) / 2))

    def above(which: Bools) -> Floats:
        counts = np.bincount(places[which], minlength=len(values))
        return np.concatenate((counts[::-1].cumsum()[::-1], [0])).astype(np.float64)

    return thresholds, above(hits), above(~hits)


def cheapest_threshold(scores: Floats, hits: Bools, false_alarm_cost: float, miss_cost: float) -> float:
    """Return the threshold with the lowest cost on val.

    Of equally cheap ones it is the nearest to the best one of perfect probabilities, which may lie between two scores.
    """
    ideal = false_alarm_cost / (false_alarm_cost + miss_cost)
    thresholds, kept, alarms = _at_thresholds(scores, hits)
    kept_ideal, alarms_ideal = (float((which & (scores >= ideal)).sum()) for which in (hits, ~hits))
    thresholds, kept, alarms = (
        np.append(each, one) for each, one in ((thresholds, ideal), (kept, kept_ideal), (alarms, alarms_ideal))
    )
    costs = false_alarm_cost * alarms + miss_cost * (hits.sum() - kept)
    cheapest = thresholds[costs <= costs.min() * (1 + 1e-12)]
    return float(cheapest[np.abs(cheapest - ideal).argmin()])


def precise_threshold(scores: Floats, hits: Bools, precision: float) -> float:
    """Return the threshold that keeps the most hits at this precision on val; else warn, and take the most precise."""
    thresholds, kept, alarms = _at_thresholds(scores, hits)
    found = np.divide(kept, kept + alarms, out=np.zeros(len(kept)), where=kept > 0)
    good = found >= precision
    if not good.any():
        best = int(found.argmax())
        log.warning(
            "finetune_classify.decision.precision: no threshold reaches %.4g on val (expected at most %.4g); "
            "the one with that precision is kept",
            precision,
            found[best],
        )
        return float(thresholds[best])
    return float(thresholds[np.flatnonzero(good)[kept[good].argmax()]])
