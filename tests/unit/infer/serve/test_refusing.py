"""Whatever is wrong with a request is named, with the right status and in OpenAI's form, and computes nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="tessera deploy needs the extra `deploy`")
pytest.importorskip("prometheus_client", reason="tessera deploy needs the extra `deploy`")

from tessera.infer.engine import Event, Failed, Piece, Request
from tests.serving import CHAT, TEXT, Behave, Reply, Server, ask, call, huge_png, image_part, make_gate, picture


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}, "messages"),
        ({"messages": [{"role": "system", "content": "only"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "<|image_pad|>"}]}, "messages"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 5.5}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": True}, "n"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [""]}, "stop.0"),
        ({"stop": 5}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 6}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"echo": True}, "echo"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"guided_json": {}}, "guided_json"),
        ({"best_of": 2}, "best_of"),
        ({"functions": [{"name": "f"}]}, "functions"),
    ],
)  # fmt: skip
def test_wrong_fields_are_named(server: Server, fields: dict[str, Any], param: str) -> None:
    reply = server.post({**ask(), **fields})
    error = reply.error
    assert reply.status == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    assert not server.engine.requests


def test_fields_that_ask_for_nothing_pass(server: Server) -> None:
    neutral = {
        "logit_bias": {},
        "best_of": 1,
        "echo": False,
        "functions": None,
        "suffix": None,
        "user": "me",
        "store": True,
    }
    reply = server.post(ask(**neutral))
    assert reply.status == 200 and "warning" not in reply.headers


def test_unknown_fields_are_named_in_a_header(server: Server) -> None:
    reply = server.post(
        {"messages": [{"role": "user", "content": "a", "name": "x"}], "foo": 1, "bär\r\nset-cookie: a": 2}
    )
    assert reply.status == 200
    assert reply.headers["warning"] == '299 tessera "ignored: foo, b%C3%A4r%0D%0Aset-cookie%3A a, messages.name"'


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"a"',
        b"\xff\xfe",
        b'{"messages": NaN}',
        b'{"a":' * 100_000,
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_bodies_that_are_no_request(server: Server, body: bytes) -> None:
    for path in (CHAT, TEXT):
        reply = server.post(body, path)
        assert reply.status == 400 and reply.error["message"]


def test_half_a_character_is_refused(server: Server) -> None:
    for text in (
        b'{"messages":[{"role":"user","content":"\\ud800"}]}',
        b'{"messages":[{"role":"user","content":"a"}],"chat_template_kwargs":{"a":"\\ud800"}}',
        b'{"messages":[{"role":"user","content":"a"}],"stop":"\\udfff"}',
    ):
        assert server.post(text).status == 400
    assert server.post(b'{"prompt":"\\ud800"}', TEXT).status == 400


def test_only_json_is_read(server: Server) -> None:
    """A page of another site can send text to this machine, but not JSON."""
    assert server.post(ask(), headers={"content-type": "text/plain"}).status == 400
    assert server.post(b"a=b", headers={"content-type": "application/x-www-form-urlencoded"}).status == 400
    assert not server.engine.requests


def test_an_unknown_model(server: Server) -> None:
    for path, body in ((CHAT, ask(model="gpt")), (TEXT, {"prompt": "a", "model": "gpt"})):
        reply = server.post(body, path)
        assert reply.status == 404 and reply.error["code"] == "model_not_found" and reply.error["param"] == "model"
    assert call(server.gate, "GET", "/v1/models/gpt").status == 404


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ([image_part(b"")], "0 bytes"),
        ([image_part(b"garbage")], "not an image"),
        ([image_part(huge_png(20000, 10000))], "pixels"),
        ([image_part(picture(size=(1, 1)))], "too small"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,%%%"}}], "base64"),
        ([{"type": "image_url", "image_url": "http://127.0.0.1/x.png"}], "could not be fetched"),
        ([{"type": "image", "image": "/etc/passwd"}], "not read"),
        ([image_part()] * 4, "4 images are more than the 3"),
        ([{"type": "image", "image": "data:,"}] * 10_000, "10000 images are more than the 3"),
        ([{"type": "video", "video": ["a"] * 769}], "769 frames"),
        ([{"type": "video", "video": ["a"]}] * 9, "9 videos"),
    ],
)  # fmt: skip
def test_bad_images(server: Server, content: Any, why: str) -> None:
    gate = make_gate(server.service, max_body=32 * 2**20)
    reply = call(gate, "POST", CHAT, ask(content))
    assert reply.status == 400 and why in reply.error["message"], reply.body
    assert str(reply.error["param"]).startswith("messages")
    assert not server.engine.requests


def test_a_prompt_that_is_too_long(server: Server) -> None:
    reply = server.post(ask("word " * 5000))
    assert reply.status == 400 and reply.error["code"] == "context_length_exceeded"
    assert "4096 tokens, the prompt alone has" in reply.error["message"]
    reply = server.post(ask(max_tokens=4090))
    assert (
        reply.status == 400 and reply.error["param"] == "max_tokens" and "asks for 4090 more" in reply.error["message"]
    )


def test_a_full_queue(server: Server) -> None:
    server.engine.room = 1
    assert server.post(ask()).status == 200
    reply = server.post(ask())
    assert reply.status == 429 and reply.headers["retry-after"] == "1" and reply.error["type"] == "rate_limit_error"
    server.engine.room = 2
    reply = server.post({"prompt": ["a", "b"]}, TEXT)
    assert reply.status == 429 and len(server.engine.cancelled) == 1


def failing(bad: bool, after: int) -> Behave:
    def behave(request: Request, listen: Callable[[Event], None]) -> None:
        for _ in range(after):
            listen(Piece(request.id, 0, "a", (1,)))
        listen(Failed(request.id, "the image is torn" if bad else "secret reason", bad))

    return behave


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("bad", [True, False])
def test_a_request_that_fails(server: Server, bad: bool, stream: bool) -> None:
    server.behave(failing(bad, 0))
    reply = server.post(ask(stream=stream))
    assert reply.status == (400 if bad else 500)
    assert reply.error["message"] == ("the image is torn" if bad else "the server failed; its log says why")


def test_a_stream_that_fails_later(server: Server) -> None:
    server.behave(failing(False, 2))
    reply = server.post(ask(stream=True))
    lines = [line for line in reply.body.decode().split("\n\n") if line]
    assert reply.status == 200 and len(lines) == 4 and "secret" not in reply.body.decode()
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["type"] == "server_error"


def test_a_defect_is_a_500_without_its_text(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(server.service.asker, "chat", broken)
    seen: list[Reply] = []
    with pytest.raises(ZeroDivisionError):  # the HTTP library logs it
        seen.append(server.post(ask(), leave=lambda reply: bool(seen.append(reply) or reply.chunks)))
    assert seen[0].status == 500 and b"secret" not in seen[0].body
    assert seen[0].error["message"] == "the server failed; its log says why"


def test_a_dead_engine(server: Server) -> None:
    def dying(request: Request, listen: Callable[[Event], None]) -> None:
        server.engine.failed = "it broke"
        listen(Failed(request.id, "the engine has died: it broke", False))

    server.behave(dying)
    reply = server.post(ask())
    assert reply.status == 503 and reply.error["code"] == "engine_dead"
    assert server.post(ask()).status == 503 and len(server.engine.requests) == 1
    health = call(server.gate, "GET", "/health")
    assert health.status == 503 and health.json == {"status": "dead"}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("busy", [True, False])
def test_a_client_that_leaves_cancels_its_request(server: Server, stream: bool, busy: bool) -> None:
    """Also while tokens come faster than they can be sent."""

    def behave(request: Request, listen: Callable[[Event], None]) -> None:
        deadline = time.monotonic() + 5
        while request.id not in server.engine.cancelled and time.monotonic() < deadline:
            listen(Piece(request.id, 0, "a", (1,)))
            if not busy:
                return
            time.sleep(0.0002)

    server.behave(behave)
    started, begun = time.monotonic(), server.engine.changed.is_set
    server.post(ask(stream=stream), leave=lambda reply: bool(reply.chunks) if stream else begun())
    assert server.engine.cancelled == [server.asked.id]
    assert time.monotonic() - started < 3
    assert server.service.desk.active == 0


def test_draining(server: Server) -> None:
    server.service.desk.draining = True
    reply = server.post(ask())
    assert reply.status == 503 and reply.error["code"] == "shutting_down" and reply.headers["retry-after"]
    assert call(server.gate, "GET", "/health").json == {"status": "draining"}
    assert call(server.gate, "GET", "/v1/models").status == 200
