"""Constrained decoding by llguidance: JSON, JSON of a schema, or one of a list of texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from llm.serving.errors import ApiError
from llm.serving.generation import Constraint
from llm.serving.models import Served
from llm.serving.schemas import ResponseFormat
from llm.tokenizer.bpe import Tokenizer

WHITE_SPACE = r" |\n {0,16}"  # in JSON; a weak model would write it without end
_tokenizers: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # llguidance's, by model


def constraint_maker(served: Served, form: ResponseFormat | None) -> Callable[[], Constraint | None]:
    """Return a function that makes a constraint for each answer; raise `ApiError` for a schema that cannot be."""
    if form is None or form.type == "text":
        return lambda: None
    try:
        import llguidance
    except ImportError:
        raise ApiError(400, "response_format: llguidance is not installed; install the extra serve") from None
    grammar = grammar_of(form, llguidance)
    tokenizer = guidance_tokenizer(served)
    if problem := llguidance.LLMatcher.validate_grammar(grammar, tokenizer):
        raise ApiError(400, f"response_format: {' '.join(problem.split())}", param="response_format")
    return lambda: GrammarConstraint(llguidance.LLMatcher(tokenizer, grammar))


def grammar_of(form: ResponseFormat, llguidance: Any) -> str:
    """Return the grammar of an answer's form."""
    if form.type == "choice":
        if not form.choices:
            raise ApiError(400, "response_format.choices: missing; list the texts", param="response_format")
        options = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in form.choices)
        return str(llguidance.grammar_from("lark", f"start: {options}"))
    schema: dict[str, Any] = {"type": "object"}
    if form.type == "json_schema":
        if form.json_schema is None:
            raise ApiError(400, "response_format.json_schema: missing; give a schema", param="response_format")
        schema = form.json_schema.schema_
    return str(llguidance.LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITE_SPACE}))


class GrammarConstraint:
    """A grammar that follows an answer; beyond its end only the end of the text comes."""

    def __init__(self, matcher: Any) -> None:
        self.matcher = matcher

    def mask(self, logits: Tensor) -> Tensor:
        """Return the logits [V] with -inf for tokens that the grammar excludes."""
        allowed = torch.frombuffer(bytearray(self.matcher.compute_bitmask()), dtype=torch.uint8)
        bits = (allowed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1  # [bytes, 8]
        bits = bits.flatten()[: len(logits)].bool().to(logits.device)
        excluded = torch.ones_like(logits, dtype=torch.bool)
        excluded[: len(bits)] = ~bits
        return logits.masked_fill(excluded, -torch.inf)

    def accept(self, token: int) -> bool:
        """Advance by a token; return whether nothing can follow."""
        self.matcher.consume_token(token)
        if self.matcher.is_error():
            raise RuntimeError(f"llguidance: {self.matcher.get_error()}")
        return bool(self.matcher.is_stopped())


def guidance_tokenizer(served: Served) -> Any:
    """Return llguidance's view of a model's tokens; making it takes a moment, and it is kept with the model."""
    if (made := _tokenizers.get(served.model)) is None:
        import llguidance

        tokenizer = served.model.checkpoint.tokenizer
        wrapper = llguidance.TokenizerWrapper(TokenTable(tokenizer, served.model.gpt.config.vocab_size))
        ends = sorted(served.model.stop_ids)
        made = _tokenizers[served.model] = llguidance.LLTokenizer(wrapper, eos_token=ends)
    return made


class TokenTable:
    """A vocabulary in the form that llguidance reads; special tokens cannot be part of an answer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        special = {number: name for name, number in tokenizer.special_tokens.items()}
        self.tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eot, tokenizer.bos
        self.special_token_ids = sorted(special)
        self.tokens = [
            b"\xff" + special[i].encode() if i in special else tokenizer.decode_bytes([i]) for i in range(vocab_size)
        ]

    def __call__(self, text: str | bytes) -> list[int]:
        return self.tokenizer.encode(text if isinstance(text, str) else text.decode())
