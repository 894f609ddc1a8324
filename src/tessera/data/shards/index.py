"""Where the samples of a shard are: from an index that exists, or from one walk over the shard's headers.

Three sources, the first that is there is used::

    .nv-meta/index.sqlite    samples and the places of their parts; a row costs one query, headers are not read
    shard.tar.idx            n + 1 little-endian uint64: where each sample begins, and where the last one ends
    neither                  the headers are read once; the offsets are kept in the user's cache directory

Only offsets are held in memory, eight bytes a sample (mapped, where the file exists). A dataset is somebody else's: it
is never written to. An index may disagree with its shard, because either is incomplete or of another version. That is
found out when a sample is read, costs that sample, and is said.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tessera.config.errors import UserError
from tessera.data.sample import BadRow
from tessera.data.shards.tar import Part, Place, Truncated, opened, sample_at, samples, split_name


class Shard(Protocol):
    """One tar file with known samples."""

    @property
    def path(self) -> Path: ...

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Place:
        """Key and parts of sample ``index``; BadRow if it is not where the index says."""
        ...

    def key(self, index: int) -> str:
        """The key of sample ``index``, empty if it cannot be told."""
        ...


class Database:
    """``index.sqlite`` of a prepared folder, read only, by any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            # immutable: nobody writes it, so no locks are needed, which network file systems may not have
            self._db = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True, check_same_thread=False)
            tables = {name for (name,) in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        except sqlite3.Error as error:
            raise UserError(f"{path}: not a readable index ({error}); make it anew: tessera data prepare") from None
        self.complete = {"samples", "sample_parts"} <= tables

    def key(self, shard: int, index: int) -> str:
        """The key of a sample, empty if there is none."""
        found = self._rows("SELECT sample_key FROM samples WHERE tar_file_id = ? AND sample_index = ?", (shard, index))
        return str(found[0][0]) if found else ""

    def parts(self, shard: int, index: int) -> tuple[Part, ...]:
        """Parts of a sample, in the order in which they lie in the shard."""
        found = self._rows(
            "SELECT part_name, content_byte_offset, content_byte_size FROM sample_parts "
            "WHERE tar_file_id = ? AND sample_index = ? ORDER BY content_byte_offset",
            (shard, index),
        )
        return tuple(Part(*row) for row in found)

    def _rows(self, query: str, values: tuple[int, int]) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._db.execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise UserError(f"{self.path}: {error}; make it anew: tessera data prepare") from None


@dataclass(frozen=True, slots=True)
class Listed:
    """A shard of ``count`` samples whose parts are in a database, as number ``number`` there."""

    path: Path
    database: Database
    number: int
    count: int

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int) -> Place:
        """From the database alone, but for a look at the shard's size."""
        parts = self.database.parts(self.number, index)
        if not parts:
            raise BadRow("the sample is not in index.sqlite: prepare the folder again")
        end = max(part.offset + part.size for part in parts)
        try:
            size = os.stat(self.path).st_size
        except OSError:
            raise BadRow(f"shard not found: {self.path}") from None
        if end > size:
            raise Truncated(f"the shard ends at byte {size}, the sample at byte {end}: truncated")
        return Place("", parts, parts[0].offset, end)

    def key(self, index: int) -> str:
        """The sample's key."""
        return self.database.key(self.number, index)


@dataclass(frozen=True, slots=True)
class Walked:
    """A shard whose samples begin at ``offsets [n + 1] uint64``; the headers of a sample are read with it.

    ``broken`` is why the shard ends before it should, and the key of the sample that it ends in; that sample counts.
    """

    path: Path
    offsets: np.ndarray
    broken: tuple[str, str] | None = None

    def __len__(self) -> int:
        return max(len(self.offsets) - 1, 0) + (self.broken is not None)

    def sample(self, index: int) -> Place:
        """From the sample's own headers."""
        if index >= len(self.offsets) - 1:
            assert self.broken is not None
            raise Truncated(self.broken[0])
        descriptor = opened(self.path)
        try:
            return sample_at(descriptor, int(self.offsets[index]), int(self.offsets[index + 1]))
        finally:
            os.close(descriptor)

    def key(self, index: int) -> str:
        """The sample's key, empty where its headers cannot be read."""
        if index >= len(self.offsets) - 1:
            return self.broken[1] if self.broken else ""
        try:
            return self.sample(index).key
        except Truncated as error:
            named = split_name(error.name)
            return named[0] if named else ""
        except BadRow:
            return ""


def walked(path: Path, cache: Path | None = None) -> Walked:
    """The shard's samples, from ``shard.tar.idx``, from ``cache`` (a directory), or from its headers."""
    beside = path.with_name(path.stem + ".tar.idx")
    if beside.is_file():
        return Walked(path, _read(beside))
    kept = None if cache is None else cache / f"{_fingerprint(path)}.idx"
    if kept is not None and kept.is_file():
        return Walked(path, _read(kept))
    try:
        descriptor = opened(path)
    except BadRow as error:
        return Walked(path, np.zeros(0, "<u8"), (str(error), ""))
    offsets, end = [], 0
    broken: tuple[str, str] | None = None
    try:
        for place in samples(descriptor):
            offsets.append(place.start)
            end = place.end
    except Truncated as error:
        named = split_name(error.name)
        broken = (str(error), named[0] if named else "")
    finally:
        os.close(descriptor)
    found = np.array([*offsets, end] if offsets else [], dtype="<u8")
    if kept is not None and broken is None:
        _keep(kept, found)
    return Walked(path, found, broken)


def cache_directory() -> Path:
    """Where offsets of shards without an index are kept: the user's, never the dataset's."""
    return Path("~/.cache/tessera/shards").expanduser()


def _read(path: Path) -> np.ndarray:
    if not path.stat().st_size:
        return np.zeros(0, "<u8")
    return np.memmap(path, dtype="<u8", mode="r")


def _fingerprint(path: Path) -> str:
    """A name that changes with the shard: its path, size and time."""
    try:
        stat = path.stat()
    except OSError:
        return "absent"
    text = f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def _keep(path: Path, offsets: np.ndarray) -> None:
    """Remember ``offsets``. A cache that cannot be written costs a walk the next time and nothing else."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(offsets.tobytes())
        aside.replace(path)
