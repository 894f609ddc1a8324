"""Before every route: keys, sizes, names of hosts. And that logs hold nothing of a request."""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="tessera deploy needs the extra `deploy`")
pytest.importorskip("prometheus_client", reason="tessera deploy needs the extra `deploy`")

from tessera.infer.serve import gate as gates
from tessera.infer.serve.metrics import Summary
from tessera.infer.serve.run import Discreet
from tests.serving import CHAT, Server, ask, call, make_gate


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/v1/nowhere"])
@pytest.mark.parametrize(
    ("sent", "word"), [(None, "no API key was sent"), ("Bearer wrong", "wrong"), ("Basic x", "wrong"), ("Bearer", "no")]
)
def test_everything_needs_the_key(server: Server, path: str, sent: str | None, word: str) -> None:
    gate = make_gate(server.service, api_key="open")
    reply = call(gate, "GET", path, headers={} if sent is None else {"authorization": sent})
    assert reply.status == 401 and reply.headers["www-authenticate"] == "Bearer"
    assert reply.error["code"] == "invalid_api_key" and word in reply.error["message"]


def test_the_key_opens(server: Server) -> None:
    gate = make_gate(server.service, api_key="open")
    for words in ("Bearer open", "bearer  open "):
        assert call(gate, "GET", "/v1/models", headers={"authorization": words}).status == 200
    assert call(gate, "POST", CHAT, ask(), {"authorization": "Bearer open"}).status == 200
    assert call(gate, "POST", CHAT, ask(), {"authorization": "Bearer opens"}).status == 401
    for path in ("/", "/docs", "/health", "/ping"):
        assert call(gate, "GET", path).status == 200


def test_a_key_is_asked_for_before_the_body_is_read(server: Server) -> None:
    gate = make_gate(server.service, api_key="open", max_body=10)
    assert call(gate, "POST", CHAT, b"x" * 100).status == 401


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_is_too_large(server: Server, announced: bool) -> None:
    gate = make_gate(server.service, max_body=1000)
    pieces = [b"x" * 400] * 5
    headers = {"content-length": "2000"} if announced else {}
    reply = call(gate, "POST", CHAT, headers=headers, pieces=pieces)
    assert reply.status == 413 and reply.error["code"] == "request_too_large" and "1000 bytes" in reply.error["message"]
    assert not server.engine.requests


def test_a_body_in_pieces(server: Server) -> None:
    import json

    body = json.dumps(ask("hi")).encode()
    assert call(server.gate, "POST", CHAT, pieces=[body[:5], b"", body[5:]]).status == 200


def test_a_body_that_never_ends(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "BODY_S", 0.05)

    async def main() -> int:
        statuses = []

        async def receive() -> Any:
            await asyncio.sleep(0.02)
            return {"type": "http.request", "body": b"x", "more_body": True}

        async def send(message: Any) -> None:
            statuses.append(message.get("status"))

        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [(b"host", b"localhost")]}
        await server.gate(scope, receive, send)
        return int(statuses[0])

    assert asyncio.run(main()) == 408


@pytest.mark.parametrize(
    ("host", "taken"),
    [
        ("localhost", True),
        ("localhost:8000", True),
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("[::1]", True),
        ("tessera.localhost:1", True),
        ("evil.example", False),
        ("evil.example:8000", False),
        ("localhost.evil.example", False),
        ("", False),
    ],
)
def test_a_local_server_answers_under_local_names_only(server: Server, host: str, taken: bool) -> None:
    """A page of another site can make its own name mean 127.0.0.1, but it cannot change what the browser sends."""
    gate = make_gate(server.service, local=True)
    reply = call(gate, "GET", "/v1/models", headers={"host": host})
    assert reply.status == (200 if taken else 403)
    open_gate = make_gate(server.service, local=True, api_key="k")
    assert call(open_gate, "GET", "/v1/models", headers={"host": host, "authorization": "Bearer k"}).status == 200


def test_a_logged_exception_has_no_text_of_the_request() -> None:
    def broken(prompt: str) -> None:
        raise ValueError(f"cannot read {prompt}")

    try:
        broken("".join(["a sec", "ret question"]))
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "Exception in ASGI application\n", None, sys.exc_info())
    text = Discreet("%(message)s").format(record)
    assert "secret" not in text and "ValueError" in text and "in broken" in text


def test_lines_about_what_went_on(server: Server) -> None:
    summary = Summary(server.service.desk.metrics)
    call(server.gate, "POST", CHAT, ask())
    call(server.gate, "POST", CHAT, ask(model="gpt"))
    assert summary.line(2.0) == "2 requests (1 failed) | 3 running, 0 waiting | 0 tokens/s in, 0 out"
