"""`bench scale`: the loss of a larger model, predicted from smaller ones.

Models of growing width are trained by our recipe, each on as many tokens for each of its parameters. Their bits per
byte follow a power of the number of parameters (Kaplan et al. 2020; for models and data that grow together, Hoffmann et
al. 2022). The prediction for the next width is told before that one is trained.
"""

from __future__ import annotations

import logging
import math
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from llm.bench import learning
from llm.bench.harness import machine, title, versions
from llm.bench.learning import Recipe, TimeToLoss, encode, n_parameters, our_config, train, training_params
from llm.common.errors import InputError
from llm.common.markdown import table
from llm.config import Params, explain
from llm.data.shards import TokenShards

SMALLER = (2, 3, 4, 6)  # eighths of the width: the models that the law is made from
WARMUP = 0.05  # of the steps, which are few for a small model

log = logging.getLogger("llm")


class ScalingSizes(NamedTuple):
    """The sizes of the largest model; each is trained on `tokens` for each of its parameters."""

    tokens: int
    layers: int
    width: int
    heads: int
    vocab: int
    context: int
    batch: int
    text: str


def default_sizes(params: Params) -> ScalingSizes:
    """Return the sizes of the params, on the sample."""
    sizes = learning.default_sizes(params)._asdict()
    return ScalingSizes(tokens=1, **{name: value for name, value in sizes.items() if name in ScalingSizes._fields})


def recipes(sizes: ScalingSizes, params: Params) -> list[Recipe]:
    """Return the recipes of the smaller models, then of the largest; all have as many heads."""
    if sizes.width % (16 * sizes.heads):
        raise InputError(f"width {sizes.width} must be a multiple of 16 times heads {sizes.heads}, for its fractions")
    found = []
    for width in (*(sizes.width * eighths // 8 for eighths in SMALLER), sizes.width):
        shape = sizes._replace(width=width)._asdict()
        del shape["tokens"]
        model = TimeToLoss(steps=1, our_steps=0, **shape)  # the steps follow from the number of parameters, below
        config = our_config(model, params, params.model.ffn_dim * width // params.model.emb_dim)
        steps = math.ceil(sizes.tokens * n_parameters(config) / (sizes.batch * sizes.context))
        changes = {"max_steps": steps, "warmup_steps": math.ceil(WARMUP * steps), "decay_steps": math.ceil(steps / 2)}
        found.append(Recipe(config, training_params(params, sizes.batch, changes, evaluations=1)))
    return found


def scale(sizes: ScalingSizes, params: Params) -> dict[str, Any]:
    """Run all trainings; return a JSON object with a row for each, the largest last."""
    try:
        models = recipes(sizes, params)
    except ValidationError as error:
        raise InputError(explain(error, "the shape")) from None
    rows: list[dict[str, float]] = []
    exponent = logarithm = math.nan
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        shards = encode(sizes.text, sizes.vocab, params, Path(folder))
        n_tokens = TokenShards(shards, "train").n_tokens
        for recipe in models:
            width, size = recipe.config.emb_dim, n_parameters(recipe.config)
            if len(rows) == len(SMALLER):
                logs = ([math.log(row[key]) for row in rows] for key in ("parameters", "bpb"))
                exponent, logarithm = statistics.linear_regression(*logs)
                log.info(f"width {width}: {law(exponent, logarithm, size):.4f} bits per byte predicted")
            end = train(recipe, shards, params.runtime, params.seed, f"width {width}").curve[-1]
            rows.append({"width": width, "parameters": size, "epochs": end["tokens"] / n_tokens, **end})
            log.info(f"width {width}: {end['bpb']:.4f} bits per byte in {end['seconds']:,.1f} s")
    return {
        "kind": "scale",
        "shape": sizes._asdict(),
        "machine": machine(),
        "versions": versions(),
        "exponent": exponent,
        "logarithm": logarithm,
        "results": [row | {"law": law(exponent, logarithm, row["parameters"])} for row in rows],
    }


def law(exponent: float, logarithm: float, size: float) -> float:
    """Return the bits per byte that the law predicts for a number of parameters."""
    return math.exp(logarithm + exponent * math.log(size))


# ---- the report ------------------------------------------------------------------------------------------------------


def markdown(found: Mapping[str, Any]) -> str:
    header = ["width", "parameters", "tokens", "epochs", "seconds", "bits per byte", "the law says"]
    rows = [
        [
            f"{row['width']:,}",
            f"{row['parameters']:,}",
            f"{row['tokens']:,}",
            f"{row['epochs']:.2f}",
            f"{row['seconds']:,.1f}",
            f"{row['bpb']:.4f}",
            f"{row['law']:.4f}",
        ]
        for row in found["results"]
    ]
    last = found["results"][-1]
    missed = 100 * (last["bpb"] / last["law"] - 1)
    said = (
        f"Bits per byte go with the number of parameters to the power of {found['exponent']:.3f}, by all but the last "
        f"model; of that one, {last['law']:.4f} was said before it was trained: what it reached is {missed:+.1f} % off."
    )
    if last["epochs"] > 1:
        said += f" It read the text {last['epochs']:.1f} times, and what is read again teaches less: take a longer one."
    return "\n".join([title(found), "", *table(header, rows), said]) + "\n"


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draw bits per byte over parameters, and the law as a line."""
    from matplotlib.figure import Figure

    *smaller, last = found["results"]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.loglog([row["parameters"] for row in smaller], [row["bpb"] for row in smaller], "o", label="trained")
    axes.loglog([last["parameters"]], [last["bpb"]], "s", label="trained after the prediction")
    sizes = [row["parameters"] for row in found["results"]]
    axes.loglog(sizes, [row["law"] for row in found["results"]], "-", color="0.6", label="the law of the smaller ones")
    axes.set_xlabel("parameters")
    axes.set_ylabel("bits per byte of val")
    axes.legend()
    figure.savefig(path, dpi=120)
