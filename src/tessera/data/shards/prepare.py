"""Writes ``.nv-meta``: what a folder of shards needs before Energon, or anybody who reads as it does, can use it.

The shards are walked once. Their samples and parts go into ``index.sqlite``, the samples' offsets into a ``.tar.idx``
beside each shard, the number of samples into ``.info.json``. The split divides *shards*, in the order of their names:
of n shards, ``9,1,0`` gives the first 9n/10 to train. ``dataset.yaml`` says what the samples are; it is tried on the
first sample, so that a wrong field map is a mistake now and not in the first step of a training.

Nothing appears under its final name before all shards have been found whole and every key unique.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from tessera.config.errors import UserError
from tessera.data.sample import BadRow
from tessera.data.shards.fields import Fields
from tessera.data.shards.folder import META, SHARD, collapsed, shards_below
from tessera.data.shards.forms import FORMS, form_of
from tessera.data.shards.tar import Place, opened, samples

LAYOUT = "7.4.1"
"""The version of Energon whose layout this is."""

PARTS = ("train", "val", "test")
SHUFFLE_SEED = 42
MODULES: Mapping[str, str] = {"ChatML": "megatron_patch.data.multimodal_dataset"}
"""Where the class of a sample type lives if not in ``megatron.energon``."""

_TABLES = """
CREATE TABLE samples (tar_file_id INTEGER NOT NULL, sample_key TEXT NOT NULL UNIQUE, sample_index INTEGER NOT NULL,
                      byte_offset INTEGER, byte_size INTEGER);
CREATE TABLE sample_parts (tar_file_id INTEGER, sample_index INTEGER, part_name TEXT,
                           content_byte_offset INTEGER, content_byte_size INTEGER);
"""
_INDEXES = """
CREATE INDEX idx_samples_by_tar_and_idx ON samples(tar_file_id, sample_index);
CREATE INDEX idx_sample_parts_seq ON sample_parts(tar_file_id, sample_index, content_byte_offset);
CREATE INDEX idx_sample_parts_full
    ON sample_parts(tar_file_id, sample_index, part_name, content_byte_offset, content_byte_size);
"""
_BATCH = 4096


@dataclass(frozen=True, slots=True)
class Prepared:
    """What was found and written: samples of each shard, shards of each part."""

    counts: Mapping[str, int]
    splits: Mapping[str, Sequence[str]]


def parse_split(text: str) -> tuple[Fraction, ...]:
    """The shares of train, val and test in ``9,1,0`` or ``0.8, 0.1, 0.1``, adding up to 1."""
    try:
        shares = tuple(Fraction(piece.strip()) for piece in text.split(","))
    except (ValueError, ZeroDivisionError):
        shares = ()
    if len(shares) != len(PARTS) or min(shares) < 0 or sum(shares) <= 0:
        raise UserError(f"--split {text}: expected three shares for train, val and test, such as 9,1,0")
    return tuple(share / sum(shares) for share in shares)


def prepare(
    folder: Path,
    split: str,
    sample_type: str | None = None,
    field_map: Mapping[str, str] | None = None,
    *,
    shuffle: bool = False,
    exist_ok: bool = False,
) -> Prepared:
    """Write ``folder/.nv-meta`` and the ``.tar.idx`` files; UserError, and nothing written, if that cannot be.

    ``shuffle`` divides the shards in random order (always the same) instead of that of their names.
    """
    if not folder.is_dir():
        raise UserError(f"tessera data prepare {folder}: no such directory")
    names = sorted(file.relative_to(folder).as_posix() for file in shards_below(folder))
    if not names:
        raise UserError(f"tessera data prepare {folder}: no {SHARD} file in it")
    shares = parse_split(split)
    dataset = definition(sample_type, field_map)
    meta, aside = folder / META, folder / f"{META}.writing-{os.getpid()}"
    if (meta / ".info.json").is_file() and not exist_ok:
        raise UserError(f"tessera data prepare {folder}: is prepared already; --exist_ok true prepares it again")
    splits = divided(names, shares, split, shuffle=shuffle)
    try:
        aside.mkdir()
        offsets = _index(folder, names, aside / "index.sqlite", dataset)
        counts = {name: len(offsets[name]) - 1 for name in names}
        _write(aside, counts, splits, dataset)
        _publish(folder, aside, meta, offsets)
    except OSError as error:
        raise UserError(f"tessera data prepare {folder}: writing failed: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Prepared(counts, splits)


def definition(sample_type: str | None, field_map: Mapping[str, str] | None) -> dict[str, Any] | None:
    """What goes into ``dataset.yaml``, None if no type is given; UserError if it does not make sense."""
    if sample_type is None:
        if field_map:
            raise UserError("--field_map: needs --sample_type, e.g. VQASample")
        return None
    name = sample_type.removesuffix("Sample").removesuffix("Webdataset")
    if name == "Crude":
        if field_map:
            raise UserError("--field_map: samples of type CrudeWebdataset have none")
        return {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    if name not in FORMS:
        known = ", ".join(f"{kind}Sample" for kind in FORMS)
        raise UserError(f"--sample_type {sample_type}: unknown (known: {known}, CrudeWebdataset)")
    module = MODULES.get(name)
    found: dict[str, Any] = (
        {"__module__": module, "__class__": f"{name}Webdataset"}
        if module
        else {"sample_type": {"__module__": "megatron.energon", "__class__": f"{name}Sample"}}
    )
    found["field_map"] = dict(field_map or {})
    form_of(found, "--sample_type " + sample_type)
    return found


def divided(
    names: Sequence[str], shares: Sequence[Fraction], split: str, *, shuffle: bool = False
) -> dict[str, list[str]]:
    """The shards of each part."""
    order = list(names)
    if shuffle:
        random.Random(SHUFFLE_SEED).shuffle(order)
    ends = [int(len(order) * sum(shares[: at + 1], Fraction(0))) for at in range(len(shares))]
    found = {part: order[start:end] for part, start, end in zip(PARTS, [0, *ends], ends, strict=False)}
    if shares[0] and not found["train"]:
        raise UserError(
            f"--split {split}: {len(names)} shard{'s' * (len(names) > 1)} cannot be divided so, train would be empty; "
            "write more shards (--max_samples_per_tar) or choose another split"
        )
    return found


def _index(
    folder: Path, names: Sequence[str], database: Path, dataset: Mapping[str, Any] | None
) -> dict[str, np.ndarray]:
    """Fill ``index.sqlite``; the offsets of each shard's samples and of its end."""
    form = form_of(dataset, "dataset.yaml") if dataset is not None else None
    connection = sqlite3.connect(database)
    offsets: dict[str, np.ndarray] = {}
    try:
        connection.executescript(_TABLES)
        for number, name in enumerate(names):
            starts, end, batch = [], 0, []
            for index, place in enumerate(_walk(folder / name, name)):
                if form is not None:
                    _try(form, folder / name, place)
                    form = None
                starts.append(place.start)
                end = place.end
                batch.append((number, index, place))
                if len(batch) == _BATCH:
                    _insert(connection, batch, names)
                    batch = []
            _insert(connection, batch, names)
            if not starts:
                raise UserError(f"{folder / name}: no samples in it; remove the shard")
            offsets[name] = np.array([*starts, end], dtype="<u8")
        connection.executescript(_INDEXES)
        connection.commit()
    finally:
        connection.close()
    return offsets


