"""Checks before a request reaches its handler: the API key, the size of its body and the time that it takes to come."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from llm.serving.errors import ApiError
from llm.serving.metrics import Metrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

DISCARDED = 2**28  # bytes of a refused body that are read, so that its sender sees the answer
OPEN = ("/", "/health", "/ready", "/docs", "/openapi.json")  # without a key; the page asks for it
HEADERS = {
    b"content-security-policy": b"default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
}


@dataclass(frozen=True)
class Gate:
    """Limits of what comes in."""

    api_key: str | None = None
    max_body: int = 4 * 2**20  # bytes
    body_seconds: float = 30.0  # until a body is here
    hosts: frozenset[str] | None = None  # that a request may be for; None: any


class Guard:
    """ASGI middleware that refuses requests without the key, and bodies that are too large or too slow."""

    def __init__(self, app: App, gate: Gate, metrics: Metrics, respond: Callable[[ApiError], App]) -> None:
        """Wrap an app; `respond` turns an error into a response."""
        self.app, self.gate, self.metrics, self.respond = app, gate, metrics, respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])

        async def counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                self.metrics.requests.labels(route, str(message["status"])).inc()
                message["headers"] = [*message.get("headers", []), *HEADERS.items()]
            await send(message)

        try:
            self.check_host(headers)
            self.check_key(scope["path"], headers)
            body = await self.read(headers, receive)
        except ApiError as error:
            return await self.respond(error)(scope, receive, counted)
        sent = False

        async def replay() -> MutableMapping[str, Any]:
            nonlocal sent
            if sent:
                return await receive()  # only the end of the connection can come
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        return await self.app(scope, replay, counted)

    def check_host(self, headers: MutableMapping[bytes, bytes]) -> None:
        """Raise `ApiError` for another host's name, by which a foreign page reaches a local server (DNS rebinding)."""
        if self.gate.hosts is None:
            return
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
        if name not in self.gate.hosts:
            known = ", ".join(sorted(self.gate.hosts))
            raise ApiError(403, f"Host: a foreign name (expected {known}); ask for one of these, or serve with --host")

    def check_key(self, path: str, headers: MutableMapping[bytes, bytes]) -> None:
        """Raise `ApiError` unless the request has the API key; the time it takes tells nothing about the key."""
        if self.gate.api_key is None or path in OPEN or path.startswith("/page/"):
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self.gate.api_key.encode()):
            raise ApiError(401, "API key: missing or wrong; send it as a bearer token", code="invalid_api_key")

    async def read(self, headers: MutableMapping[bytes, bytes], receive: Receive) -> bytes:
        """Return the whole body; raise `ApiError` for one that is too large, too slow or not finished."""
        declared = headers.get(b"content-length", b"0")
        too_large = declared.isdigit() and int(declared) > self.gate.max_body
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.gate.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise ApiError(400, "the client left before the end of the body")
                    part = message.get("body", b"")
                    size += len(part)
                    too_large = too_large or size > self.gate.max_body
                    if too_large:
                        parts.clear()
                    else:
                        parts.append(part)
                    if not message.get("more_body") or size > DISCARDED:
                        break
        except TimeoutError:
            raise ApiError(408, f"the body took longer than {self.gate.body_seconds:g} seconds") from None
        if too_large:
            raise ApiError(413, f"the body is too large (expected at most {self.gate.max_body:,} bytes)")
        return b"".join(parts)
