"""``torch.save`` files, read and written without holding what is in them.

Such a file is an uncompressed zip: a pickle, ``data.pkl``, that refers to storages by number, and a record
``data/<number>`` for each, 64 bytes aligned. Reading takes the pickle (see :mod:`tessera.weights.megatron.unpickle`)
and the table of records, so that each tensor is a :class:`Stored` place in the file. Writing gets the tensors as
:class:`Blank` (type and shape), writes the pickle, then says where the payload of each record belongs. A file may hold
several such archives one after the other (``.distcp``).

Records of tensors carry no checksum, as in files that torch writes after ``set_crc32_options(False)``: torch does not
look at it, and without one the bytes need not pass through this process.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from tessera.config.errors import UserError
from tessera.weights.files import write_all
from tessera.weights.megatron.stored import Stored
from tessera.weights.megatron.tiling import Shape
from tessera.weights.megatron.unpickle import loads

STORAGES: Mapping[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
"""Types by the classes that pickles name."""

ALIGNMENT = 64
_LOCAL, _CENTRAL = 30, 46
_LARGE = 0xFFFFFFFF


class _Window(io.RawIOBase):
    """``length`` bytes of a file, as a file."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self._descriptor, self._start, self._length, self._at = descriptor, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._length - self._at, 0)
        data = os.pread(self._descriptor, left if size is None or size < 0 else min(size, left), self._start + self._at)
        self._at += len(data)
        return data


@dataclass(frozen=True, slots=True)
class _Storage:
    """A record of the archive: its place in the file, its type, its length in elements."""

    offset: int
    dtype: torch.dtype
    count: int


