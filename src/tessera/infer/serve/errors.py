"""What goes wrong, told as OpenAI's API tells it.

Every failure a client sees is one JSON object; its status says whose turn it is::

    400 the request is wrong    401 the key    404 no such model or page    413 the body is too large
    429 come back later         500 a defect of this program                503 it is ending, or its engine died

    {"error": {"message": "...", "type": "invalid_request_error", "param": "messages.0.content", "code": null}}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TYPES: Mapping[int, str] = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(Exception):
    """A request that is not answered: HTTP ``status``, the sentence for the client, and which parameter it is about.

    ``code`` is a word for programs; ``headers`` go with the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object of the response."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request cannot be answered as it is."""
    return ApiError(400, message, param, code)


def internal() -> ApiError:
    """500, which says nothing about why: that is in the server's own log."""
    return ApiError(500, "the server failed; its log says why", code="internal_error")


def full() -> ApiError:
    """429: the queue is full."""
    return ApiError(429, "too many requests are waiting; try again", code="queue_full", headers={"Retry-After": "1"})


def ending() -> ApiError:
    """503: the server finishes what it has and takes nothing new."""
    headers = {"Retry-After": "5", "Connection": "close"}
    return ApiError(503, "the server is shutting down", code="shutting_down", headers=headers)


def dead() -> ApiError:
    """503: the engine is gone for good."""
    return ApiError(503, "the engine has stopped; the server must be restarted", code="engine_dead")
