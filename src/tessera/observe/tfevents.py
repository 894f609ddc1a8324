"""TensorBoard's file format, just enough of it to write scalars.

Importing TensorBoard's own writer costs seconds, which a run would pay before its first step; the format behind it is
thirty lines. A ``tfevents`` file is a sequence of records, each framed by its length and two checksums::

    uint64 length | uint32 crc(length) | length bytes: one protobuf ``Event`` | uint32 crc(bytes)

and an ``Event`` here is one of three: the file version that opens the file; a session start, which tells TensorBoard
that everything already recorded from that step on belongs to a run that was killed (so that a resumed run shows one
line, not two); or a summary of (tag, value) pairs at a step.

The checksum is CRC-32C (Castagnoli), masked: rotated right by 15 bits plus a constant. Protobuf's wire format is
``(field << 3 | type)`` followed by a varint (type 0), 8 bytes (1), a length and bytes (2) or 4 bytes (5).
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO


def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


_CRC_TABLE = _crc_table()


def masked_crc(data: bytes) -> int:
    """TensorFlow's masked CRC-32C of ``data``."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _bytes_field(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _event(step: int, body: bytes) -> bytes:
    return b"\x09" + struct.pack("<d", time.time()) + b"\x10" + _varint(step) + body


class EventFile:
    """A ``tfevents`` file in ``folder``, created by the first write. ``purge_step``: discard what is at or after it."""

    def __init__(self, folder: Path, *, purge_step: int | None = None) -> None:
        self._folder = folder
        self._purge_step = purge_step
        self._file: BinaryIO | None = None

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write ``values`` by tag at ``step`` and flush."""
        summary = b"".join(
            _bytes_field(1, _bytes_field(1, tag.encode()) + b"\x15" + struct.pack("<f", value))
            for tag, value in values.items()
        )
        file = self._open()
        self._record(file, _event(step, _bytes_field(5, summary)))
        file.flush()

    def close(self) -> None:
        """Close the file, if it was ever opened."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> BinaryIO:
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{time.time_ns() // 1000:016d}.{socket.gethostname()}.{os.getpid()}.0"
            self._file = (self._folder / name).open("ab")
            self._record(self._file, _event(0, _bytes_field(3, b"brain.Event:2")))
            if self._purge_step is not None:
                self._record(self._file, _event(self._purge_step, _bytes_field(7, b"\x08\x01")))
        return self._file

    @staticmethod
    def _record(file: BinaryIO, event: bytes) -> None:
        length = struct.pack("<Q", len(event))
        file.write(length + struct.pack("<I", masked_crc(length)) + event + struct.pack("<I", masked_crc(event)))
