"""A model folder as an MLflow model: the file that MLflow runs to load it ("models from code"), nothing pickled.

MLflow is imported here and nowhere else in `llm`, and only MLflow imports this module.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow.models
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from llm.checkpoint.folder import Checkpoint, load_checkpoint
from llm.inference.classify import classify_texts
from llm.inference.generate import generate
from llm.inference.sampling import Sampling
from llm.model.gpt import GPT
from llm.tokenizer.prompts import encode_prompt, end_tokens


class TextModel(PythonModel):
    """Texts in, one answer for each out: what is written next, or the label. MLflow checks inputs by the type hints."""

    def load_context(self, context: PythonModelContext) -> None:
        self.folder = load_checkpoint(Path(context.artifacts["model"]))

    def predict(
        self, context: PythonModelContext, model_input: list[str], params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """`{"text": ...}` or `{"label": ..., "probabilities": {...}}` for each; `params`: see `continuations`."""
        if self.folder.config.labels is not None:
            return labelled(self.folder, self.folder.config.labels, model_input)
        return [{"text": text} for text in continuations(self.folder, model_input, params or {})]


def labelled(folder: Checkpoint, labels: list[str], texts: list[str]) -> list[dict[str, Any]]:
    answers = []
    for row in classify_texts(folder, texts).tolist():
        answers.append({"label": labels[row.index(max(row))], "probabilities": dict(zip(labels, row, strict=True))})
    return answers


def continuations(folder: Checkpoint, texts: list[str], params: dict[str, Any]) -> list[str]:
    """What a base model writes after each text, or an instruction follower answers to it.

    `params`: max_new_tokens, temperature, top_p and seed; MLflow fills in those that a caller leaves out.
    """
    model, tokenizer, config = folder
    assert isinstance(model, GPT)
    if config.template is None:
        prompts = [tokenizer.encode(text) for text in texts]
    else:
        prompts = [encode_prompt(tokenizer, config.template, text, system=config.system) for text in texts]
    answers = generate(
        model,
        prompts,
        max_new_tokens=params["max_new_tokens"],
        sampling=Sampling(temperature=params["temperature"], top_p=params["top_p"]),
        seed=params["seed"],
        stop=end_tokens(tokenizer, config.template),
    )
    return [tokenizer.decode(ids) for ids in answers]


mlflow.models.set_model(TextModel())
