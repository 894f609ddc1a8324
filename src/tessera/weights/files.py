"""Safetensors files, written in any order and by several processes.

A file is a JSON header with every tensor's type, shape and byte range, then the bytes. Where each tensor goes is known
before any value is, so the header is written first, and every tensor then goes to its place whenever it comes, from
whichever process holds it. Nothing is ever collected to be written.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types by their name in a file."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor on disk: its file, type, shape and byte range within the file's data."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class Writer:
    """Safetensors files whose headers are written first; tensors then go to their places in any order.

    Other processes may open the files that one has created (``create`` false) and put tensors of their own.
    """

    def __init__(
        self,
        folder: Path,
        entries: Mapping[str, Entry],
        metadata: Mapping[str, dict[str, str]],
        stack: ExitStack,
        *,
        create: bool = True,
    ) -> None:
        names = {dtype: name for name, dtype in DTYPES.items()}
        self._entries = entries
        self._files: dict[str, tuple[int, int]] = {}
        for file in dict.fromkeys(entry.file for entry in entries.values()):
            held = sorted((e.start, e.end, n) for n, e in entries.items() if e.file == file)
            meta = metadata.get(file, {"format": "pt"})
            header: dict[str, Any] = {"__metadata__": meta} if meta else {}
            for start, end, name in held:
                entry = entries[name]
                header[name] = {"dtype": names[entry.dtype], "shape": entry.shape, "data_offsets": [start, end]}
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            text += b" " * (-len(text) % 8)
            flags = os.O_WRONLY | (os.O_CREAT | os.O_TRUNC if create else 0)
            descriptor = os.open(folder / file, flags, 0o644)
            stack.callback(os.close, descriptor)
            self._files[file] = (descriptor, 8 + len(text))
            if create:
                write_all(descriptor, struct.pack("<Q", len(text)) + text, 0)

    def put(self, name: str, value: Tensor) -> None:
        """Write the tensor called ``name`` on disk, in the type its entry says."""
        entry = self._entries[name]
        descriptor, data = self._files[entry.file]
        flat = value.to("cpu", entry.dtype).contiguous().reshape(-1)
        assert flat.nbytes == entry.end - entry.start
        if flat.nbytes:
            write_all(descriptor, flat.view(torch.uint8).numpy().data, data + entry.start)


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write everything at ``offset``; OSError if the disk is full."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
