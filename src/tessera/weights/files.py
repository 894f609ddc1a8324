"""Safetensors files, read in pieces, and written in any order and by several processes.

A file is a JSON header with every tensor's type, shape and byte range, then the bytes. Where each tensor goes is known
before any value is, so the header is written first, and every tensor then goes to its place whenever it comes, from
whichever process holds it: a region of a tensor is some contiguous runs of bytes. Nothing is ever collected to be
written.

Reading copies the bytes that are asked for and nothing else. (Mapping a file would be shorter to write, but the pages
that were looked at would count as this process's memory for as long as the file is open.)
"""

from __future__ import annotations

import errno
import json
import os
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from tessera.contract.shards import Part, whole

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

STEP = 32 * 2**20
"""Bytes that are copied between two requests to the disk to begin writing them."""

WORKERS = 4
"""Files or tensors under way at the same time, at most: reading and writing let other threads run."""

BUFFER = 2**20
"""Bytes that are copied at a time where the kernel cannot."""

NO_COPY = frozenset((errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM))
"""Errors that say that two files cannot be copied within the kernel."""

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
    """Safetensors files of known layout in ``folder``; values then go to their places in any order.

    Several processes may write into the same files at once, each its own regions: opening one never empties it. The
    one that ``creates`` them writes the headers and sets the sizes.
    """

    def __init__(
        self,
        folder: Path,
        entries: Mapping[str, Entry],
        metadata: Mapping[str, dict[str, str]],
        stack: ExitStack,
        *,
        creates: bool = True,
    ) -> None:
        self._folder, self._entries, self._metadata, self._stack = folder, entries, metadata, stack
        self._open: dict[str, tuple[int, int]] = {}
        self._waiting: dict[int, tuple[int, int, int]] = {}
        self._lock = Lock()
        self._creates = creates
        if creates:
            for file in dict.fromkeys(entry.file for entry in entries.values()):
                self._opened(file)

    def _opened(self, file: str) -> tuple[int, int]:
        """The descriptor of ``file``, and where in it the data begins."""
        if file not in self._open:
            header = self._header(file)
            descriptor = os.open(self._folder / file, os.O_WRONLY | os.O_CREAT, 0o644)
            self._stack.callback(os.close, descriptor)
            if self._creates:
                end = max(entry.end for entry in self._entries.values() if entry.file == file)
                os.ftruncate(descriptor, len(header) + end)
                write_all(descriptor, header, 0)
            else:
                # Whoever publishes flushes its own machine's files only. (Callbacks run last to first: before closing.)
                self._stack.callback(os.fsync, descriptor)
            self._open[file] = (descriptor, len(header))
        return self._open[file]

    def _header(self, file: str) -> bytes:
        names = {dtype: name for name, dtype in DTYPES.items()}
        held = sorted((e.start, e.end, n) for n, e in self._entries.items() if e.file == file)
        meta = self._metadata.get(file, {"format": "pt"})
        header: dict[str, Any] = {"__metadata__": meta} if meta else {}
        for start, end, name in held:
            entry = self._entries[name]
            header[name] = {"dtype": names[entry.dtype], "shape": entry.shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    def place(self, name: str) -> tuple[int, int]:
        """Descriptor and offset at which the tensor called ``name`` on disk begins."""
        entry = self._entries[name]
        descriptor, data = self._opened(entry.file)
        return descriptor, data + entry.start

    def _begin(self, descriptor: int, first: int, last: int, count: int) -> None:
        """Let the disk begin, now and then, with what was written between the bytes ``first`` and ``last``."""
        with self._lock:
            waiting, low, high = self._waiting.pop(descriptor, (0, first, last))
            waiting, low, high = waiting + count, min(low, first), max(high, last)
            if waiting < STEP:
                self._waiting[descriptor] = (waiting, low, high)
                return
        start_writing(descriptor, low, high - low)

    def put(self, name: str, value: Tensor, part: Part | None = None) -> None:
        """Write ``value`` as the region ``part`` (default: all) of the tensor called ``name`` on disk, in its type."""
        entry = self._entries[name]
        flat = value.to("cpu", entry.dtype).contiguous().reshape(-1)
        if not flat.numel():
            return
        assert tuple(value.shape) == (entry.shape if part is None else tuple(cut.stop - cut.start for cut in part))
        starts, length = runs(entry.shape, whole(entry.shape) if part is None else part)
        descriptor, data = self._opened(entry.file)
        size = entry.dtype.itemsize
        values = flat.view(torch.uint8).numpy().data
        for index, start in enumerate(starts):
            run = values[index * length * size : (index + 1) * length * size]
            write_all(descriptor, run, data + entry.start + start * size)
        first, last = data + entry.start + starts[0] * size, data + entry.start + (starts[-1] + length) * size
        self._begin(descriptor, first, last, len(values))


def runs(shape: tuple[int, ...], part: Part) -> tuple[list[int], int]:
    """Where the contiguous runs of the region ``part`` begin in a tensor of ``shape``, and how long each is."""
    sizes = [cut.stop - cut.start for cut in part]
    # Behind the last dimension that is cut, everything is contiguous; so are the rows of that dimension.
    depth = max((at for at, size in enumerate(sizes) if size != shape[at]), default=0)
    strides = [prod(shape[at + 1 :]) for at in range(len(shape))]
    starts = [sum(cut.start * stride for cut, stride in zip(part, strides, strict=True))]
    for at in range(depth):
        starts = [start + index * strides[at] for start in starts for index in range(sizes[at])]
    return starts, prod(sizes[depth:])


def read_region(path: Path, data: int, entry: Entry, part: Part) -> Tensor:
    """The region ``part`` of the tensor ``entry`` of the file ``path``, whose tensors lie behind its byte ``data``.

    OSError if the file cannot be read, EOFError if it ends too early.
    """
    starts, length = runs(entry.shape, part)
    size = entry.dtype.itemsize
    raw = torch.empty(len(starts) * length * size, dtype=torch.uint8)
    view = raw.numpy().data
    with path.open("rb", buffering=0) as stream:
        for index, start in enumerate(starts):
            into = view[index * length * size : (index + 1) * length * size]
            _read_all(stream.fileno(), into, data + entry.start + start * size)
    return raw.view(entry.dtype).view([cut.stop - cut.start for cut in part])


def copy_bytes(source: int, at: int, target: int, to: int, count: int) -> None:
    """Copy ``count`` bytes from ``at`` in one open file to ``to`` in another, within the kernel where it can.

    They go on their way to the disk at once, so that flushing the file afterwards has little left to wait for. EOFError
    if the source ends too early, OSError if the disk refuses.
    """
    while count:
        step = min(count, STEP)
        moved = _moved(source, at, target, to, step) or _carried(source, at, target, to, step)
        start_writing(target, to, moved)
        at, to, count = at + moved, to + moved, count - moved


def _moved(source: int, at: int, target: int, to: int, count: int) -> int:
    """How many bytes the kernel copied by itself; 0 where it does not, as between some file systems."""
    if sys.platform != "linux":
        return 0
    try:
        return os.copy_file_range(source, target, count, at, to)
    except OSError as error:
        if error.errno in NO_COPY:
            return 0
        raise


def _carried(source: int, at: int, target: int, to: int, count: int) -> int:
    """Copy ``count`` bytes through this process."""
    buffer = memoryview(bytearray(min(count, BUFFER)))
    for start in range(0, count, len(buffer)):
        part = buffer[: count - start]
        _read_all(source, part, at + start)
        write_all(target, part, to + start)
    return count


def start_writing(descriptor: int, offset: int, count: int) -> None:
    """Let the disk begin with these bytes, which were just written, without waiting for it."""
    if sys.platform == "linux":
        # What is still to be written is not dropped by this advice: its writing is begun.
        os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_DONTNEED)


def _read_all(descriptor: int, into: memoryview, offset: int) -> None:
    """Fill ``into`` from ``offset`` on."""
    while into:
        count = os.preadv(descriptor, [into], offset)
        if not count:
            raise EOFError(f"the file ends {len(into)} bytes too early")
        into, offset = into[count:], offset + count


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write everything at ``offset``; OSError if the disk is full."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def at_once(tasks: Iterable[Callable[[], None]]) -> None:
    """Run all tasks, several at a time; the first error stops those that have not begun and is raised.

    Each computes on one core: together they have them all.
    """
    workers = max(1, min(WORKERS, len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1))
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))
    pool = ThreadPoolExecutor(workers)
    try:
        for future in [pool.submit(task) for task in tasks]:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
