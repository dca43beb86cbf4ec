"""Bodies of requests. Unknown fields are refused, as a setting without effect would be a silent error."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

TOP_LOGPROBS = 20
SURROGATES = re.compile("[\ud800-\udfff]")
Text = Annotated[str, Field(min_length=1)]


class Body(BaseModel):
    """A JSON object with known fields and finite numbers."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _is_unicode(cls, value: Any) -> Any:
        """Refuse half surrogates, which JSON can hold and UTF-8 cannot."""
        if any(isinstance(text, str) and SURROGATES.search(text) for text in _leaves(value)):
            raise ValueError("not valid Unicode: half of a surrogate pair")
        return value


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False  # accepted, without effect


class JSONSchema(Body):
    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None  # a schema always holds here


class ResponseFormat(Body):
    """The form of an answer: any text, any JSON object, JSON of a schema, or one of a list of choices."""

    type: Literal["text", "json_object", "json_schema", "choice"] = "text"
    json_schema: JSONSchema | None = None
    choices: Annotated[list[Text], Field(min_length=1, max_length=1000)] | None = None


class Decoding(Body):
    """Fields that chats and completions share; names and ranges are OpenAI's where it has them."""

    model: str
    n: int = Field(1, ge=1, le=16)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    max_tokens: int | None = Field(None, ge=1)
    response_format: ResponseFormat | None = None
    user: str | None = None  # accepted, without effect
    top_k: int | None = Field(None, ge=1, description="not in OpenAI's API")
    min_p: float | None = Field(None, ge=0, le=1, description="not in OpenAI's API")
    repetition_penalty: float | None = Field(None, gt=0, le=100, description="not in OpenAI's API")


class TextPart(Body):
    type: Literal["text"]
    text: str


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]
    name: str | None = None  # accepted, without effect

    def message(self) -> dict[str, str]:
        """Return the message with its content as one text."""
        parts = self.content
        content = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(Decoding):
    messages: list[ChatMessage] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: int | None = Field(None, ge=1)
    drop_oldest: bool = Field(False, description="leave out turns that do not fit; not in OpenAI's API")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS)
    metadata: dict[str, str] | None = None  # accepted, without effect
    store: bool | None = None  # accepted, without effect


class CompletionRequest(Decoding):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS)
    echo: bool = False


class EmbeddingRequest(Body):
    model: str
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None  # accepted, without effect


class ClassifyRequest(Body):
    model: str
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=256)]
    explain: bool = Field(False, description="also return each word's effect on the label's probability")


class TokenizeRequest(Body):
    model: str
    text: str | None = None
    messages: list[ChatMessage] | None = None


class InspectRequest(Body):
    model: str
    text: Text
    layer: int = Field(0, ge=0)
    head: int = Field(0, ge=0)
    top: int = Field(5, ge=1, le=TOP_LOGPROBS)


class ReloadRequest(Body):
    model: str | None = Field(None, description="a model's name; all models without it")


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the values in lists and objects of JSON, and the objects' keys."""
    ahead = [value]
    while ahead:
        here = ahead.pop()
        if isinstance(here, dict):
            ahead += [*here, *here.values()]
        elif isinstance(here, list):
            ahead += here
        else:
            yield here
