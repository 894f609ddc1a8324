"""Checkpoints appear whole or not at all.

A checkpoint is written into a hidden directory beside its final place, every file is flushed to the disk, and one
``rename`` gives it its name. Rename is atomic, so whatever the moment of a crash, a directory called
``checkpoint-N`` is complete; a hidden one is rubbish and is removed at the next start::

    output/v0-20260101-120000/
        .writing-checkpoint-200/      being written; worthless if the process dies now
        checkpoint-100/               complete, because it exists

A full disk shows up while writing aside: the half-written directory is removed and the previous checkpoint has not
been touched. Retention deletes the oldest checkpoints only after the new one is in place, and never the best one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tessera.config.errors import UserError

_NAME = re.compile(r"checkpoint-(\d+)")
_RUN = re.compile(r"v(\d+)-\d{8}-\d{6}")
_WRITING = ".writing-"
TRAINER_STATE = "trainer_state.json"


def step_of(checkpoint: Path) -> int:
    """The optimiser step in a checkpoint directory's name, -1 if it is not one."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match.group(1)) if match else -1


def checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in run_dir.glob("checkpoint-*") if path.is_dir() and step_of(path) >= 0]
    return sorted(found, key=step_of)


def run_dirs(output_dir: Path) -> list[Path]:
    """The ``vN-date-time`` directories below ``output_dir``, oldest first."""
    found = [path for path in output_dir.glob("v*-*") if path.is_dir() and _RUN.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(_RUN.fullmatch(path.name).group(1)))  # type: ignore[union-attr]


def new_run_dir(output_dir: Path, now: str, *, add_version: bool) -> Path:
    """Create and return the next ``output_dir/vN-<now>`` (or ``output_dir`` itself without ``add_version``)."""
    existing = run_dirs(output_dir)
    version = 1 + int(existing[-1].name[1:].split("-")[0]) if existing else 0
    path = output_dir / f"v{version}-{now}" if add_version else output_dir
    try:
        path.mkdir(parents=True, exist_ok=not add_version)
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: cannot be created: {error.strerror}") from error
    return path


def resolve_resume(value: str, output_dir: Path) -> Path:
    """The checkpoint that ``--resume_from_checkpoint`` means: a path, or ``true`` for the newest complete one."""
    if value.lower() not in ("true", "1", "yes"):
        path = Path(value)
        if not (path / TRAINER_STATE).is_file():
            raise UserError(f"--resume_from_checkpoint {value}: no checkpoint there (a directory with {TRAINER_STATE})")
        return path
    for run_dir in [*reversed(run_dirs(output_dir)), output_dir]:
        found = [path for path in checkpoints(run_dir) if (path / TRAINER_STATE).is_file()]
        if found:
            return found[-1]
    raise UserError(f"--resume_from_checkpoint true: no complete checkpoint below {output_dir}; leave the flag out")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(aside: Path) -> None:
    """Remove a directory into which other ranks, who don't know yet that it is in vain, may still be writing."""
    for _ in range(20):
        shutil.rmtree(aside, ignore_errors=True)
        if not aside.exists():
            return
        time.sleep(0.05)


def _flush_tree(root: Path) -> None:
    """fsync every file below ``root``, then the directories that name them."""
    for directory, _, files in os.walk(root, topdown=False):
        for name in files:
            _fsync(Path(directory) / name)
        _fsync(Path(directory))


class Mirror(Protocol):
    """Keeps every published checkpoint a second time, in another format."""

    def write(self, checkpoint: Path, step: int) -> None:
        """Write what ``checkpoint`` holds; OSError if the disk refuses."""
        ...

    def retire(self, checkpoint: Path, step: int) -> None:
        """Delete what was written for ``checkpoint``, which need not be there any more."""
        ...


@dataclass(slots=True)
class Store:
    """Publishes and retires the checkpoints of one run directory.

    ``limit`` is ``--save_total_limit`` (None keeps all). ``barrier`` waits for all ranks; only ``is_main`` renames and
    deletes, and has the ``mirror`` written, but every rank takes part in writing.
    """

    run_dir: Path
    limit: int | None
    is_main: bool
    barrier: Callable[[], None]
    mirror: Mirror | None = None
    best: Path | None = None
    best_metric: float | None = None

    def sweep(self) -> None:
        """Remove what a killed process left half written."""
        if self.is_main:
            for path in self.run_dir.glob(f"{_WRITING}*"):
                shutil.rmtree(path, ignore_errors=True)
        self.barrier()

    def adopt(self) -> None:
        """Find the best checkpoint among those present, as after a resume."""
        for path in checkpoints(self.run_dir):
            if (path / TRAINER_STATE).is_file():
                metric = read_trainer_state(path).get("metric")
                if metric is not None and (self.best_metric is None or metric < self.best_metric):
                    self.best, self.best_metric = path, metric

    def path_of(self, step: int) -> Path:
        """What the checkpoint of ``step`` is called."""
        return self.run_dir / f"checkpoint-{step}"

    def publish(self, step: int, write: Callable[[Path], None], *, metric: float | None = None) -> Path:
        """Write ``checkpoint-<step>`` through ``write(aside)`` on every rank, then make it appear.

        ``metric`` (lower is better) decides which checkpoint is the best. Raises UserError if the disk refuses; then
        nothing that existed before has changed.
        """
        final = self.path_of(step)
        aside = self.run_dir / f"{_WRITING}{final.name}"
        try:
            if self.is_main:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
            self.barrier()
            write(aside)
            self.barrier()
            if self.is_main:
                self._reveal(aside, final)
                if self.mirror is not None:
                    self.mirror.write(final, step)
        except OSError as error:
            _remove(aside)
            kept = checkpoints(self.run_dir)
            rest = f"{kept[-1].name} is untouched" if kept else "there was no earlier checkpoint"
            raise UserError(
                f"saving {final} failed: {error.strerror or error}; {rest}. "
                "Free some space, then go on with --resume_from_checkpoint true"
            ) from error
        self.barrier()
        if metric is not None and (self.best_metric is None or metric < self.best_metric):
            self.best, self.best_metric = final, metric
        if self.is_main:
            self._retire()
        return final

    def _reveal(self, aside: Path, final: Path) -> None:
        _flush_tree(aside)
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        _fsync(self.run_dir)

    def _retire(self) -> None:
        """Delete the oldest checkpoints beyond ``limit``, sparing the best and the last."""
        if self.limit is None:
            return
        present = checkpoints(self.run_dir)
        removable = [path for path in present[:-1] if path != self.best]
        for path in removable[: max(0, len(present) - max(1, self.limit))]:
            # Out of sight first: a directory that has its name is complete, also while it is being deleted.
            doomed = path.with_name(f"{_WRITING}{path.name}-retired")
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
            if self.mirror is not None:
                self.mirror.retire(path, step_of(path))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """The parsed ``trainer_state.json`` of a checkpoint."""
    path = checkpoint / TRAINER_STATE
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a readable trainer state: {error}") from error
    return state
