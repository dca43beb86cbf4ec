"""From a request's fields to generations, and from their pieces to whole answers."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llm.common.errors import InputError
from llm.serving.engine import ClosedError, QueueFullError
from llm.serving.errors import ApiError, busy
from llm.serving.generation import Choice, Constraint, Generation
from llm.serving.models import Served
from llm.serving.prompts import default_sampling
from llm.serving.schemas import ChatRequest, CompletionRequest, Decoding
from llm.serving.text_stream import Piece, TokenInfo

EXPIRED = "the request waited longer than the server's time limit; try again later"
FAILED = "the server failed on this request; see its log"


@dataclass(frozen=True)
class RequestLimits:
    """Limits of a request."""

    max_tokens: int = 1024  # of an answer
    max_seconds: float = 300.0  # from arrival to the end of the answer


@dataclass
class Answer:
    """The whole answer to a prompt."""

    text: str = ""
    tokens: list[TokenInfo] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish_reason = piece.finish_reason


class Answers:
    """The answers of an engine to one HTTP request: `n` for each prompt, in order, as pieces or whole."""

    def __init__(self, prompts: Sequence[list[int]], n: int) -> None:
        """Wait for pieces in the running event loop."""
        self.prompts, self.n = prompts, n
        self.queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.generations: list[Generation] = []
        self.served: Served | None = None

    def emit(self, index: int) -> Callable[[Piece], None]:
        """Return the function by which the engine's thread hands over the pieces of an answer."""

        def put(piece: Piece) -> None:
            if not self.loop.is_closed():
                self.loop.call_soon_threadsafe(self.queue.put_nowait, (index, piece))

        return put

    def submit(self, served: Served) -> None:
        """Queue the generations at the engine of the model that they were made for."""
        self.served = served
        assert served.engine is not None
        try:
            served.engine.submit(self.generations)
        except (QueueFullError, ClosedError):
            raise busy() from None

    def cancel(self) -> None:
        if self.served is not None and self.served.engine is not None:
            self.served.engine.cancel(self.generations)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yield the pieces of all answers as they come, each with its index. Whoever stops reading cancels the rest."""
        left = len(self.generations)
        try:
            while left:
                index, piece = await self.queue.get()
                left -= piece.finish_reason is not None
                yield index, piece
        finally:
            if left:
                self.cancel()

    async def whole(self, disconnected: Awaitable[Any]) -> list[Answer]:
        """Return all answers; raise `ApiError` where the client left or an answer failed."""
        answers = [Answer() for _ in self.generations]

        async def collect() -> None:
            async for index, piece in self.pieces():
                answers[index].add(piece)

        tasks = [asyncio.ensure_future(collect()), asyncio.ensure_future(disconnected)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                raise ApiError(499, "the client left")
        finally:
            self.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        check_finished(answer.finish_reason for answer in answers)
        return answers

    def usage(self) -> dict[str, Any]:
        """Return the tokens of the prompts and of the answers so far."""
        read, made = sum(map(len, self.prompts)), sum(len(each.answer) for each in self.generations)
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


def check_finished(reasons: Any) -> None:
    """Raise `ApiError` for answers that the server could not give."""
    for reason in reasons:
        if reason == "expired":
            raise ApiError(429, EXPIRED, code="timeout", retry_after=5)
        if reason == "error":
            raise ApiError(500, FAILED, code="internal_error")


def make_answers(
    served: Served,
    body: Decoding,
    prompts: Sequence[list[int]],
    limits: RequestLimits,
    make_constraint: Callable[[], Constraint | None] = lambda: None,
) -> Answers:
    """Return the generations of a request, not yet submitted; prompt i, answer j has seed + i * n + j."""
    answers = Answers(prompts, body.n)
    seed = secrets.randbits(62) if body.seed is None else body.seed % 2**62
    choice = make_choice(served, body, seed)
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    for number, prompt in enumerate(prompt for prompt in prompts for _ in range(body.n)):
        answers.generations.append(
            Generation(
                prompt,
                answer_length(served, body, len(prompt), limits),
                answers.emit(number),
                choice=replace(choice, seed=seed + number),
                stop_ids=served.model.stop_ids,
                stop_texts=stops,
                constraint=make_constraint(),
                deadline=time.monotonic() + limits.max_seconds,
            )
        )
    return answers


def answer_length(served: Served, body: Decoding, prompt: int, limits: RequestLimits) -> int:
    """Return the number of tokens that an answer may have; raise `ApiError` for a prompt that leaves none."""
    wanted = body.max_tokens
    param = "max_tokens"
    if isinstance(body, ChatRequest) and body.max_completion_tokens is not None:
        wanted, param = body.max_completion_tokens, "max_completion_tokens"
    if wanted is None:
        wanted = 16 if isinstance(body, CompletionRequest) else limits.max_tokens
    elif wanted > limits.max_tokens:
        raise ApiError(400, f"{param}: too many (expected at most {limits.max_tokens}, got {wanted})", param=param)
    assert served.engine is not None
    room = min(served.model.gpt.config.context_length, served.engine.limits.cache_tokens) - prompt
    if room < 1:
        name = "messages" if isinstance(body, ChatRequest) else "prompt"
        message = f"{name}: {prompt} tokens (expected at most {prompt + room - 1}, the context without an answer)"
        raise ApiError(400, message, code="context_length_exceeded", param=name)
    return min(wanted, room)


def make_choice(served: Served, body: Decoding, seed: int) -> Choice:
    """Return how tokens are chosen: the request's fields, and the model's defaults for those that it leaves out."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    bias = {}
    for token, value in (body.logit_bias or {}).items():
        if not (token.isascii() and token.isdigit()) or int(token) >= served.model.gpt.config.vocab_size:
            raise ApiError(400, f"logit_bias: no such token (expected an id, got {token[:20]})", param="logit_bias")
        bias[int(token)] = value
    logprobs = body.logprobs if isinstance(body, CompletionRequest) else None
    if isinstance(body, ChatRequest):
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs: goes with logprobs; set logprobs to true", param="top_logprobs")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
    default = default_sampling(served.model)
    if default.temperature == 0 and given.keys() & {"top_p", "top_k", "min_p"}:
        given = {"temperature": 1.0} | given  # a filter has no effect on the likeliest token
    try:
        sampling = replace(default, **given)
    except InputError as error:
        raise ApiError(400, str(error)) from None
    return Choice(sampling, seed, body.presence_penalty or 0.0, body.frequency_penalty or 0.0, bias, logprobs)
