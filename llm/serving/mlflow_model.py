"""A model folder as an MLflow model: the file that MLflow runs to load it ("models from code"), nothing pickled.

MLflow is imported here and nowhere else in `llm`, and only MLflow imports this module.
"""

from __future__ import annotations

from typing import Any

import mlflow.models
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from llm.api import Prompt, Sampling, load


class TextModel(PythonModel):
    """Texts in, a continuation, answer or label out. MLflow checks inputs by the type hints."""

    def load_context(self, context: PythonModelContext) -> None:
        self.model = load(context.artifacts["model"], device="cpu")

    def predict(
        self, context: PythonModelContext, model_input: list[str], params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Return `{"text": ...}` or `{"label": ..., "probabilities": {...}}` for each text.

        `params` are max_new_tokens, temperature, top_p and seed; MLflow fills in those that a caller leaves out.
        """
        if self.model.kind == "classifier":
            found = self.model.classify(model_input)
            return [{"label": max(row, key=row.__getitem__), "probabilities": row} for row in found]
        given = params or {}
        prompts: list[Prompt] = list(model_input)
        if self.model.kind == "instruct":
            prompts = [[{"role": "user", "content": text}] for text in model_input]
        answers = self.model.generate_batch(
            prompts,
            max_new_tokens=given["max_new_tokens"],
            sampling=Sampling(temperature=given["temperature"], top_p=given["top_p"]),
            seed=given["seed"],
        )
        return [{"text": text} for text in answers]


mlflow.models.set_model(TextModel())
