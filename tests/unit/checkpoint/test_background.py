"""A save that runs beside training: what it publishes, when, and what happens if it cannot."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest
import torch

from tessera.checkpoint.background import HostCopies, Publisher, Write
from tessera.checkpoint.store import Store, checkpoints
from tessera.config.errors import UserError


def publisher(run_dir: Path, limit: int | None = None) -> tuple[Publisher, list[str]]:
    said: list[str] = []
    return Publisher(Store(run_dir, limit, True, lambda: None), said.append, aside=True), said


def content(text: str, gate: threading.Event | None = None) -> Write:
    def write(directory: Path) -> None:
        (directory / "a").write_text(text)
        if gate is not None:
            assert gate.wait(30)

    return write


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    gate, (made, said) = threading.Event(), publisher(tmp_path)
    path = made.publish(3, lambda: content("x", gate))
    made.poll()
    assert path == tmp_path / "checkpoint-3" and not path.exists() and not said
    gate.set()
    made.wait()
    assert (path / "a").read_text() == "x" and said == [f"Saved checkpoint {path}"]
    made.wait()
    assert len(said) == 1


def test_one_save_at_a_time(tmp_path: Path) -> None:
    gate, (made, said) = threading.Event(), publisher(tmp_path)
    made.publish(1, lambda: content("1", gate))
    staged: list[bool] = []

    def stage() -> Write:
        staged.append((tmp_path / "checkpoint-1").exists())
        return content("2")

    threading.Timer(0.2, gate.set).start()
    made.publish(2, stage)
    made.wait()
    assert staged == [True] and [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    assert len(said) == 2


def test_a_full_disk_is_raised_where_training_runs(tmp_path: Path) -> None:
    made, _ = publisher(tmp_path)
    made.publish(1, lambda: content("1"))
    made.wait()

    def full(directory: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    message = r"checkpoint-2 failed: No space left on device; checkpoint-1 is untouched"

    def poll() -> None:
        while True:
            made.poll()

    for notice in (made.wait, lambda: made.publish(3, lambda: content("3")), poll):
        made.publish(2, lambda: full)
        with pytest.raises(UserError, match=message):
            notice()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_retention_and_best_are_those_of_the_store(tmp_path: Path) -> None:
    made, _ = publisher(tmp_path, limit=2)
    for step, metric in ((1, 0.5), (2, 0.1), (3, 0.4), (4, 0.3)):
        made.publish(step, lambda: content("x"), metric=metric)
    made.wait()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
    assert made.store.best == tmp_path / "checkpoint-2"


def test_copies_stay_and_their_memory_is_used_again() -> None:
    copies, values = HostCopies(), torch.arange(4.0)
    copies.begin()
    first = copies.copy("a", values)
    values.add_(1)
    assert copies.copy("a", values) is first and first.tolist() == [0, 1, 2, 3]
    copies.begin()
    again = copies.copy("a", values)
    assert again is first and again.tolist() == [1, 2, 3, 4]
