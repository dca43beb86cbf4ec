"""Speed beside other projects: `python -m llm bench`. Weights are random, and nothing is downloaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm.bench.contest import Contest

KINDS = ("tokenize", "train", "finetune", "generate")
TRAININGS = ("learn", "scale")  # no contests, but one training after another


def contest_of(kind: str) -> Contest[Any]:
    """The contest of one of KINDS, without what the others import."""
    if kind == "tokenize":
        from llm.bench.tokenizing import TOKENIZE

        return TOKENIZE
    if kind == "generate":
        from llm.bench.decoding import GENERATE

        return GENERATE
    from llm.bench.training import FINETUNE, TRAIN

    return {"train": TRAIN, "finetune": FINETUNE}[kind]
