"""``tessera deploy`` as a user starts it, on a free port, and requests to it over a real connection."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

START_S = 120


@dataclass
class Reply:
    """A response."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """What went wrong, if it is told as it has to be."""
        assert set(self.json) == {"error"} and b"Traceback" not in self.body, self.body
        return dict(self.json["error"])

    @property
    def text(self) -> str:
        """The first answer, whole or from a stream that ended as it has to."""
        if self.headers["content-type"].startswith("text/event-stream"):
            lines = [line.removeprefix("data: ") for line in self.body.decode().split("\n\n") if line]
            assert lines[-1] == "[DONE]", lines
            choices = [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]
            return "".join(one["delta"].get("content") or "" for one in choices if one["index"] == 0)
        return str(self.json["choices"][0]["message"]["content"])


@dataclass
class Running:
    """A server in a process of its own; ``lines`` are what it has printed."""

    process: subprocess.Popen[str]
    context: ssl.SSLContext | None = None
    port: int = 0
    lines: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def send(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None, timeout: float = 60
    ) -> Reply:
        """One request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        if self.context is not None:
            connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=timeout, context=self.context)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
            response = connection.getresponse()
            return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def chat(self, content: Any, **fields: Any) -> Reply:
        """A question."""
        body = {"messages": [{"role": "user", "content": content}], **fields}
        return self.send("POST", "/v1/chat/completions", body)

    def numbers(self) -> dict[str, float]:
        """What ``/metrics`` says, without labels."""
        text = self.send("GET", "/metrics").body.decode()
        return {name: float(value) for name, value in re.findall(r"^(\w+) ([\d.e+-]+)$", text, re.MULTILINE)}

    def wait_for(self, name: str, value: float, seconds: float = 20) -> None:
        """Until a number of ``/metrics`` has this value."""
        deadline = time.monotonic() + seconds
        while (found := self.numbers()[name]) != value:
            assert time.monotonic() < deadline, f"{name} is {found}, not {value}"
            time.sleep(0.02)

    def stop(self, number: int = signal.SIGTERM, timeout: float = 60) -> int:
        """Send a signal and wait for the end; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout)

    @property
    def output(self) -> str:
        """Everything it has printed."""
        return "".join(self.lines)


@contextmanager
def deployed(*words: str | Path, context: ssl.SSLContext | None = None, **variables: str) -> Iterator[Running]:
    """A server with these flags (spoken to over HTTPS with a ``context``); it is gone afterwards."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-u", "-m", "tessera", "deploy", "--port", str(port), *map(str, words)]
    process = subprocess.Popen(
        command,
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    server = Running(process, context)
    reader = threading.Thread(target=_read, args=(server,), daemon=True)
    reader.start()
    try:
        deadline = time.monotonic() + START_S
        while not server.port:
            assert process.poll() is None and time.monotonic() < deadline, server.output
            time.sleep(0.05)
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(10)
        reader.join(10)


def _read(server: Running) -> None:
    assert server.process.stdout is not None
    for line in server.process.stdout:
        server.lines.append(line)
        found = re.match(r"serving .* at https?://[^/]*:(\d+)/v1", line)
        if found:
            server.port = int(found[1])
