"""Prompts and defaults of a model: the one place where the server meets templates and history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llm.api import Message, Model, require_question
from llm.common.errors import InputError
from llm.common.sanitize import one_line
from llm.inference.sampling import Sampling


def chat_ids(model: Model, messages: Sequence[Message], keep: int | None = None, **template: Any) -> list[int]:
    """Return the tokens of a conversation up to where the answer starts; raise `InputError` where it cannot be.

    With `keep`, the oldest turns are left out where they leave the answer no room for that many tokens. `template` are
    tools and template_kwargs for the model's own chat template. A variable that it does not have is refused.
    """
    for name in template.get("template_kwargs") or ():
        if not model.has_template_variable(name):
            raise InputError(
                f"chat_template_kwargs: the model's chat template has no {one_line(name)[:40]!r}; leave it out"
            )
    if keep is not None:
        return model.fit_messages(messages, max_new_tokens=keep, **template)[1]
    require_question(messages)
    return model.encode_conversation(messages, **template)


def text_ids(model: Model, text: str) -> list[int]:
    """Return the tokens of a text to continue."""
    tokenizer = model.checkpoint.tokenizer
    return [*tokenizer.bos_ids, *tokenizer.encode(text)]


def default_sampling(model: Model) -> Sampling:
    """Return the sampling of requests that name none: the model's own settings, else OpenAI's temperature of 1."""
    own = model.sampling
    return own if model.checkpoint.config.generation is not None else replace(own, temperature=1.0)
