"""The HTTP server: a FastAPI app over the models. FastAPI is an extra, so that it is imported when an app is built."""

# Without `from __future__ import annotations`: FastAPI reads the types of handlers, which are imported in functions.

import base64
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llm.api import GPT_KINDS
from llm.common.errors import InputError
from llm.common.sanitize import error_text, one_line
from llm.serving.answers import RequestLimits, make_answers
from llm.serving.classify import classify
from llm.serving.constraints import constraint_maker
from llm.serving.errors import ApiError, busy
from llm.serving.inspection import embed, inspect_text
from llm.serving.middleware import Gate, Guard
from llm.serving.models import CLASSIFIER, Models, Served
from llm.serving.openai_api import ChatForm, Form
from llm.serving.prompts import chat_ids, text_ids
from llm.serving.schemas import (
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    EmbeddingRequest,
    InspectRequest,
    ReloadRequest,
    TokenizeRequest,
)

PAGE = Path(__file__).parent / "page"
MAX_PROMPTS = 64  # of a completion or an embedding
MAX_WAITING = 64  # requests beside the engines'


@dataclass
class Server:
    """All that handlers share."""

    models: Models
    limits: RequestLimits = field(default_factory=RequestLimits)
    gate: Gate = field(default_factory=Gate)
    origins: Sequence[str] = ()  # that CORS lets read answers
    ready: bool = True
    waiting: int = 0

    async def alone(self, served: Served, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function of a model in a thread, one at a time for each model; `InputError` becomes status 400."""
        from starlette.concurrency import run_in_threadpool

        def run() -> Any:
            with served.lock:
                return function(*args)

        if self.waiting >= MAX_WAITING:
            raise busy()
        self.waiting += 1
        try:
            return await run_in_threadpool(run)
        except InputError as error:
            raise ApiError(400, str(error)) from None
        finally:
            self.waiting -= 1


def build_app(server: Server) -> Any:
    """Return the FastAPI app."""
    from fastapi import FastAPI
    from fastapi.middleware.cors import CORSMiddleware
    from starlette.responses import JSONResponse

    def respond(error: ApiError) -> Any:
        return JSONResponse(error.body(), error.status, error.headers)

    app = FastAPI(
        title="textmill",
        summary="Language models, in OpenAI's API",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan(server),
    )
    add_errors(app, respond)
    add_openai(app, server)
    add_embeddings(app, server)
    add_tools(app, server)
    add_operations(app, server)
    add_page(app)
    app.add_middleware(Guard, gate=server.gate, metrics=server.models.metrics, respond=respond)
    if server.origins:  # outside the guard: a browser asks first, without the key
        app.add_middleware(CORSMiddleware, allow_origins=[*server.origins], allow_methods=["*"], allow_headers=["*"])
    return app


def lifespan(server: Server) -> Callable[[Any], AbstractAsyncContextManager[None]]:
    """Return the context of a running app: at its end, the engines answer what they hold."""

    @asynccontextmanager
    async def context(app: Any) -> Any:
        yield
        server.ready = False
        server.models.close()

    return context


def add_errors(app: Any, respond: Callable[[ApiError], Any]) -> None:
    """Give every error OpenAI's form."""
    from fastapi import Request
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Any:
        return respond(error)

    @app.exception_handler(InputError)
    async def input_error(request: Request, error: InputError) -> Any:
        return respond(ApiError(400, str(error)))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Any:
        return respond(ApiError(error.status_code, one_line(str(error.detail))))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Any:
        found = error.errors()[0]
        where = [str(part) for part in found["loc"] if part != "body"]
        param = one_line(".".join(where))[:200] or None
        return respond(ApiError(400, f"{param or 'body'}: {one_line(str(found['msg']))}", param=param))


def add_openai(app: Any, server: Server) -> None:
    """Add /v1/models, /v1/chat/completions and /v1/completions."""
    from fastapi import Request
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import JSONResponse, StreamingResponse

    async def respond(body: Any, request: Request, served: Served, form: Form, prompts: Sequence[list[int]]) -> Any:
        make = await run_in_threadpool(constraint_maker, served, body.response_format)
        answers = make_answers(served, body, prompts, server.limits, make)
        answers.submit(served)
        if body.stream:
            return StreamingResponse(form.stream(answers), media_type="text/event-stream")
        return JSONResponse(await form.whole(answers, until_disconnect(request)))

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [model_card(each) for each in server.models.served.values()]}

    @app.get("/v1/models/{name}")
    async def one_model(name: str) -> Any:
        return model_card(server.models.get(name))

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Any:
        served = server.models.get(body.model, "instruct")
        keep = (body.max_completion_tokens or body.max_tokens or server.limits.max_tokens) if body.drop_oldest else None
        messages, template = [each.message() for each in body.messages], body.template_options()
        prompt = await run_in_threadpool(chat_ids, served.model, messages, keep, **template)
        return await respond(body, request, served, ChatForm(body, served.model.checkpoint.tokenizer), [prompt])

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Any:
        served = server.models.get(body.model, *GPT_KINDS)
        prompts = await run_in_threadpool(prompt_ids, served, body.prompt)
        tokenizer = served.model.checkpoint.tokenizer
        echoes = []
        if body.echo:
            if body.logprobs is not None:
                raise ApiError(400, "echo: not together with logprobs; leave one out", param="echo")
            texts = [body.prompt] if isinstance(body.prompt, str) else map(tokenizer.decode, prompts)
            echoes = [text for text in texts for _ in range(body.n)]
        return await respond(body, request, served, Form(body, tokenizer, echoes), prompts)


