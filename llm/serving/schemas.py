"""Bodies of requests. Unknown fields are refused, as a setting without effect would be a silent error."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from llm.common.errors import InputError
from llm.common.files import parse_json

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


class CalledFunction(Body):
    name: Text
    arguments: str | dict[str, Any]  # OpenAI's form is JSON in a string


class ToolCall(Body):
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class Function(Body):
    name: Text
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool | None = None  # accepted, without effect


class Tool(Body):
    type: Literal["function"]
    function: Function


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None  # accepted, without effect
    tool_calls: Annotated[list[ToolCall], Field(min_length=1, max_length=128)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = Field(None, description="an earlier answer's thoughts; not in OpenAI's API")

    @model_validator(mode="after")
    def _says_something(self) -> ChatMessage:
        if self.content is None and self.tool_calls is None:
            raise ValueError("no content (expected a text)")
        if self.role != "assistant" and not (self.tool_calls is None and self.reasoning_content is None):
            raise ValueError(f"tool_calls and reasoning_content go with the role assistant, found {self.role}")
        return self

    def message(self) -> dict[str, Any]:
        """Return the message as a chat template takes it: its content one text, arguments of calls as objects."""
        parts = self.content
        content = parts if isinstance(parts, str | None) else "".join(part.text for part in parts)
        names = {"tool_call_id", "reasoning_content", "tool_calls"}
        more = self.model_dump(include=names, exclude_none=True)
        for call in more.get("tool_calls", []):
            call["function"]["arguments"] = _arguments(call["function"]["arguments"])
        return {"role": "system" if self.role == "developer" else self.role, "content": content, **more}


class ChatRequest(Decoding):
    messages: list[ChatMessage] = Field(min_length=1, max_length=10_000)
    tools: Annotated[list[Tool], Field(max_length=128)] | None = Field(None, description="for the model's own template")
    tool_choice: Literal["auto", "none"] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=32)] | None = Field(
        None, description="variables of the model's own chat template, such as enable_thinking; not in OpenAI's API"
    )
    max_completion_tokens: int | None = Field(None, ge=1)
    drop_oldest: bool = Field(False, description="leave out turns that do not fit; not in OpenAI's API")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS)
    metadata: dict[str, str] | None = None  # accepted, without effect
    store: bool | None = None  # accepted, without effect

    def template_options(self) -> dict[str, Any]:
        """Return the arguments for the model's own chat template."""
        tools = (
            None if self.tool_choice == "none" else [tool.model_dump(exclude_none=True) for tool in self.tools or []]
        )
        return {"tools": tools or None, "template_kwargs": self.chat_template_kwargs or None}


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


def _arguments(given: str | dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call, which OpenAI's clients send as JSON in a string."""
    try:
        value = parse_json(given) if isinstance(given, str) else given
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise InputError("messages: arguments of a tool call are no JSON object; send them as the model wrote them")
    return value


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
