"""Writes samples into numbered tar files, one after the other, without holding more than one of them.

The bytes of a part go in as they are. Names, order and headers are a function of the samples alone (times are 0), so
the same data gives the same shards.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from tessera.data.sample import BadRow


class ShardWriter:
    """Writes ``into / (pattern % n)`` for n = 0, 1, ..., each of at most ``most`` samples; a context manager."""

    def __init__(self, into: Path, pattern: str = "pretrain-%d.tar", most: int = 10_000) -> None:
        self.into, self.pattern, self.most = into, pattern, most
        self.samples = self.shards = 0
        self._keys: set[str] = set()
        self._tar: tarfile.TarFile | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tar is not None:
            self._tar.close()

    def write(self, key: str, parts: Iterable[tuple[str, bytes]]) -> None:
        """Append a sample; BadRow if its key cannot be one, or was used before."""
        key = safe_key(key)
        if key in self._keys:
            raise BadRow(f"id {key} occurs twice")
        self._keys.add(key)
        if self.samples % self.most == 0:
            if self._tar is not None:
                self._tar.close()
            path = self.into / (self.pattern % self.shards)
            self._tar = tarfile.open(path, "w", format=tarfile.GNU_FORMAT)  # noqa: SIM115 - closed with the shard
            self.shards += 1
        assert self._tar is not None
        for name, data in parts:
            info = tarfile.TarInfo(f"{key}.{name}")
            info.size, info.mode, info.uname, info.gname = len(data), 0o644, "", ""
            self._tar.addfile(info, io.BytesIO(data))
        self.samples += 1


def safe_key(key: str) -> str:
    """``key`` as the name of a sample: what follows a dot would name a part, so dots become underscores."""
    name = key.strip().strip("/")
    folder, slash, last = name.rpartition("/")
    safe = folder + slash + last.replace(".", "_")
    if not last or "\0" in safe or ".." in folder.split("/") or (safe.startswith("__") and safe.endswith("__")):
        raise BadRow(f"id {key!r} cannot name a sample")
    return safe
