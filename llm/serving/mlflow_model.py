"""A model folder as an MLflow model: the file that MLflow runs to load it ("models from code"), nothing pickled.

MLflow is imported here and nowhere else in `llm`, and only MLflow imports this module.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlflow.models
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from llm.api import Prompt, Sampling, load
from llm.common.errors import InputError

PIECE = 1024  # rows of a DataFrame that are answered at a time: memory stays flat whatever its length
BATCH = 32  # answers that are decoded together
MESSAGES = "messages"  # column of conversations, in the form of OpenAI's chat completions


class TextModel(PythonModel):
    """Texts in, a continuation, answer or label out; messages in, a chat completion out."""

    def load_context(self, context: PythonModelContext) -> None:
        self.model = load(context.artifacts["model"], device="cpu")

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> Any:
        """Return `{"text": ...}` or `{"label": ..., "probabilities": {...}}` for each row.

        Rows are texts in one column. A column `messages` holds conversations, or is one: `{"messages": [...]}` as in
        OpenAI's chat completions gets one back. `params` are max_new_tokens (also max_tokens), temperature, top_p,
        top_k and seed; MLflow fills in those that a caller leaves out.

        The input has no other type hint on purpose: with `list[str]` MLflow would serve `inputs` alone.
        """
        try:
            if MESSAGES in model_input.columns:
                return self._chat(list(model_input[MESSAGES]), params or {})
            texts = text_column(model_input)
            return [answer for piece in pieces(texts) for answer in self._answer(piece, params or {})]
        except InputError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None

    def _answer(self, texts: Sequence[str], params: Mapping[str, Any]) -> list[dict[str, Any]]:
        if self.model.kind == "classifier":
            found = self.model.classify(texts)
            return [{"label": self.model.decide(row), "probabilities": row} for row in found]
        if self.model.kind == "instruct":
            return [{"text": text} for text in self._generate([[user(text)] for text in texts], params)]
        return [{"text": text} for text in self._generate(list(texts), params)]

    def _chat(self, column: list[Any], params: Mapping[str, Any]) -> Any:
        """Answer conversations: one whose messages are the rows, or one in each row."""
        self.model.require("instruct")
        if column and all(isinstance(message, Mapping) for message in column):
            return completion(self._generate([column], params)[0])
        conversations: list[Prompt] = [list(messages) for messages in column]
        return [completion(text) for piece in pieces(conversations) for text in self._generate(piece, params)]

    def _generate(self, prompts: Sequence[Prompt], params: Mapping[str, Any]) -> list[str]:
        given = {key: value for key, value in params.items() if value is not None}
        limit = given.get("max_tokens", given.get("max_new_tokens"))
        sampling = {key: given[key] for key in ("temperature", "top_p", "top_k") if key in given}
        return self.model.generate_batch(
            prompts,
            sampling=Sampling(**sampling),
            seed=int(given.get("seed", 0)),
            batch_size=BATCH,
            **({} if limit is None else {"max_new_tokens": int(limit)}),
        )


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def text_column(table: pd.DataFrame) -> list[str]:
    """Return the texts of a table: its one column, to which MLflow's schema has cut it."""
    column = table.iloc[:, 0]
    for row, value in enumerate(column):
        if not isinstance(getattr(value, "item", lambda value=value: value)(), str):
            raise InputError(f"input: row {row + 1} is no text (expected a string, got {value!r}); leave it out")
    return [str(value) for value in column]


def pieces(rows: list[Any]) -> Iterator[list[Any]]:
    """Yield the rows in pieces."""
    for first in range(0, len(rows), PIECE):
        yield rows[first : first + PIECE]


def completion(text: str) -> dict[str, Any]:
    """Return an answer in the form of OpenAI's chat completions."""
    message = {"role": "assistant", "content": text}
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "choices": [{"index": 0, "message": message, "finish_reason": None}],
    }


mlflow.models.set_model(TextModel())