def prompt_ids(served: Served, given: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the tokens of prompts, each given as a text or as its tokens."""
    prompts: list[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise InputError(f"expected 1 to {MAX_PROMPTS} prompts, got {len(prompts)}; send fewer")
    size = served.model.gpt.config.vocab_size
    for prompt in prompts:
        if not isinstance(prompt, str) and not all(0 <= token < size for token in prompt):
            raise InputError(f"a token is not in the vocabulary (expected ids from 0 to {size - 1}); see /tokenize")
        if not prompt:
            raise InputError("a prompt is empty; give some text")
    return [text_ids(served.model, each) if isinstance(each, str) else list(each) for each in prompts]


def model_card(served: Served) -> dict[str, Any]:
    """Return a model's entry in the list of models; `kind` and what follows it are not OpenAI's."""
    config = served.model.checkpoint.config
    size = {"context_length": config.gpt.context_length, "n_layers": config.gpt.n_layers, "n_heads": config.gpt.n_heads}
    card = {"id": served.name, "object": "model", "created": served.created, "owned_by": "textmill"}
    return {**card, "kind": config.kind, **size, **({"labels": config.labels} if config.labels else {})}


async def until_disconnect(request: Any) -> None:
    """Wait until the client leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def add_embeddings(app: Any, server: Server) -> None:
    """Add /v1/embeddings and /v1/classify."""

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest) -> Any:
        served = server.models.get(body.model, *GPT_KINDS)

        def run() -> tuple[list[list[int]], list[list[float]]]:
            prompts = prompt_ids(served, body.input)
            return prompts, [embed(served.model.gpt, ids) for ids in prompts]

        prompts, vectors = await server.alone(served, run)
        data = [
            {"object": "embedding", "index": i, "embedding": encoded(vector, body.encoding_format)}
            for i, vector in enumerate(vectors)
        ]
        n = sum(map(len, prompts))
        return {
            "object": "list",
            "data": data,
            "model": body.model,
            "usage": {"prompt_tokens": n, "total_tokens": n},
        }

    @app.post("/v1/classify")
    async def classification(body: ClassifyRequest) -> Any:
        served = server.models.get(body.model, *CLASSIFIER)
        texts = [body.input] if isinstance(body.input, str) else body.input
        data = await server.alone(served, classify, served.model, texts, body.explain)
        return {"object": "list", "model": body.model, "data": data}


def encoded(vector: Sequence[float], form: str) -> Sequence[float] | str:
    """Return a vector as numbers, or as the bytes of 32-bit floats in base64."""
    return vector if form == "float" else base64.b64encode(np.array(vector, "<f4").tobytes()).decode()


def add_tools(app: Any, server: Server) -> None:
    """Add /tokenize and /v1/inspect."""

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Any:
        served = server.models.get(body.model)
        if (body.text is None) == (body.messages is None):
            raise ApiError(400, "expected one of text and messages", param="text")

        def run() -> Iterator[dict[str, Any]]:
            tokenizer = served.model.checkpoint.tokenizer
            if body.text is not None:
                ids = tokenizer.encode(body.text)
            else:
                ids = chat_ids(served.model, [each.message() for each in body.messages or []])
            return ({"id": token, "text": tokenizer.decode([token])} for token in ids)

        tokens = list(await server.alone(served, run))
        return {"model": body.model, "count": len(tokens), "tokens": tokens}

    @app.post("/v1/inspect")
    async def inspect(body: InspectRequest) -> Any:
        served = server.models.get(body.model, *GPT_KINDS)
        found = await server.alone(served, inspect_text, served.model, body.text, body.layer, body.head, body.top)
        return {"model": body.model, **found}


def add_operations(app: Any, server: Server) -> None:
    """Add /health, /ready, /metrics and /admin/reload."""
    from fastapi import Request
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import JSONResponse, Response

    @app.get("/health")
    async def health() -> Any:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Any:
        return JSONResponse({"ready": server.ready}, 200 if server.ready else 503)

    @app.get("/metrics")
    async def metrics() -> Any:
        text = server.models.metrics.render(server.models.engines)
        return Response(text, media_type="text/plain; version=0.0.4")

    @app.post("/admin/reload")
    async def reload(body: ReloadRequest, request: Request) -> Any:
        """Swap models for what their folders hold now."""
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise ApiError(415, "expected content-type application/json")  # which no foreign page sends without CORS
        try:
            return {"reloaded": await run_in_threadpool(server.models.reload, body.model)}
        except (OSError, RuntimeError) as error:
            raise ApiError(400, f"not reloaded, the models stay as they were: {error_text(error)}") from None


def add_page(app: Any) -> None:
    """Add the page, and the API's description."""
    from starlette.responses import FileResponse
    from starlette.staticfiles import StaticFiles

    @app.get("/", include_in_schema=False)
    async def index() -> Any:
        return FileResponse(PAGE / "index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Any:
        return FileResponse(PAGE / "docs.html")

    app.mount("/page", StaticFiles(directory=PAGE), name="page")
