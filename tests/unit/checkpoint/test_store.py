"""A directory called checkpoint-N is complete, whatever happens while it is written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tessera.checkpoint import store as module
from tessera.checkpoint.store import Store, checkpoints, new_run_dir, resolve_resume
from tessera.config.errors import UserError


def make(run_dir: Path, limit: int | None = None) -> Store:
    return Store(run_dir, limit, True, lambda: None)


def write(directory: Path) -> None:
    (directory / "a.bin").write_bytes(b"x" * 1000)
    (directory / "trainer_state.json").write_text(json.dumps({"metric": None}))


def names(run_dir: Path) -> list[str]:
    return [path.name for path in checkpoints(run_dir)]


def test_publish_is_a_rename_and_leaves_nothing_aside(tmp_path: Path) -> None:
    path = make(tmp_path).publish(3, write)
    assert path == tmp_path / "checkpoint-3" and (path / "a.bin").stat().st_size == 1000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-3"]


def test_full_disk_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    store = make(tmp_path)
    store.publish(1, write)

    def full(directory: Path) -> None:
        write(directory)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"checkpoint-2 failed: No space left on device; checkpoint-1 is untouched"):
        store.publish(2, full)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1"]


def test_killed_while_writing_leaves_only_complete_checkpoints(tmp_path: Path) -> None:
    """kill -9 in the middle of a save: the half-written directory has no checkpoint's name and is swept."""
    code = textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        from tessera.checkpoint.store import Store
        store = Store(Path({str(tmp_path)!r}), None, True, lambda: None)
        def write(directory):
            (directory / "a.bin").write_bytes(b"x")
        store.publish(1, write)
        def die(directory):
            (directory / "a.bin").write_bytes(b"x")
            os.kill(os.getpid(), signal.SIGKILL)
        store.publish(2, die)
    """)
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -9
    assert names(tmp_path) == ["checkpoint-1"] and len(list(tmp_path.iterdir())) == 2
    make(tmp_path).sweep()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_retention_keeps_best_and_last(tmp_path: Path) -> None:
    store = make(tmp_path, limit=2)
    for step, metric in ((1, 0.5), (2, 0.1), (3, 0.4), (4, 0.3)):
        store.publish(step, write, metric=metric)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert store.best is not None and store.best.name == "checkpoint-2"


def test_retention_without_metric_keeps_the_newest(tmp_path: Path) -> None:
    store = make(tmp_path, limit=1)
    for step in (9, 10, 11):
        store.publish(step, write)
    assert names(tmp_path) == ["checkpoint-11"]


def test_versions_count_up_and_resume_finds_the_newest_complete(tmp_path: Path) -> None:
    first = new_run_dir(tmp_path, "20260101-000000", add_version=True)
    second = new_run_dir(tmp_path, "20260101-000001", add_version=True)
    assert (first.name, second.name) == ("v0-20260101-000000", "v1-20260101-000001")
    make(first).publish(10, write)
    (second / ".writing-checkpoint-5").mkdir()
    assert resolve_resume("true", tmp_path) == first / "checkpoint-10"
    make(second).publish(4, write)
    assert resolve_resume("true", tmp_path) == second / "checkpoint-4"
    assert resolve_resume(str(first / "checkpoint-10"), tmp_path) == first / "checkpoint-10"


def test_resume_errors_name_the_flag(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--resume_from_checkpoint true: no complete checkpoint"):
        resolve_resume("true", tmp_path)
    with pytest.raises(UserError, match="--resume_from_checkpoint nowhere"):
        resolve_resume("nowhere", tmp_path)


def test_files_are_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real_fsync, real_rename = os.fsync, Path.rename
    monkeypatch.setattr(module.os, "fsync", lambda fd: (events.append("fsync"), real_fsync(fd))[1])
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append("rename"), real_rename(self, to))[1])
    make(tmp_path).publish(1, write)
    assert events.index("rename") >= 3 and events[-1] == "fsync"
