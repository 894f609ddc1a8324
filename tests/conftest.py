"""Shared by every test: one thread per library, no network, a time limit, and none of the caller's environment."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Generator, Iterator
from types import FrameType
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Child processes that ask the hub are refused at once; the guard below does the same inside this process.
os.environ.setdefault("HF_ENDPOINT", "http://127.0.0.1:9")

FOREIGN = (
    *("MAX_PIXELS", "MIN_PIXELS", "VIDEO_MAX_PIXELS", "FPS", "FPS_MAX_FRAMES", "ROOT_IMAGE_DIR", "USE_HF"),
    *("NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
)
LIMIT_S = 300


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip ``gpu`` tests where there is no GPU; torch is only asked if there are any."""
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if wanting:
        import torch

        if not torch.cuda.is_available():
            for item in wanting:
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """End a test that hangs, with the stack it hangs in; 300 s unless marked ``timeout(seconds)``."""
    marker = item.get_closest_marker("timeout")
    limit = int(marker.args[0]) if marker else LIMIT_S

    def expire(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"{item.nodeid} took longer than {limit} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(limit)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def no_foreign_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test sees none of the variables that a command line reads, whatever the caller's shell holds."""
    for name in FOREIGN:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Connections leave this process to loopback only."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "localhost", "::1"):
            raise ConnectionRefusedError(f"tests may not connect to {address[0]}")
        connect(self, address)

    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", guarded)
    yield
    patch.undo()
