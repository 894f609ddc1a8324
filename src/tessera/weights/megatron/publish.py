"""How an iteration appears in a checkpoint directory: whole, and only then named as the latest.

Its directory is written under a hidden name and renamed; then the tracker, the file that says which iteration readers
take, is replaced. Whoever is interrupted leaves the checkpoint that was there, and nothing that looks like another.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tessera.config.errors import UserError
from tessera.config.sources import TRACKER


@contextmanager
def publishing(root: Path, iteration: int | None) -> Iterator[Path]:
    """A hidden directory below the existing ``root`` to write an iteration (None: a release) into.

    UserError if there is one already; whatever goes wrong leaves nothing behind.
    """
    name = "release" if iteration is None else f"iter_{iteration:07d}"
    aside, final = root / f".writing-{name}", root / name
    if final.exists():
        raise UserError(f"{final}: exists already; choose another directory")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        aside.rename(final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _replace(root / TRACKER, "release" if iteration is None else str(iteration))


def _replace(file: Path, text: str) -> None:
    aside = file.with_name(f".writing-{file.name}")
    with aside.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(file)
    descriptor = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
