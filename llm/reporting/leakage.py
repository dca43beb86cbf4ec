"""Write the report's section on leaks, and its figures for the metrics file."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from llm.audit.describe import to_markdown
from llm.audit.leakage import Audit
from llm.common.markdown import table
from llm.evaluation.leakage import Clean
from llm.evaluation.metrics import Interval
from llm.reporting.tables import ANSWERERS, CLASSIFIERS, TEXT_MODELS

NAMES = {"corpus": TEXT_MODELS, "messages": CLASSIFIERS, "instructions": ANSWERERS}
HEADLINES = {"corpus": "bits per byte", "messages": "accuracy", "instructions": "exact match"}
METRICS = {"corpus": "bpb", "messages": "accuracy", "instructions": "exact_match"}
SHOWN = 5  # leaked texts of each split


def section(audit: Audit, clean: Sequence[Clean], quotable: Collection[str]) -> list[str]:
    """Return the lines on held-out texts that training has seen, with the headlines without them."""
    lines = ["## Leaks", "", *to_markdown(audit, quotable, SHOWN)]
    if not clean:
        return lines
    lines += ["The headlines on texts that did not leak, and on those among them that are of no template either:", ""]
    rows = [
        [
            f"{HEADLINES[part.name]}, {NAMES[part.name].get(model, model)}",
            f"{part.left:,}",
            _figure(part.clean[model]),
            f"{part.unlike:,}",
            _figure(part.without_templates[model]) if part.unlike else "-",
        ]
        for part in clean
        for model in part.clean
        if part.left
    ]
    return [*lines, *table(["headline", "texts", "without leaks", "texts", "without templates, too"], rows)]


def metrics(audit: Audit, clean: Sequence[Clean]) -> dict[str, Any]:
    """Return the counts of leaks and the headlines without them, nested one level."""
    sections: dict[str, Any] = {f"leaks_{part.name}_{part.split}": part.counts() for part in audit.parts}
    values = {
        METRICS[part.name] + ("" if model == "gpt" else f"_{model}"): figure.value
        if isinstance(figure, Interval)
        else figure
        for part in clean
        for model, figure in part.clean.items()
    }
    return {**sections, "clean": values}


def _figure(figure: Interval | float) -> str:
    if isinstance(figure, Interval):
        return f"{100 * figure.value:.1f} % ({100 * figure.low:.1f}-{100 * figure.high:.1f})"
    return f"{figure:.4f}"
