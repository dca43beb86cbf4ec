"""`bench scale`: what a larger model will reach, from smaller ones.

Models of growing width, each trained by our recipe on as many tokens for each of its parameters, give bits per byte as
a power of the number of parameters (Kaplan et al. 2020; for models and data that grow together, Hoffmann et al. 2022).
What it says of the next width is told before that one is trained.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from llm.bench.contest import machine, title, versions
from llm.bench.learning import Lesson, Recipe, encode, lesson_of, our_config, parameters, train, training
from llm.common.errors import InputError
from llm.common.sanitize import table
from llm.config import Params, explain
from llm.data.shards import TokenShards

SMALLER = (2, 3, 4, 6)  # eighths of the width: the models that the law is made from
WARMUP = 0.05  # of the steps, which are few for a small model


class Ladder(NamedTuple):
    """Models up to `width`, each trained on `tokens` for each of its parameters."""

    tokens: int
    layers: int
    width: int
    heads: int
    vocab: int
    context: int
    batch: int
    text: str


def ladder_of(params: Params) -> Ladder:
    """Up to the model of the params, on the sample."""
    sizes = lesson_of(params)._asdict()
    return Ladder(tokens=1, **{name: value for name, value in sizes.items() if name in Ladder._fields})


def recipes(ladder: Ladder, params: Params) -> list[Recipe]:
    """Those of the smaller models, then of the largest; all have as many heads."""
    if ladder.width % (16 * ladder.heads):
        raise InputError(f"width {ladder.width} must be a multiple of 16 times heads {ladder.heads}, for its fractions")
    found = []
    for width in (*(ladder.width * eighths // 8 for eighths in SMALLER), ladder.width):
        sizes = ladder._replace(width=width)._asdict()
        del sizes["tokens"]
        lesson = Lesson(steps=1, our_steps=0, **sizes)  # its steps are made of the number of parameters, below
        config = our_config(lesson, params, params.model.ffn_dim * width // params.model.emb_dim)
        steps = math.ceil(ladder.tokens * parameters(config) / (ladder.batch * ladder.context))
        changes = {"max_steps": steps, "warmup_steps": math.ceil(WARMUP * steps), "decay_steps": math.ceil(steps / 2)}
        found.append(Recipe(config, training(params, ladder.batch, changes, evaluations=1)))
    return found


def scale(ladder: Ladder, params: Params, say: Callable[[str], None]) -> dict[str, Any]:
    """All trainings; returns a JSON object with a row for each, the largest last."""
    try:
        models = recipes(ladder, params)
    except ValidationError as error:
        raise InputError(explain(error, "the shape")) from None
    rows: list[dict[str, float]] = []
    exponent = logarithm = math.nan
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        shards = encode(ladder.text, ladder.vocab, params, Path(folder))
        n_tokens = TokenShards(shards, "train").n_tokens
        for recipe in models:
            width, size = recipe.config.emb_dim, parameters(recipe.config)
            if len(rows) == len(SMALLER):
                sizes, losses = ([math.log(row[key]) for row in rows] for key in ("parameters", "bpb"))
                exponent, logarithm = statistics.linear_regression(sizes, losses)
                say(f"width {width}: {law(exponent, logarithm, size):.4f} bits per byte predicted")
            end = train(recipe, shards, params.runtime, params.seed, f"width {width}").curve[-1]
            rows.append({"width": width, "parameters": size, "epochs": end["tokens"] / n_tokens, **end})
            say(f"width {width}: {end['bpb']:.4f} bits per byte in {end['seconds']:,.1f} s")
    return {
        "kind": "scale",
        "shape": ladder._asdict(),
        "machine": machine(),
        "versions": versions(),
        "exponent": exponent,
        "logarithm": logarithm,
        "results": [row | {"law": law(exponent, logarithm, row["parameters"])} for row in rows],
    }


def law(exponent: float, logarithm: float, size: float) -> float:
    """Bits per byte of a model with so many parameters."""
    return math.exp(logarithm + exponent * math.log(size))


# ---- for people ------------------------------------------------------------------------------------------------------


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
    """Bits per byte over parameters, and the law as a line."""
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
