"""What stands before every route: the key, the size of a body, who may call, and what is counted.

It works on raw ASGI messages, before anything is parsed. A body is read here, whole, up to its limit: whether its
length was announced or it comes in chunks of unknown number, nothing behind the gate sees a longer one. Whatever is
refused is refused as OpenAI-shaped JSON.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from tessera.infer.serve.desk import Desk
from tessera.infer.serve.errors import ApiError

Message = Mapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Any, Receive, Send], Awaitable[None]]

OPEN = frozenset({"/", "/docs", "/health", "/ping"})
"""What needs no key: pages that hold nothing but themselves, and whether the server lives."""

ROUTES = frozenset({*OPEN, "/v1/models", "/v1/chat/completions", "/v1/completions", "/metrics", "/openapi.json"})
BODY_S = 60.0
"""How long a client may take to send its request."""

_LINGER_S = 5.0


class Gate:
    """Wraps ``app``. ``local``: without a key, only requests that name this machine by address are taken."""

    def __init__(self, app: App, desk: Desk, *, api_key: str | None, max_body: int, local: bool) -> None:
        self._app = app
        self._desk = desk
        self._key = None if api_key is None else api_key.encode()
        self._max_body = max_body
        self._local = local

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """One connection's request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 499  # 499: the client left before it was answered
        path = scope["path"]
        route = path if path in ROUTES else "/v1/models" if path.startswith("/v1/models/") else "other"
        headers = {name.lower(): value for name, value in scope["headers"]}

        async def watched(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                self._allow(path, headers)
                if scope["method"] == "POST" and path.startswith("/v1/"):
                    self._desk.admit()
                body = await self._body(headers, receive)
            except ApiError as error:
                await respond(watched, error)
                return
            if body is not None:
                with self._desk.busy():
                    await self._app(scope, _replay(body, receive), watched)
        finally:
            self._desk.metrics.count(route, status, time.perf_counter() - started)

    def _allow(self, path: str, headers: Mapping[bytes, bytes]) -> None:
        """401 without the right key; 403 for a page of another site that was made to resolve to this machine."""
        if self._key is None:
            if self._local and not _names_an_address(headers.get(b"host", b"").decode("latin-1")):
                raise ApiError(
                    403,
                    "this server answers only under its address or as localhost; --api_key opens it to other names",
                    code="host_not_allowed",
                )
            return
        if path in OPEN:
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
            word = "no API key was sent" if not given else "the API key is wrong"
            challenge = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, f"{word} (Authorization: Bearer ...)", code="invalid_api_key", headers=challenge)

    async def _body(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes | None:
        """The whole body; 413 if it is too large, 408 if it takes too long, None if the client left."""
        announced = headers.get(b"content-length", b"0")
        too_long = announced.isdigit() and int(announced[:20]) > self._max_body
        try:
            if not too_long:
                chunks = await asyncio.wait_for(_collected(receive, self._max_body), BODY_S)
                if chunks is None or isinstance(chunks, bytes):
                    return chunks
                too_long = True
            # What is still on its way is read and dropped, so that the client gets to read the answer.
            await asyncio.wait_for(_collected(receive, 4 * self._max_body, keep=False), _LINGER_S)
        except asyncio.TimeoutError:
            if not too_long:
                raise ApiError(408, f"the request took longer than {BODY_S:g} s to arrive") from None
        raise ApiError(
            413, f"the request is larger than {self._max_body} bytes", code="request_too_large",
            headers={"Connection": "close"},
        )  # fmt: skip


async def _collected(receive: Receive, limit: int, keep: bool = True) -> bytes | bool | None:
    """The body; True if it is longer than ``limit``, False if it was not to be kept, None if the client left."""
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            return True
        if keep:
            chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks) if keep else False


def _replay(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives ``body`` at once, and then what else comes: the news that the client has left."""
    given = False

    async def again() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def respond(send: Send, error: ApiError) -> None:
    """Send ``error`` as a whole response."""
    body = json.dumps(error.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _names_an_address(host: str) -> bool:
    """Whether a Host header is an address or localhost, with or without a port."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and not host.endswith("]") else host
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
