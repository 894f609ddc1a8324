"""The words after ``tessera data``: what to do, and with what.

    tessera data --dataset D                      what the rows of D become (no words)
    tessera data lint|stats|show D ...            the same as --dataset D ...
    tessera data prepare DIR
    tessera data convert llava|sharegpt|messages SRC [OUT]

A word that begins with two dashes is a flag as everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tessera.config.parse import nearest, shown, usage_error

TASKS: Mapping[str, str] = {
    "lint": "tessera data lint D ...: check every row of datasets; exit code 1 if one is wrong",
    "stats": "tessera data stats D ...: counts, sizes, turns and tokens of datasets",
    "show": "tessera data show D ...: one HTML page of samples with their images",
    "prepare": "tessera data prepare DIR --split 9,1,0: write the .nv-meta of a folder of shards",
    "convert": "tessera data convert llava|sharegpt|messages SRC [OUT]: write shards",
}
SOURCES = ("llava", "sharegpt", "messages")


@dataclass(frozen=True, slots=True)
class Task:
    """What ``tessera data`` is asked to do: the ``task``, and ``datasets`` to look at or ``target`` and ``out``."""

    task: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    target: str | None = None
    out: str | None = None


def data_task(words: Sequence[str]) -> Task:
    """The task in the words after ``tessera data``; UserError if they are none."""
    if not words:
        return Task()
    name, rest = words[0], tuple(words[1:])
    if name not in TASKS:
        near = nearest(name, TASKS)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise usage_error(f"tessera data {name}: no such task{hint}; there are {', '.join(TASKS)}")
    if name == "prepare":
        if len(rest) != 1:
            raise usage_error(f"tessera data prepare: expected one directory, got {shown(rest)}")
        return Task((name,), target=rest[0])
    if name == "convert":
        if len(rest) not in (2, 3) or rest[0] not in SOURCES:
            raise usage_error(f"tessera data convert: expected {'|'.join(SOURCES)} SRC [OUT], got {shown(rest)}")
        return Task((name, rest[0]), target=rest[1], out=rest[2] if len(rest) == 3 else None)
    return Task((name,), datasets=rest)
