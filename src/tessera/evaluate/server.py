"""A server of ``tessera deploy`` on this machine, for as long as an evaluation takes.

Other programs (EvalScope), and engines that only exist as servers (``--infer_backend vllm``), are reached this way. The
port is a free one and the address is loopback.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from tessera.config.errors import UserError
from tessera.config.run import Run
from tessera.evaluate.answerer import Ask, Told
from tessera.evaluate.remote import Remote, Server

START_S = 1800.0
"""Most seconds until the server must answer: large models take their time."""

STOP_S = 30.0
NAME = "tessera-eval"
PASSED_ON = ("max_pixels", "min_pixels", "max_num", "torch_dtype", "system", "image_resize")
"""Flags that decide answers, passed on where the user gave them."""


def command(run: Run, port: int, backend: str | None = None) -> list[str]:
    """The command line of the server for the model of ``run``."""
    words = [sys.executable, "-m", "tessera", "deploy", "--host", "127.0.0.1", "--port", str(port)]
    if run.model.adapters:  # asked for by its name there
        words += ["--adapters", f"{NAME}={run.model.adapters[0]}"]
    else:
        words += ["--model", str(run.model.model), "--served_model_name", NAME]
    words += ["--infer_backend", backend] if backend else []
    values = run.values()
    for name in PASSED_ON:
        if values[name] is not None and run.provenance[name] in ("flag", "yaml", "env"):
            words += [f"--{name}", str(values[name])]
    return words


@contextmanager
def deployed(run: Run, backend: str | None = None) -> Iterator[Server]:
    """A server for the model of ``run`` that ends with the block; UserError if it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A key in the environment holds for both sides.
    server = Server(f"http://127.0.0.1:{port}", NAME, run.deploy.api_key, run.evaluate.eval_timeout)
    process = subprocess.Popen(command(run, port, backend))
    try:
        _await(process, server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await(process: subprocess.Popen[bytes], server: Server) -> None:
    """Wait until ``server`` answers; UserError if its process ends or takes too long."""
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise UserError(f"tessera deploy ended with exit code {process.returncode} before it answered")
        try:
            with server.opener().open(server.request("models"), timeout=5):
                return
        except urllib.error.HTTPError as error:
            raise UserError(f"tessera deploy answers {error.code} when it is asked for its models") from None
        except OSError:
            time.sleep(0.2)
    raise UserError(f"tessera deploy did not answer within {START_S:g} seconds")


class Deployed:
    """An answerer over a server of our own, which :meth:`close` ends."""

    def __init__(self, run: Run, backend: str, settings: Mapping[str, Any], body: Mapping[str, Any]) -> None:
        self._stack = ExitStack()
        server = self._stack.enter_context(deployed(run, backend))
        self._remote = Remote(
            server, body, concurrency=run.evaluate.concurrency, root_image_dir=run.data.root_image_dir
        )
        self._settings = {**settings, "backend": backend}

    @property
    def settings(self) -> Mapping[str, Any]:
        """The model by its contents, the engine and sampling; where the server was does not matter."""
        return self._settings

    @property
    def notes(self) -> Sequence[str]:
        """Nothing."""
        return ()

    def answers(self, asks: Iterable[Ask]) -> Iterator[Told]:
        """Answers as they come."""
        return self._remote.answers(asks)

    def close(self) -> None:
        """End the server."""
        self._stack.close()
