"""OpenAI's chats and completions: their JSON objects and streams."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any

from llm.serving.answers import Answer, Answers, check_finished
from llm.serving.errors import ApiError
from llm.serving.schemas import ChatRequest, CompletionRequest
from llm.serving.text_stream import Piece, TokenInfo
from llm.tokenizer.bpe import Tokenizer


class Form:
    """The form of a completion's answers. A subclass gives that of a chat's."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, body: ChatRequest | CompletionRequest, tokenizer: Tokenizer, echoes: Sequence[str] = ()) -> None:
        """Make the form of one response; `echoes` are the prompts that answers begin with."""
        self.body, self.tokenizer, self.echoes = body, tokenizer, echoes
        self.head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": body.model}
        self.offsets: dict[int, int] = {}

    async def whole(self, answers: Answers, disconnected: Awaitable[Any]) -> dict[str, Any]:
        """Return the whole response."""
        found = await answers.whole(disconnected)
        choices = [self.choice(i, answer) for i, answer in enumerate(found)]
        return {**self.head, "object": self.whole_object, "choices": choices, "usage": answers.usage()}

    async def stream(self, answers: Answers) -> AsyncIterator[str]:
        """Yield the response as server-sent events."""
        options = self.body.stream_options
        wants_usage = options is not None and options.include_usage
        for choice in self.begin(len(answers.generations)):
            yield self.event([choice], wants_usage)
        try:
            async for index, piece in answers.pieces():
                check_finished([piece.finish_reason])
                for choice in self.part(index, piece):
                    yield self.event([choice], wants_usage)
        except ApiError as error:
            yield sse(error.body())
            return
        if wants_usage:
            yield sse({**self.head, "object": self.chunk_object, "choices": [], "usage": answers.usage()})
        yield "data: [DONE]\n\n"

    def event(self, choices: list[dict[str, Any]], wants_usage: bool) -> str:
        usage = {"usage": None} if wants_usage else {}
        return sse({**self.head, "object": self.chunk_object, "choices": choices, **usage})

    def begin(self, n: int) -> list[dict[str, Any]]:
        """Return the choices before the first piece."""
        return [self.text_choice(i, echo, None, None) for i, echo in enumerate(self.echoes)]

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """Return a whole choice."""
        text = self.echoes[index] + answer.text if self.echoes else answer.text
        return self.text_choice(index, text, self.logprobs(index, answer.tokens), answer.finish_reason)

    def part(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """Return the choices of a stream for a piece."""
        return [self.text_choice(index, piece.text, self.logprobs(index, piece.tokens), piece.finish_reason)]

    def text_choice(self, index: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def logprobs(self, index: int, infos: Sequence[TokenInfo]) -> dict[str, Any] | None:
        """Return the log probabilities of tokens, or None where none were asked for."""
        if self.body.logprobs is None:
            return None
        offsets = []
        for info in infos:
            offsets.append(self.offsets.get(index, 0))
            self.offsets[index] = offsets[-1] + len(self.text(info.token))
        return {
            "tokens": [self.text(info.token) for info in infos],
            "token_logprobs": [info.logprob for info in infos],
            "top_logprobs": [{self.text(token): value for token, value in info.top} for info in infos],
            "text_offset": offsets,
        }

    def text(self, token: int) -> str:
        return self.tokenizer.decode([token])


class ChatForm(Form):
    """The form of a chat's answers."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def begin(self, n: int) -> list[dict[str, Any]]:
        start = {"role": "assistant", "content": ""}
        return [{"index": i, "delta": start, "logprobs": None, "finish_reason": None} for i in range(n)]

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        logprobs = self.logprobs(index, answer.tokens)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": answer.finish_reason}

    def part(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        choices = []
        if piece.text or piece.tokens:
            delta, logprobs = {"content": piece.text}, self.logprobs(index, piece.tokens)
            choices.append({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None})
        if piece.finish_reason is not None:
            end: dict[str, Any] = {"index": index, "delta": {}, "logprobs": None}
            choices.append({**end, "finish_reason": piece.finish_reason})
        return choices

    def logprobs(self, index: int, infos: Sequence[TokenInfo]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        content = [
            {**self.token(info.token, info.logprob), "top_logprobs": [self.token(*pair) for pair in info.top]}
            for info in infos
        ]
        return {"content": content, "refusal": None}

    def token(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.tokenizer.decode_bytes([token])
        return {"token": self.text(token), "logprob": logprob, "bytes": list(data)}


def sse(value: Any) -> str:
    """Return a server-sent event of a JSON value."""
    return f"data: {json.dumps(value)}\n\n"
