"""Errors of the API, in OpenAI's form."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """An answer other than 200."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry_after: int = 0
    ) -> None:
        """Make an error; `retry_after` are the seconds after which a client may try again."""
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = {"retry-after": str(retry_after)} if retry_after else {}

    def body(self) -> dict[str, Any]:
        """Return the JSON body. Text that is no valid Unicode is made so."""
        message = self.message.encode("utf-8", "replace").decode()
        return {"error": {"message": message, "type": error_type(self.status), "param": self.param, "code": self.code}}


def error_type(status: int) -> str:
    """Return OpenAI's name for a kind of error."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    return kinds.get(status, "invalid_request_error" if status < 500 else "server_error")


def busy() -> ApiError:
    """Return the error of a full queue."""
    return ApiError(429, "too many requests wait; try again later", code="queue_full", retry_after=1)
