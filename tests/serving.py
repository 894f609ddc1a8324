"""A server without a model: an engine that says what a test wants, and a client that speaks to the app directly."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from tessera.data.encode import Encoder
from tessera.data.render import Renderer
from tessera.infer.engine import EngineStats, Event, Finished, Full, Piece, Request, Sampling, Ticket
from tests.toys import make_geometry, make_tokenizer_dir

Behave = Callable[[Request, Callable[[Event], None]], None]


def says(*pieces: str, reason: str = "stop") -> Behave:
    """Answer every choice with these pieces, one token each."""

    def behave(request: Request, listen: Callable[[Event], None]) -> None:
        prompt = len(request.question.encoded.tokens)
        for choice in range(request.n):
            for piece in pieces if request.stream else ["".join(pieces)]:
                listen(Piece(request.id, choice, piece, (7,)))
            listen(Finished(request.id, choice, reason, prompt, len(pieces), 0))

    return behave


def silent(request: Request, listen: Callable[[Event], None]) -> None:
    """Never answer."""


def make_encoder(directory: Path, template: str | None = None) -> Encoder:
    """What turns rows into prompts, with the toy tokenizer."""
    geometry = make_geometry()
    return Encoder(Renderer(make_tokenizer_dir(directory, template=template), geometry), geometry)


class FakeEngine:
    """Has the engine's interface; ``behave`` is called in a thread of its own with each request and its listener."""

    def __init__(self, encoder: Encoder, behave: Behave = silent, *, room: int = 100) -> None:
        self.session: Any = SimpleNamespace(encoder=encoder)
        self.failed: str | None = None
        self.adapters: tuple[str, ...] = ()
        self.behave = behave
        self.room = room
        self.requests: list[Request] = []
        self.cancelled: list[str] = []
        self.changed = threading.Event()

    def submit(self, request: Request, listen: Callable[[Event], None]) -> Ticket:
        """Queue a request."""
        if len(self.requests) >= self.room:
            raise Full
        self.requests.append(request)
        threading.Thread(target=self.behave, args=(request, listen), daemon=True).start()
        self.changed.set()
        return Ticket(request.id, self.cancelled.append)

    def stats(self) -> EngineStats:
        """Nothing of interest."""
        return EngineStats(running=3, prompt_tokens=10, cached_tokens=4, finished={"stop": 2})

    def close(self, drain: bool = True, timeout: float | None = None) -> bool:
        """Nothing to close."""
        return True


def make_service(engine: FakeEngine, **changes: Any) -> Any:
    """The service of ``engine``: two models, the second with an adapter."""
    from tessera.infer.serve.answers import Vocabulary
    from tessera.infer.serve.app import Served, Service
    from tessera.infer.serve.asking import Asker
    from tessera.infer.serve.desk import Desk
    from tessera.infer.serve.fetch import Fetcher
    from tessera.infer.serve.media import Library, MediaLimits
    from tessera.infer.serve.metrics import Metrics

    renderer = engine.session.encoder.renderer
    context = changes.pop("context", 4096)
    directory = changes.pop("directory", None)
    given: dict[str, Any] = {
        "models": {"tiny": None, "other": "other"},
        "root": "/models/tiny",
        "created": 1,
        "sampling": lambda said: Sampling(**said),
        "max_new_tokens": None,
        "open_ended": 2048,
        "max_logprobs": 5,
        "vocabulary": Vocabulary(renderer.decode, renderer.tokenizer.id_to_token),
    }
    limits = MediaLimits.of({"image": 3}, 2**20, 10**6)
    library = Library(limits, Fetcher(["none"], max_bytes=2**20), directory)
    desk = Desk(engine, Metrics(engine.stats))  # type: ignore[arg-type]
    return Service(Served(**(given | changes)), desk, Asker(engine.session, context), library)


def make_gate(service: Any, *, api_key: str | None = None, max_body: int = 2**20, local: bool = False) -> Any:
    """The whole server, as the HTTP library calls it."""
    from tessera.infer.serve.app import make_app
    from tessera.infer.serve.gate import Gate

    return Gate(make_app(service), service.desk, api_key=api_key, max_body=max_body, local=local)


@dataclass
class Reply:
    """A response; ``chunks`` as they were sent."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    chunks: list[bytes] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        """The body as a whole."""
        return b"".join(self.chunks)

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """What went wrong, if it is told as it has to be."""
        assert set(self.json) == {"error"}, self.body
        found = self.json["error"]
        assert set(found) == {"message", "type", "param", "code"}
        assert isinstance(found["message"], str) and "Traceback" not in found["message"]
        return dict(found)

    @property
    def events(self) -> list[Any]:
        """The events of a stream, which ends as it has to."""
        lines = [line.removeprefix("data: ") for line in self.body.decode().split("\n\n") if line]
        assert lines[-1] == "[DONE]", lines
        return [json.loads(line) for line in lines[:-1]]


def call(
    app: Any,
    method: str,
    path: str,
    body: Any = None,
    headers: Mapping[str, str] | None = None,
    *,
    pieces: Sequence[bytes] | None = None,
    leave: Callable[[Reply], bool] | None = None,
) -> Reply:
    """One request to ``app``; ``pieces`` is a body in chunks, and the client leaves when ``leave`` says so."""
    given = {"host": "localhost", "content-type": "application/json", **(headers or {})}
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    reply = Reply()

    async def main() -> None:
        queue: asyncio.Queue[Any] = asyncio.Queue()
        parts = list(pieces) if pieces is not None else [data]
        for place, part in enumerate(parts):
            queue.put_nowait({"type": "http.request", "body": part, "more_body": place < len(parts) - 1})

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                reply.status = message["status"]
                reply.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                reply.chunks.append(message.get("body", b""))

        async def watch() -> None:
            while leave is not None:
                if leave(reply):
                    queue.put_nowait({"type": "http.disconnect"})
                    return
                await asyncio.sleep(0.005)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": b"",
            "headers": [(name.lower().encode(), value.encode()) for name, value in given.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        watching = asyncio.ensure_future(watch())
        try:
            await asyncio.wait_for(app(scope, queue.get, send), 20)
        finally:
            watching.cancel()

    asyncio.run(main())
    return reply


def ask(text: Any = "hello", **fields: Any) -> dict[str, Any]:
    """The body of a chat request."""
    return {"messages": [{"role": "user", "content": text}], **fields}


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


class Server:
    """A server whose engine says what the test wants."""

    def __init__(self, encoder: Encoder) -> None:
        self.engine = FakeEngine(encoder, says("Hel", "lo"))
        self.service = make_service(self.engine)
        self.gate = make_gate(self.service)

    def post(self, body: Any, path: str = CHAT, **how: Any) -> Reply:
        """The response to a request."""
        return call(self.gate, "POST", path, body, **how)

    def behave(self, behave: Behave) -> None:
        """How the engine answers from now on."""
        self.engine.behave = behave

    @property
    def asked(self) -> Request:
        """The last request that the engine got."""
        return self.engine.requests[-1]


def picture(form: str = "PNG", size: tuple[int, int] = (20, 10), **options: Any) -> bytes:
    """An image file."""
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form, **options)
    return out.getvalue()


def uri(data: bytes, kind: str = "image/png") -> str:
    """``data`` as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def huge_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises this many pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def image_part(data: bytes | None = None) -> dict[str, Any]:
    """A part of a message with an image."""
    return {"type": "image_url", "image_url": {"url": uri(picture(size=(56, 56)) if data is None else data)}}