def load(file: Path, start: int = 0, length: int | None = None) -> Any:
    """The object that ``torch.save`` put at ``start``, its tensors as :class:`Stored` places; UserError if damaged."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    try:
        size = os.fstat(descriptor).st_size
        length = size - start if length is None else length
        if start + length > size:
            raise UserError(f"{file}: is cut short ({size} bytes of {start + length}); copy the checkpoint again")
        with zipfile.ZipFile(_Window(descriptor, start, length)) as archive:
            return _load(archive, descriptor, file, start)
    except (zipfile.BadZipFile, struct.error, KeyError, NotImplementedError) as error:
        reason = "not a file that torch.save writes, or cut short"
        raise UserError(f"{file}: {reason} ({error}); copy the checkpoint again") from error
    finally:
        os.close(descriptor)


def _load(archive: zipfile.ZipFile, descriptor: int, file: Path, start: int) -> Any:
    names = archive.namelist()
    (data,) = [name for name in names if name.endswith("/data.pkl")] or [""]
    root = data.removesuffix("data.pkl")
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
        raise UserError(f"{file}: was written on a big-endian machine, which is not supported")

    def storage(key: Any) -> _Storage:
        _, dtype, number, _, count = key
        record = archive.getinfo(f"{root}data/{number}")
        local = os.pread(descriptor, _LOCAL, start + record.header_offset)
        name, extra = struct.unpack("<HH", local[26:30])
        return _Storage(start + record.header_offset + _LOCAL + name + extra, dtype, count)

    def tensor(held: _Storage, at: int, size: Shape, stride: Shape, *rest: Any) -> Stored:
        # The third version carries the type, since its storage has none.
        dtype = rest[2] if len(rest) > 2 and isinstance(rest[2], torch.dtype) else held.dtype
        plain = tuple(stride) == tuple(prod(size[i + 1 :]) for i in range(len(size))) or prod(size) <= 1
        return Stored(file, held.offset + at * dtype.itemsize, dtype, tuple(size), None if plain else tuple(stride))

    known: dict[tuple[str, str], Any] = {("torch", name): dtype for name, dtype in STORAGES.items()}
    known |= {("torch.storage", name): dtype for name, dtype in STORAGES.items()}
    known |= {("torch._utils", f"_rebuild_tensor_v{version}"): tensor for version in (2, 3)}
    known["torch._utils", "_rebuild_parameter"] = lambda value, *_: value
    known["torch.nn.parameter", "Parameter"] = lambda value, *_: value
    return loads(archive.read(data), str(file), known, storage)


@dataclass(frozen=True, slots=True, eq=False)
class Blank:
    """A tensor to be written: type and shape; its values come when its record does."""

    dtype: torch.dtype
    shape: Shape

    def __reduce__(self) -> tuple[Any, ...]:
        strides = tuple(prod(self.shape[at + 1 :]) for at in range(len(self.shape)))
        # The function that torch.load calls for every tensor.
        rebuild = torch._utils._rebuild_tensor_v2
        return rebuild, (_Record(self), 0, self.shape, strides, False, OrderedDict())


@dataclass(frozen=True, slots=True)
class _Record:
    """The storage of a tensor, by which a pickle refers to it."""

    tensor: Blank


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, records: list[Blank]) -> None:
        super().__init__(stream, protocol=2)
        self._records = records
        self._names = {dtype: name for name, dtype in STORAGES.items() if name != "UntypedStorage"}

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Record):
            return None
        blank = obj.tensor
        if blank.dtype not in self._names:
            raise UserError(
                f"tensors of type {blank.dtype} cannot be written in Megatron's formats; convert them first"
            )
        self._records.append(blank)
        storage = vars(torch)[self._names[blank.dtype]]
        return "storage", storage, str(len(self._records) - 1), "cpu", prod(blank.shape)


def save(descriptor: int, start: int, value: Any, payload: Callable[[Blank, int], None], root: str = "archive") -> int:
    """Write ``value`` at ``start`` as ``torch.save`` would, each :class:`Blank` in it as a tensor; bytes written.

    ``payload(blank, offset)`` writes the bytes of a blank at that offset of the file. OSError if the disk refuses.
    """
    records: list[Blank] = []
    stream = io.BytesIO()
    _Pickler(stream, records).dump(value)
    archive = _Archive(descriptor, start, root)
    archive.add("data.pkl", stream.getvalue())
    archive.add("byteorder", b"little")
    for number, blank in enumerate(records):
        offset = archive.reserve(f"data/{number}", prod(blank.shape) * blank.dtype.itemsize)
        payload(blank, offset)
    archive.add("version", b"3\n")
    return archive.close()


class _Archive:
    """A zip of stored records that begins anywhere in a file."""

    def __init__(self, descriptor: int, start: int, root: str) -> None:
        self._descriptor, self._start, self._root = descriptor, start, root
        self._at = 0
        self._entries: list[tuple[bytes, int, int, int]] = []

    def add(self, name: str, data: bytes) -> None:
        """A record of these bytes, its data aligned within the archive."""
        write_all(self._descriptor, data, self.reserve(name, len(data), zlib.crc32(data)))

    def reserve(self, name: str, size: int, checksum: int = 0) -> int:
        """A record of so many bytes, which are the caller's to write; the offset in the file where they belong."""
        label = f"{self._root}/{name}".encode()
        header = self._at
        # Room for the sizes of a record beyond 4 GiB, then padding, which torch marks as "FB" fields.
        ahead = header + _LOCAL + len(label) + 20 + 4
        padding = -ahead % ALIGNMENT
        extra = 20 + 4 + padding
        large = size >= _LARGE
        shown = _LARGE if large else size
        fields = struct.pack("<HHQQ", 1, 16, size, size) if large else struct.pack("<HH16s", 0x4246, 16, b"Z" * 16)
        fields += struct.pack("<HH", 0x4246, padding) + b"Z" * padding
        local = struct.pack(
            "<IHHHHHIIIHH", 0x04034B50, 45 if large else 20, 0, 0, 0, 0x21, checksum, shown, shown, len(label), extra
        )
        write_all(self._descriptor, local + label + fields, self._start + header)
        self._entries.append((label, header, size, checksum))
        data = header + _LOCAL + len(label) + extra
        self._at = data + size
        return self._start + data

    def close(self) -> int:
        """Write the table of records; the length of the archive."""
        begin = self._at
        table = b"".join(_central(*entry) for entry in self._entries)
        size, count = len(table), len(self._entries)
        if begin >= _LARGE or size >= _LARGE or count >= 0xFFFF:
            end = begin + size
            table += struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, size, begin)
            table += struct.pack("<IIQI", 0x07064B50, 0, end, 1)
        shown = (min(count, 0xFFFF), min(size, _LARGE), min(begin, _LARGE))
        table += struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, shown[0], shown[0], shown[1], shown[2], 0)
        write_all(self._descriptor, table, self._start + begin)
        return begin + len(table)


def _central(label: bytes, header: int, size: int, checksum: int) -> bytes:
    """One row of the table of records."""
    wide: list[int] = [*([size, size] if size >= _LARGE else []), *([header] if header >= _LARGE else [])]
    extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    shown = min(size, _LARGE)
    version = 45 if wide else 20
    row = struct.pack(
        "<IHHHHHHIIIHHHHHII",
        0x02014B50, version, version, 0, 0, 0, 0x21, checksum, shown, shown,
        len(label), len(extra), 0, 0, 0, 0, min(header, _LARGE),
    )  # fmt: skip
    return row + label + extra


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What nested dictionaries hold, by dotted name."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def tensors(value: Any) -> Iterator[tuple[str, Stored]]:
    """The tensors in nested dictionaries, by dotted name."""
    return ((name, held) for name, held in leaves(value) if isinstance(held, Stored))
