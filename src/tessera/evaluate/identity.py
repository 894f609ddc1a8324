"""Which model an answer came from: a hash of a directory that changes when training, merging or a setting changes it.

Reading seventy gigabytes to learn that nothing has changed would take longer than many benchmarks. A small file is
hashed whole; of a safetensors file its header, which names every tensor, and a piece at the beginning, in the middle
and at the end of each of them; of any other large file pieces at even distances. An optimiser's step, a merged adapter
or another dtype moves all of these. Where the directory lies, and when it was written, make no difference.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

WHOLE = 16 << 20
"""Files up to this size are hashed whole."""

PIECE, PIECES = 4096, 1024
_KINDS = (".safetensors", ".json", ".jinja", ".txt", ".model", ".bin", ".pt", ".distcp")
_BESIDE = ("args.json", "trainer_state.json", "run_facts.json")
"""Files of a run that say nothing about the model."""


def fingerprint_of(directory: Path) -> str:
    """The hash of the model or adapter in ``directory``."""
    digest = hashlib.blake2b(digest_size=16)
    files = [path for path in sorted(directory.iterdir()) if path.is_file()]
    files += sorted(path for path in directory.glob("iter_*/**/*") if path.is_file())
    for path in files:
        if path.suffix in _KINDS and path.name not in _BESIDE:
            digest.update(f"{path.relative_to(directory)} {path.stat().st_size}\n".encode())
            with open(path, "rb") as file:
                for piece in _pieces(file, path):
                    digest.update(piece)
    return digest.hexdigest()


def _pieces(file: BinaryIO, path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    if size <= WHOLE:
        yield file.read()
        return
    starts = [size * index // PIECES for index in range(PIECES)]
    if path.suffix == ".safetensors":
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        yield header
        found = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
        starts = sorted(8 + length + at for a, b in found for at in (a, (a + b) // 2, max(a, b - PIECE)))
    for start in starts:
        file.seek(start)
        yield file.read(PIECE)
