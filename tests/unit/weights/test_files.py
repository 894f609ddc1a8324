"""Bytes from file to file."""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tessera.weights import files


@contextmanager
def opened(path: Path, data: bytes) -> Iterator[int]:
    path.write_bytes(data)
    descriptor = os.open(path, os.O_RDWR)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("kernel", ["copies", "refuses", "is silent", "is another"])
def test_bytes_arrive_wherever_the_kernel_can_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    """Between two file systems and on other systems the bytes go through the process."""

    def refuse(*_: int) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    if kernel == "is another":
        monkeypatch.setattr(sys, "platform", "darwin")
    elif kernel != "copies":
        monkeypatch.setattr(os, "copy_file_range", refuse if kernel == "refuses" else lambda *_: 0)
    monkeypatch.setattr(files, "STEP", 1000)
    monkeypatch.setattr(files, "BUFFER", 300)
    data = os.urandom(5000)
    with opened(tmp_path / "a", data) as source, opened(tmp_path / "b", bytes(6000)) as target:
        files.copy_bytes(source, 7, target, 501, 4321)
    assert (tmp_path / "b").read_bytes() == bytes(501) + data[7 : 7 + 4321] + bytes(6000 - 501 - 4321)


def test_a_short_source_and_a_refusing_disk_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with opened(tmp_path / "a", b"12345") as source, opened(tmp_path / "b", b"") as target:
        with pytest.raises(EOFError, match="5 bytes too early"):
            files.copy_bytes(source, 0, target, 0, 10)
        monkeypatch.setattr(os, "copy_file_range", full, raising=False)
        with pytest.raises(OSError, match="No space left"):
            files.copy_bytes(source, 0, target, 0, 5)


def test_tasks_share_the_cores_and_the_first_error_is_raised() -> None:
    before = torch.get_num_threads()
    seen: list[str] = []

    def fine() -> None:
        seen.append(threading.current_thread().name)

    def broken() -> None:
        raise OSError("disk")

    files.at_once([fine, fine])
    assert len(seen) == 2 and threading.current_thread().name not in seen
    with pytest.raises(OSError, match="disk"):
        files.at_once([broken, fine])
    assert torch.get_num_threads() == before
