"""A hub on loopback that speaks the endpoints which ``create_repo`` and ``upload_folder`` need."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_stubTokenOfTheTest"
"""The one token it knows, of the user ``me``."""


class StubHub(ThreadingHTTPServer):
    """A hub with one known token and one namespace; remembers requests and committed files."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.created: dict[str, Any] = {}
        self.fail_commit = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: StubHub

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.answer(401 if self.headers.get("Authorization") != f"Bearer {TOKEN}" else 404, {"error": "no"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        self.server.requests.append(self.path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid credentials in Authorization header"})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            self.server.created = asked
            if asked["organization"] != "me":
                self.answer(403, {"error": "You don't have the rights to create a model under this namespace"})
            else:
                self.answer(200, {"url": f"{self.server.url}/me/{asked['name']}"})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"warnings": [], "errors": []})
        elif "/commit/" in self.path and self.server.fail_commit:
            self.answer(self.server.fail_commit, {"error": f"out of order for {TOKEN}"})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.answer(200, {"commitUrl": f"{self.server.url}/me/x/commit/1", "commitOid": "1" * 40})
        else:
            self.answer(404, {"error": f"no {self.path}"})


@contextmanager
def running() -> Iterator[StubHub]:
    """A hub that listens until the block ends."""
    server = StubHub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
