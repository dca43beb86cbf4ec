"""Membership probe of a language model: whether its losses tell the texts of its training from others.

Min-k % (Shi et al. 2023): the mean log probability of the k % least likely tokens of a text. A text that was seen has
fewer surprising tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from llm.checkpoint.folder import Checkpoint
from llm.common.errors import InputError
from llm.evaluation.metrics import Interval
from llm.inference.score import token_nats
from llm.model.gpt import GPT

Floats = NDArray[np.float64]

FEWEST_TOKENS = 10  # scored ones of a text; shorter texts tell too little
FEWEST_TEXTS = 10  # of each side


class Membership(NamedTuple):
    """Area under the ROC curve of training against held-out texts: 0.5 is a guess, 1 tells all of them."""

    share: float  # of the tokens, the least likely ones
    train: int  # texts that were scored
    test: int
    left_out: int  # texts that are too short
    min_k: Interval  # area under the ROC curve
    loss: Interval  # likewise, of the mean over all tokens
    train_tokens: float  # median length
    test_tokens: float


def min_k(nats: Floats, share: float) -> float:
    """Return the mean log probability of a share of a text's tokens, the least likely ones; at least one.

    >>> min_k(np.array([1.0, 4.0, 2.0, 3.0]), 0.5)
    -3.5
    """
    return float(-np.sort(nats)[::-1][: max(1, round(share * len(nats)))].mean())


def membership(
    checkpoint: Checkpoint, train: Sequence[str], test: Sequence[str], share: float, most: int, seed: int
) -> Membership:
    """Score at most `most` texts of each side, drawn at random, and compare the two."""
    model, tokenizer, config = checkpoint
    if not isinstance(model, GPT):
        raise InputError(f"wrong kind of model (expected base or instruct, got {config.kind}); use models/base")
    rng = np.random.default_rng(seed)
    sides, short = [], 0
    for name, texts in (("training", train), ("held-out", test)):
        chosen = [texts[i] for i in sorted(rng.permutation(len(texts))[:most])]
        nats = [token_nats(model, torch.tensor([tokenizer.eot, *tokenizer.encode(text)])) for text in chosen]
        long = [each for each in nats if len(each) >= FEWEST_TOKENS]
        short += len(nats) - len(long)
        if len(long) < FEWEST_TEXTS:
            raise InputError(
                f"min-k: {len(long)} {name} texts have {FEWEST_TOKENS} tokens or more (expected {FEWEST_TEXTS} texts "
                "or more); give more text, or leave --min-k out"
            )
        sides.append(long)
    scores = [np.array([min_k(each, share) for each in side]) for side in sides]
    means = [np.array([-each.mean() for each in side]) for side in sides]
    lengths = [float(np.median([len(each) for each in side])) for side in sides]
    return Membership(share, len(sides[0]), len(sides[1]), short, auc(*scores), auc(*means), *lengths)


def auc(positive: Floats, negative: Floats) -> Interval:
    """Return the chance that a positive score exceeds a negative one, a tie counting half, with its 95 % interval.

    The variance is DeLong's (1988), on the scale of log odds. Where all pairs agree, the other end is by the rule of
    three for the smaller side.
    """
    from scipy.stats import rankdata

    m, n = len(positive), len(negative)
    ranks = rankdata(np.concatenate((positive, negative)))
    above = (ranks[:m] - rankdata(positive)) / n  # of each positive: the share of the negatives below it
    below = 1 - (ranks[m:] - rankdata(negative)) / m
    value = float(above.mean())
    if value in (0.0, 1.0):
        edge = 3 / min(m, n)  # the rule of three
        return Interval(value, max(0.0, value - edge), min(1.0, value + edge))
    error = math.sqrt(float(above.var(ddof=1)) / m + float(below.var(ddof=1)) / n) / (value * (1 - value))
    centre, margin = math.log(value / (1 - value)), 1.959963984540054 * error
    low, high = (1 / (1 + math.exp(-(centre + side))) for side in (-margin, margin))
    return Interval(value, low, high)


def to_dict(found: Membership) -> dict[str, Any]:
    return {**found._asdict(), "min_k": found.min_k._asdict(), "loss": found.loss._asdict()}


def to_markdown(found: Membership) -> list[str]:
    """Return the lines of a report, with what such a probe cannot say."""
    kinds = (f"least likely {100 * found.share:g} % of the tokens", found.min_k), ("all tokens", found.loss)
    told = "; ".join(f"{name} {area.value:.3f} ({area.low:.3f}-{area.high:.3f})" for name, area in kinds)
    if found.min_k.low > 0.5:
        verdict = "Texts of the training are likelier to the model than the held-out ones."
    elif found.min_k.high < 0.5:
        verdict = "Texts of the training are less likely to the model: the two sides are not of one kind."
    else:
        verdict = "The two sides are not told apart. That is no proof that the held-out texts were not trained on."
    lengths = f"median {found.train_tokens:g} and {found.test_tokens:g} tokens"
    short = f", {found.left_out:,} shorter ones left out" if found.left_out else ""
    return [
        f"Membership by the model's own loss, {found.train:,} training and {found.test:,} held-out texts ({lengths}"
        f"{short}). Area under the ROC curve, 0.5 being a guess: {told}. {verdict} The figure is of all "
        "texts together, and means a memory only where both sides are of one kind and time: another topic shows too.",
        "",
    ]
