"""A tar file as a list of places: what is in it, and at which byte, without reading any of it.

A tar file is a chain of 512-byte headers, each followed by its member's bytes, padded to 512::

    | header 17.jpg | ...jpeg... | header 17.json | {...} | header 18.jpg | ...        members
    | sample 17                                           | sample 18                  one key, one behind the other

A *sample* is a run of members with one key: the path up to the first dot of its last component; what follows the dot
names the *part*. Whoever knows where a sample begins can read it alone, which is all that random access needs. The
standard library's ``tarfile`` builds an object per member; this walks ten times as fast and checks each header's
checksum, so a shard that ends too early, or an index of another version of the file, is noticed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tessera.data.sample import BadRow

BLOCK = 512
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_HIDDEN = re.compile(r"__[^/]*__($|/)")
_LONG, _PAX, _PAX_GLOBAL = b"L", b"x", b"g"
_REGULAR = (b"0", b"\0", b"7")


class Member(NamedTuple):
    """A file in a tar: its ``name``, where its headers begin, where its bytes lie and how many they are."""

    name: str
    start: int
    offset: int
    size: int

    @property
    def end(self) -> int:
        """Where the next member begins."""
        return self.offset + -(-self.size // BLOCK) * BLOCK


class Part(NamedTuple):
    """One part of a sample: its name (``jpg``) and where its bytes lie in the shard."""

    name: str
    offset: int
    size: int


class Place(NamedTuple):
    """A sample in a shard: its key, its parts, and the bytes [start, end) of their members."""

    key: str
    parts: tuple[Part, ...]
    start: int
    end: int


class Truncated(BadRow):
    """The shard ends inside the member ``name``, or holds something else than a header where one should be."""

    def __init__(self, reason: str, name: str = "") -> None:
        super().__init__(reason)
        self.name = name


def split_name(name: str) -> tuple[str, str] | None:
    """(key, part) of a member's name; None if it belongs to no sample."""
    if _HIDDEN.match(name):
        return None
    found = _NAME.match(name)
    return (found[1], found[2]) if found else None


def members(descriptor: int, start: int = 0, end: int | None = None) -> Iterator[Member]:
    """The regular files from byte ``start`` on (the beginning of a member), up to ``end`` or the end of the archive.

    Raises Truncated where the file stops before it should.
    """
    size = os.fstat(descriptor).st_size
    at, first, long_name, long_size = start, start, "", -1
    while end is None or at < end:
        head = os.pread(descriptor, BLOCK, at)
        if not head:
            reason = f"the shard ends at byte {size} without an end mark: truncated" if size else "the shard is empty"
            raise Truncated(reason)
        if head.count(0) == len(head):
            return  # two zero blocks end an archive; one will do
        if len(head) < BLOCK:
            raise Truncated(f"the shard ends at byte {size}, inside a header: truncated")
        _verify(head, at)
        kind, length = head[156:157], long_size if long_size >= 0 else _number(head[124:136])
        member = Member(long_name or _plain_name(head), first, at + BLOCK, length)
        if member.offset + length > size:
            raise Truncated(f"the shard ends at byte {size}, inside {member.name}: truncated", member.name)
        at = member.end
        if kind == _LONG:
            long_name = os.pread(descriptor, length, member.offset).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif kind == _PAX:
            records = _records(os.pread(descriptor, length, member.offset))
            long_name = records.get("path", long_name)
            long_size = int(records.get("size", long_size))
        elif kind != _PAX_GLOBAL:
            if kind in _REGULAR:
                yield member
            first, long_name, long_size = at, "", -1


def samples(descriptor: int) -> Iterator[Place]:
    """The samples of a whole shard, in order; Truncated behind the last complete one if the shard is."""
    key, start, end = "", 0, 0
    parts: list[Part] = []
    try:
        for member in members(descriptor):
            named = split_name(member.name)
            if named is None:
                continue
            if named[0] != key or not parts:
                if parts:
                    yield Place(key, tuple(parts), start, member.start)
                key, parts, start = named[0], [], member.start
            parts.append(Part(named[1], member.offset, member.size))
            end = member.end
    except Truncated as error:
        named = split_name(error.name)
        if parts and (named is None or named[0] != key):
            yield Place(key, tuple(parts), start, end)
        raise
    if parts:
        yield Place(key, tuple(parts), start, end)


def sample_at(descriptor: int, start: int, end: int) -> Place:
    """The sample whose members fill the bytes [start, end); BadRow if they do not hold one."""
    size = os.fstat(descriptor).st_size
    if start >= size:
        raise Truncated(f"the shard ends at byte {size}, before this sample: truncated")
    key = ""
    parts: list[Part] = []
    for member in members(descriptor, start, end):
        named = split_name(member.name)
        if named is None:
            continue
        if parts and named[0] != key:
            break  # only an index that skips a sample, or of another file, ends anywhere else
        key = named[0]
        parts.append(Part(named[1], member.offset, member.size))
    if not parts:
        raise BadRow("no sample where the shard's index says: it belongs to another version of the shard")
    return Place(key, tuple(parts), start, end)


def opened(path: Path) -> int:
    """A descriptor of the shard; BadRow says why there is none."""
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise BadRow(f"shard not found: {path}") from None
    except OSError as error:
        raise BadRow(f"cannot read shard {path}: {error.strerror or error}") from None


def _verify(head: bytes, at: int) -> None:
    """Truncated unless the 512 bytes are a header."""
    try:
        wanted = _number(head[148:156])
    except ValueError:
        wanted = -1
    if sum(head) - sum(head[148:156]) + 8 * 32 != wanted:
        what = "not an uncompressed tar file" if at == 0 else f"no header at byte {at}: the shard is damaged"
        raise Truncated(what)


def _number(field: bytes) -> int:
    """An octal number, or the base-256 form that sizes above 8 GiB take."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    return int(field.rstrip(b"\0 ") or b"0", 8)


def _plain_name(head: bytes) -> str:
    name = head[:100].split(b"\0", 1)[0]
    if head[257:263] == b"ustar\0" and head[345]:
        name = head[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _records(data: bytes) -> dict[str, str]:
    """``<length> <key>=<value>\\n`` records of a pax header."""
    found: dict[str, str] = {}
    while data[:1].isdigit():
        length = int(data.split(b" ", 1)[0])
        key, _, value = data[:length].split(b" ", 1)[1].rstrip(b"\n").partition(b"=")
        found[key.decode()] = value.decode("utf-8", "surrogateescape")
        data = data[length:]
    return found
