"""Prompts and defaults of a model: the one place where the server meets templates and history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llm.api import Message, Model, require_question
from llm.inference.sampling import Sampling


def chat_ids(model: Model, messages: Sequence[Message], keep: int | None = None) -> list[int]:
    """Return the tokens of a conversation up to where the answer starts; raise `InputError` where it cannot be.

    With `keep`, the oldest turns are left out where they leave the answer no room for that many tokens.
    """
    if keep is not None:
        return model.fit_messages(messages, max_new_tokens=keep)[1]
    require_question(messages)
    return model.encode_conversation(messages)


def text_ids(model: Model, text: str) -> list[int]:
    """Return the tokens of a text to continue."""
    tokenizer = model.checkpoint.tokenizer
    return [*tokenizer.bos_ids, *tokenizer.encode(text)]


def default_sampling(model: Model) -> Sampling:
    """Return the sampling of requests that name none: the model's own settings, else OpenAI's temperature of 1."""
    own = model.sampling
    return own if model.checkpoint.config.generation is not None else replace(own, temperature=1.0)