def _walk(path: Path, name: str) -> Any:
    """The samples of a shard; UserError where it is not whole."""
    try:
        descriptor = opened(path)
        try:
            yield from samples(descriptor)
        finally:
            os.close(descriptor)
    except BadRow as error:
        raise UserError(f"{name}: {error}; write the shard again") from None


def _try(form: Any, path: Path, place: Place) -> None:
    try:
        form(Fields(path, place.parts))
    except BadRow as error:
        raise UserError(f"--field_map does not fit the first sample ({path.name}: {place.key}): {error}") from None


def _insert(connection: sqlite3.Connection, batch: Sequence[tuple[int, int, Place]], names: Sequence[str]) -> None:
    try:
        connection.executemany(
            "INSERT INTO samples VALUES (?, ?, ?, ?, ?)",
            [(number, place.key, index, place.start, place.end - place.start) for number, index, place in batch],
        )
    except sqlite3.IntegrityError:
        raise UserError(_duplicate(connection, batch, names)) from None
    connection.executemany(
        "INSERT INTO sample_parts VALUES (?, ?, ?, ?, ?)",
        [(number, index, *part) for number, index, place in batch for part in place.parts],
    )


def _duplicate(connection: sqlite3.Connection, batch: Sequence[tuple[int, int, Place]], names: Sequence[str]) -> str:
    """Which key of ``batch`` occurs a second time, and where it was before."""
    seen: dict[str, int] = {}
    for number, index, place in batch:
        found = connection.execute(
            "SELECT tar_file_id FROM samples WHERE sample_key = ? AND NOT (tar_file_id = ? AND sample_index = ?)",
            (place.key, number, index),
        ).fetchone()
        before = seen.get(place.key, found[0] if found else None)
        if before is not None:
            return f"key {place.key!r} is in {names[before]} and again in {names[number]}: keys must be unique"
        seen[place.key] = number
    raise AssertionError("a constraint failed, but no key occurs twice")


def _write(
    aside: Path, counts: Mapping[str, int], splits: Mapping[str, Sequence[str]], dataset: Mapping[str, Any] | None
) -> None:
    import yaml

    info = {"energon_version": LAYOUT, "shard_counts": counts}
    (aside / ".info.json").write_text(json.dumps(info, indent=2), encoding="utf-8")
    parts = {"split_parts": {part: collapsed(names) for part, names in splits.items()}, "exclude": []}
    (aside / "split.yaml").write_text(yaml.dump(parts, sort_keys=False), encoding="utf-8")
    if dataset is not None:
        (aside / "dataset.yaml").write_text(yaml.dump(dict(dataset), sort_keys=False), encoding="utf-8")
    (aside / "index.uuid").write_text(str(uuid.uuid4()), encoding="utf-8")


def _publish(folder: Path, aside: Path, meta: Path, offsets: Mapping[str, np.ndarray]) -> None:
    """Give everything its final name, ``.nv-meta`` last; files of an older one that nobody writes anew stay."""
    for name, found in offsets.items():
        path = (folder / name).with_suffix(".tar.idx")
        written = path.with_name(f".{path.name}.{os.getpid()}")
        written.write_bytes(found.tobytes())
        written.replace(path)
    for file in aside.iterdir():
        with open(file, "rb") as held:
            os.fsync(held.fileno())
    if meta.is_dir():
        kept = [file for file in meta.iterdir() if not (aside / file.name).exists()]
        for file in kept:
            file.rename(aside / file.name)
        old = meta.with_name(f"{meta.name}.old-{os.getpid()}")
        meta.rename(old)
        aside.rename(meta)
        shutil.rmtree(old)
    else:
        aside.rename(meta)
