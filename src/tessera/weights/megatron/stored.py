"""Tensors that lie in files, and the bytes of others made of them, band by band.

A :class:`Stored` tensor is a place: file, offset, type, shape. Nothing is read until a region is asked for, and then
only its bytes. Most tensors are long runs of bytes in another order: these never come here, the kernel copies them from
file to file. The others are produced in *bands* of a few megabytes, each filled from its sources in one of two ways:
long runs are read one by one; anything else (columns of a matrix, a transpose, another type) is copied through a
mapping of the file that lives for that one copy. Memory is the band, however large the model.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from tessera.config.errors import UserError
from tessera.contract.shards import Part, boxes, whole
from tessera.weights.files import STEP, copy_bytes, runs, start_writing, write_all
from tessera.weights.megatron.tiling import Shape, Tile, Tiling, extents

BAND = 4 * 2**20
"""Bytes of a band: small enough to stay in the processor's cache from reading to writing."""

RUN = 16 * 2**10
"""Bytes from which on a run is read by itself rather than through a mapping."""

STRAIGHT = 64 * 2**10
"""Bytes from which on runs are copied from file to file."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file, ``offset`` bytes from its beginning; ``strides`` (in elements) if it is not contiguous."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: Shape
    strides: Shape | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class _Run:
    """``count`` bytes at ``begin`` of a file, which belong ``target`` bytes behind the beginning of a tensor."""

    file: Path
    begin: int
    target: int
    count: int


class Reader:
    """Regions of tensors made of ``stored`` ones, by name; use it as a context, it keeps files open."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self.stored = stored
        self._open: dict[Path, int] = {}
        self._lock = Lock()
        self._stack = ExitStack()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._stack.close()
        self._open.clear()

    def read(self, tiling: Tiling, part: Part | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The region ``part`` (default: all) of a tensor, in ``dtype`` (default: the widest of its sources)."""
        part = whole(tiling.shape) if part is None else part
        out = torch.empty(extents(part), dtype=dtype or self.dtype(tiling))
        self.fill(tiling, part, out)
        return out

    def write(self, tiling: Tiling, dtype: torch.dtype, descriptor: int, offset: int) -> None:
        """Write a tensor as ``dtype`` into an open file, from ``offset`` on; what is nowhere to be read is zero.

        OSError if the disk refuses.
        """
        straight = self._straight(tiling, dtype)
        if straight is not None:
            for run in straight:
                try:
                    copy_bytes(self._descriptor(run.file), run.begin, descriptor, offset + run.target, run.count)
                except EOFError:
                    raise _cut_short(run.file) from None
            return
        written = begun = offset
        for values in self._bands(tiling, dtype):
            write_all(descriptor, values.numpy().data, written)
            written += values.numel()
            if written - begun >= STEP:
                start_writing(descriptor, begun, written - begun)
                begun = written
        start_writing(descriptor, begun, written - begun)

    def _straight(self, tiling: Tiling, dtype: torch.dtype) -> list[_Run] | None:
        """A tensor as long runs of bytes of other files; None if it is not made of such."""
        found: list[_Run] = []
        for tile in tiling.tiles:
            source = self.stored[tile.source]
            if source.dtype != dtype or source.strides is not None or tile.turned:
                return None
            from_starts, from_length = runs(source.shape, tile.inside)
            to_starts, to_length = runs(tiling.shape, tile.where)
            length = min(from_length, to_length)
            count = length * dtype.itemsize
            if count < STRAIGHT and length != prod(tiling.shape):
                return None
            pairs = zip(_cut(from_starts, from_length, length), _cut(to_starts, to_length, length), strict=True)
            size = dtype.itemsize
            found += [_Run(source.file, source.offset + one * size, two * size, count) for one, two in pairs]
        # Zeros where nothing is: bytes of a fresh file that nobody writes are that already, but not of a full disk's.
        return found if sum(run.count for run in found) == prod(tiling.shape) * dtype.itemsize else None

    def _bands(self, tiling: Tiling, dtype: torch.dtype) -> Iterator[Tensor]:
        """The bytes of a tensor in pieces that follow each other, flat uint8; each is valid until the next."""
        size = dtype.itemsize
        buffer = torch.empty(min(BAND, max(prod(tiling.shape) * size, 1)), dtype=torch.uint8)
        for part in boxes(tiling.shape, max(BAND // size, 1)):
            shape = extents(part)
            values = buffer[: prod(shape) * size]
            self.fill(tiling, part, values.view(dtype).view(shape))
            yield values

    def dtype(self, tiling: Tiling) -> torch.dtype:
        """The type that holds what the sources of a tensor hold."""
        types = [self.stored[name].dtype for name in {tile.source: None for tile in tiling.tiles}]
        found = types[0]
        for other in types[1:]:
            found = torch.promote_types(found, other) if found != other else found
        return found

    def fill(self, tiling: Tiling, part: Part, out: Tensor) -> None:
        """Put the region ``part`` of a tensor into ``out``, contiguous and of the region's shape."""
        assert out.is_contiguous()
        tiles = list(tiling.within(part))
        if sum(prod(extents(tile.where)) for tile in tiles) < out.numel():
            out.zero_()
        for tile in tiles:
            where = tuple(slice(w.start - p.start, w.stop - p.start) for w, p in zip(tile.where, part, strict=True))
            self._copy(self.stored[tile.source], tile, where, out)

    def _copy(self, source: Stored, tile: Tile, where: Part, out: Tensor) -> None:
        size = out.dtype.itemsize
        count = prod(extents(where))
        if not count:
            return
        if source.dtype == out.dtype and source.strides is None and not tile.turned:
            from_starts, from_length = runs(source.shape, tile.inside)
            to_starts, to_length = runs(tuple(out.shape), where)
            length = min(from_length, to_length)
            if length * size >= RUN or length == count:
                flat = out.reshape(-1).view(torch.uint8).numpy().data
                one, two = _cut(from_starts, from_length, length), _cut(to_starts, to_length, length)
                for begin, target in zip(one, two, strict=True):
                    run = flat[target * size : (target + length) * size]
                    self._read_all(source, source.offset + begin * size, run)
                return
        value = self._mapped(source, tile.inside)
        if tile.turned:
            value = value.transpose(-1, -2)
        out[where].copy_(value.reshape(extents(where)))

    def _read_all(self, source: Stored, offset: int, run: memoryview) -> None:
        descriptor = self._descriptor(source.file)
        while run:
            got = os.preadv(descriptor, [run], offset)
            if not got:
                raise _cut_short(source.file)
            run, offset = run[got:], offset + got

    def _mapped(self, source: Stored, part: Part) -> Tensor:
        """A view of the region ``part`` of a stored tensor; its mapping goes with the view."""
        size = source.dtype.itemsize
        strides = source.strides or _strides(source.shape)
        first = sum(cut.start * stride for cut, stride in zip(part, strides, strict=True))
        last = sum((cut.stop - 1) * stride for cut, stride in zip(part, strides, strict=True))
        begin = source.offset + first * size
        end = source.offset + (last + 1) * size
        descriptor = self._descriptor(source.file)
        if os.fstat(descriptor).st_size < end:
            raise _cut_short(source.file)
        at = begin - begin % mmap.ALLOCATIONGRANULARITY
        mapping = mmap.mmap(descriptor, end - at, access=mmap.ACCESS_COPY, offset=at)
        flat = torch.frombuffer(mapping, dtype=torch.uint8, count=end - begin, offset=begin - at)
        if begin % size:  # torch views need alignment; files written by others may not have it
            flat = flat.clone()
        return flat.view(source.dtype).as_strided(extents(part), strides)

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._open:
                try:
                    self._open[file] = os.open(file, os.O_RDONLY)
                except OSError as error:
                    raise UserError(f"{file}: cannot be read ({error.strerror})") from error
                self._stack.callback(os.close, self._open[file])
            return self._open[file]


def _cut_short(file: Path) -> UserError:
    return UserError(f"{file}: is cut short; copy the checkpoint again")


def _strides(shape: Shape) -> Shape:
    return tuple(prod(shape[at + 1 :]) for at in range(len(shape)))


def _cut(starts: list[int], length: int, wanted: int) -> Iterator[int]:
    """The starts of runs of ``wanted`` elements, which divides the ``length`` of those given."""
    assert length % wanted == 0
    return (start + at for start in starts for at in range(0, length, wanted))
