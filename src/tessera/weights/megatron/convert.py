"""Conversions: Hugging Face to Megatron, back, and from one Megatron layout to another; streaming and exact.

Each is a composition of tilings, planned before a byte is read::

    to_megatron     rank's shard <- Megatron's tensor <- ours <- safetensors
    to_hf           safetensors <- ours <- Megatron's tensor <- rank's shard
    reshard         rank's shard <- Megatron's tensor <- another rank's shard

and then written band by band, so memory does not grow with the model. Values are moved, never computed: what is
converted and converted back is the same bits. Tensors that are fused from several of different types get the widest.

A converted directory also holds what lies beside the weights (config, tokenizer, processor) and, in ``hf_layout.json``,
how the safetensors files were laid out, so that the way back can restore names, order, shards and types.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from tessera.config.errors import UserError
from tessera.contract.model import Family, HFConfig
from tessera.contract.shards import whole
from tessera.contract.weightmap import WeightMap
from tessera.weights.files import DTYPES, Entry, Writer, at_once
from tessera.weights.hf import INDEX, Checkpoint, account, check_copy, copy_side_files, shapes_of
from tessera.weights.megatron import legacy_writer, torch_dist_writer
from tessera.weights.megatron.assembled import Assembled
from tessera.weights.megatron.checkpoint import LEGACY, TORCH_DIST
from tessera.weights.megatron.options import Options, common, stacks, vocabulary
from tessera.weights.megatron.publish import publishing
from tessera.weights.megatron.stored import Reader, Stored
from tessera.weights.megatron.table import Row, Table
from tessera.weights.megatron.tiling import Shape, Tile, Tiling
from tessera.weights.megatron.towers import make_table
from tessera.weights.saving import Saving, bytes_of, some, write_index

LAYOUT = "hf_layout.json"


@dataclass(frozen=True, slots=True)
class Account:
    """What a conversion did: tensors and elements placed, and what of the source it left out, by name.

    ``rounded`` are tensors whose recorded type is narrower than the one they had: values were rounded to it.
    """

    tensors: int
    parameters: int
    left_out: tuple[str, ...]
    dialect: str
    rounded: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Source:
    """Our tensors in terms of what is ``stored``, and their types."""

    path: Path
    tilings: Mapping[str, Tiling]
    dtypes: Mapping[str, torch.dtype]
    stored: Mapping[str, Stored]
    left_out: tuple[str, ...] = ()


def from_hf(checkpoint: Checkpoint, family: Family, config: HFConfig) -> Source:
    """Our tensors as they lie in a Hugging Face checkpoint; UserError unless they are exactly the model's."""
    with torch.device("meta"):
        shapes = shapes_of(family.build(config))
    weightmap, left_out = account(shapes, checkpoint, family.weightmap(config, list(checkpoint.names)))
    tilings = {}
    for name, shape in shapes.items():
        tilings[name] = _from_disk(weightmap, name, shape)
        for copy in weightmap.copies(name):
            check_copy(checkpoint, copy, weightmap.to_disk(name), whole(shape))
    stored = stored_in(checkpoint)
    dtypes = {name: stored[tiling.tiles[0].source].dtype for name, tiling in tilings.items()}
    return Source(checkpoint.path, tilings, dtypes, stored, left_out)


def from_megatron(assembled: Assembled) -> Source:
    """Our tensors as they lie in a Megatron checkpoint."""
    return Source(assembled.path, assembled.ours(), assembled.our_dtypes(), assembled.stored)


def stored_in(checkpoint: Checkpoint) -> dict[str, Stored]:
    """Where each tensor of a safetensors checkpoint lies."""
    begins = {}
    for file in checkpoint.metadata:
        with (checkpoint.path / file).open("rb") as stream:
            begins[file] = 8 + struct.unpack("<Q", stream.read(8))[0]
    return {
        name: Stored(checkpoint.path / e.file, begins[e.file] + e.start, e.dtype, e.shape)
        for name, e in checkpoint.entries.items()
    }


def _from_disk(weightmap: WeightMap, name: str, shape: Shape) -> Tiling:
    """One of our tensors in terms of disk tensors."""
    tiles = []
    for piece in weightmap.pieces(name, shape):
        found = piece.overlap(whole(shape))
        assert found is not None, f"{piece} holds nothing of {name}"
        inside, where = found
        tiles.append(Tile(piece.disk, inside, where, piece.turned))
    return Tiling(shape, tuple(tiles))


def to_megatron(source: Source, family: Family, config: HFConfig, root: Path, options: Options) -> Account:
    """Write ``source`` as a Megatron checkpoint into the existing directory ``root``: the iteration, then the tracker.

    UserError if the layout cannot be; OSError if the disk refuses (nothing is left under the iteration's name).
    """
    table = make_table(family, config, options.dialect)
    values = {name: tiling.through(source.tilings) for name, tiling in table.tilings.items()}
    dtypes = widest(table, source.dtypes, options.dtype)
    write(root, table, values, dtypes, source.stored, options, config)
    return Account(len(table.rows), _elements(table), source.left_out, options.dialect)


def write(
    root: Path,
    table: Table,
    values: Mapping[str, Tiling],
    dtypes: Mapping[str, torch.dtype],
    stored: Mapping[str, Stored],
    options: Options,
    config: HFConfig,
) -> None:
    """Write the tensors of ``table`` as an iteration below ``root``, which the tracker then names."""
    ranks = options.ranks
    whole_table, table = table, table.for_ranks(ranks.tp, vocabulary(table, options))
    ranks.check(table)
    with Reader(stored) as reader:
        _check_cut(whole_table, table, values, reader)
    values = {name: _fitted(values[name], row) for name, row in table.rows.items()}
    held = common(table, dtypes, options, config)
    with Reader(stored) as reader, publishing(root, options.iteration) as aside:
        if options.format == TORCH_DIST:
            stacked = stacks(table, options)
            if not stacked:
                held["content_metadata"] = {"non_homogeneous_layers": True}
            plan = torch_dist_writer.plan(table, dtypes, ranks, stacked=stacked, local=options.local)
            torch_dist_writer.write(aside, plan, values, reader, held)
        else:
            del held["content_metadata"]
            legacy_writer.write(aside, table, dtypes, ranks, values, reader, held, local=options.local)


def reshard(assembled: Assembled, family: Family, config: HFConfig, root: Path, options: Options) -> Account:
    """Write a Megatron checkpoint for other ranks, in another format or dialect, into the existing directory ``root``.

    Errors as of :func:`to_megatron`.
    """
    source = from_megatron(assembled)
    if assembled.table.dialect == options.dialect:
        # The same tensors: nothing needs to go through ours, and types of single ones are kept.
        table = make_table(family, config, options.dialect)
        dtypes = {name: _asked(name, dtype, options.dtype) for name, dtype in assembled.dtypes.items()}
        values = {name: _trimmed(assembled.tilings[name], row.shape) for name, row in table.rows.items()}
        write(root, table, values, dtypes, assembled.stored, options, config)
        return Account(len(table.rows), _elements(table), (), options.dialect)
    return to_megatron(source, family, config, root, options)


def _fitted(tiling: Tiling, row: Row) -> Tiling:
    """A tensor as long as the row of the table is."""
    axis = row.split.axis
    return tiling if axis is None else tiling.resized(axis, row.shape[axis])


def _check_cut(before: Table, after: Table, values: Mapping[str, Tiling], reader: Reader) -> None:
    """UserError if what is cut off as empty heads is not: it would be lost."""
    for name, row in after.rows.items():
        axis = row.split.axis
        if axis is not None and row.shape[axis] < before.rows[name].shape[axis]:
            part = list(whole(before.rows[name].shape))
            part[axis] = slice(row.shape[axis], part[axis].stop)
            if reader.read(values[name], tuple(part)).count_nonzero():
                raise UserError(
                    f"{name}: has values in heads that must be empty, beyond the {row.split.least} that count"
                )


def _trimmed(tiling: Tiling, shape: Shape) -> Tiling:
    """The beginning of a tensor, without what was padding."""
    return Tiling(shape, tuple(tiling.within(whole(shape))))


def to_hf(
    source: Source,
    family: Family,
    config: HFConfig,
    out: Path,
    *,
    layout: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
) -> Account:
    """Write our tensors as safetensors into the existing directory ``out``.

    ``layout``: a directory that says how, by its ``hf_layout.json`` or safetensors files of its own; else the family's
    released names, in shards of ``max_shard_size``. OSError if the disk refuses.
    """
    origin, index = _layout(layout)
    names = list(origin.entries) if origin is not None else []
    shapes = {name: tiling.shape for name, tiling in source.tilings.items()}
    weightmap = family.weightmap(config, names)
    if origin is not None:
        weightmap = weightmap.settled(shapes, {name: entry.shape for name, entry in origin.entries.items()})
    left_out: tuple[str, ...] = ()
    if origin is not None:
        origin, left_out = _known(origin, weightmap, shapes)
        index = None if left_out else index
    tensors = {name: (source.dtypes[name], shape) for name, shape in shapes.items()}
    saving = Saving.planned(tensors, weightmap, origin=origin, dtype=dtype, max_shard_size=bytes_of(max_shard_size))
    placed = _disk_tensors(saving, shapes)
    with ExitStack() as stack, Reader(source.stored) as reader:
        writer = Writer(out, saving.entries, origin.metadata if origin else {}, stack)

        def write_tensor(name: str) -> None:
            reader.write(placed[name].through(source.tilings), saving.entries[name].dtype, *writer.place(name))

        at_once(partial(write_tensor, name) for name in saving.entries)
    if index is not None and origin is not None and saving.entries == origin.entries:
        (out / INDEX).write_text(index, "utf-8")
    else:
        write_index(out, saving.entries, None)
    elements = sum(prod(entry.shape) for entry in saving.entries.values())
    return Account(len(saving.entries), elements, left_out, "", _rounded(saving, placed, source))


def _rounded(saving: Saving, placed: Mapping[str, Tiling], source: Source) -> tuple[str, ...]:
    """Disk tensors of a type that does not hold everything that the type of their source does."""
    found = []
    for name, entry in saving.entries.items():
        types = {source.dtypes[tile.source] for tile in placed[name].tiles}
        if any(torch.promote_types(dtype, entry.dtype) != entry.dtype for dtype in types if dtype != entry.dtype):
            found.append(name)
    return tuple(found)


def _disk_tensors(saving: Saving, shapes: Mapping[str, Shape]) -> dict[str, Tiling]:
    """Every disk tensor in terms of ours."""
    tiles: dict[str, list[Tile]] = {}
    for name, pieces in saving.pieces.items():
        for piece in pieces:
            found = piece.overlap(whole(shapes[name]))
            assert found is not None, f"{piece} holds nothing of {name}"
            inside, where = found
            tiles.setdefault(piece.disk, []).append(Tile(name, where, inside, piece.turned))
    return {disk: Tiling(saving.entries[disk].shape, tuple(held)) for disk, held in tiles.items()}


class _Layout(Checkpoint):
    """The names, types and places of a checkpoint whose values lie elsewhere."""

    def __init__(self, path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, dict[str, str]]) -> None:
        self.path, self.entries, self.metadata = path, dict(entries), dict(metadata)


def _layout(folder: Path | None) -> tuple[Checkpoint | None, str | None]:
    """The layout that ``folder`` records, and the text of its index; None if it records none."""
    if folder is None:
        return None, None
    if (folder / LAYOUT).is_file():
        try:
            held = json.loads((folder / LAYOUT).read_text("utf-8"))
            entries = {
                name: Entry(file, DTYPES[dtype], tuple(shape), start, end)
                for file, fields in held["files"].items()
                for name, (dtype, shape, start, end) in fields["tensors"].items()
            }
            return _Layout(folder, entries, {file: f["metadata"] for file, f in held["files"].items()}), held["index"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / LAYOUT}: not readable ({error}); delete it to get released names") from error
    if any(folder.glob("*.safetensors")):
        found = Checkpoint(folder)
        index = folder / INDEX
        return found, index.read_text("utf-8") if index.is_file() else None
    return None, None


def _known(origin: Checkpoint, weightmap: WeightMap, shapes: Mapping[str, Shape]) -> tuple[Checkpoint, tuple[str, ...]]:
    """``origin`` without what the model does not hold, packed anew; and what that is.

    UserError if it is the layout of another model.
    """
    needed = {p.disk: p.shape(shape) for name, shape in shapes.items() for p in weightmap.pieces(name, shape)}
    other = sorted(d for d, s in needed.items() if d not in origin.entries or origin.entries[d].shape != s)
    if other:
        raise UserError(f"{origin.path}: its layout is that of another model; {len(other)} differ: {some(other)}")
    disk = set(needed)
    disk |= {copy for name in shapes for copy in weightmap.copies(name)}
    left_out = tuple(sorted(origin.entries.keys() - disk))
    if not left_out:
        return origin, ()
    entries: dict[str, Entry] = {}
    ends: dict[str, int] = {}
    for name, entry in sorted(origin.entries.items(), key=lambda item: item[1].start):
        if name in disk:
            start = ends.get(entry.file, 0)
            ends[entry.file] = start + entry.end - entry.start
            entries[name] = Entry(entry.file, entry.dtype, entry.shape, start, ends[entry.file])
    return _Layout(origin.path, entries, origin.metadata), left_out


def write_side_files(checkpoint: Checkpoint, root: Path, dtype: torch.dtype | None = None) -> None:
    """Beside the weights of ``root``: config, tokenizer and processor of ``checkpoint``, and how its files lie."""
    copy_side_files(checkpoint.path, root, dtype)
    names = {value: name for name, value in DTYPES.items()}
    files: dict[str, Any] = {
        file: {"metadata": metadata, "tensors": {}} for file, metadata in checkpoint.metadata.items()
    }
    for name, entry in checkpoint.entries.items():
        files[entry.file]["tensors"][name] = [names[entry.dtype], list(entry.shape), entry.start, entry.end]
    index = checkpoint.path / INDEX
    text = index.read_text("utf-8") if index.is_file() else None
    (root / LAYOUT).write_text(json.dumps({"files": files, "index": text}), "utf-8")


def widest(table: Table, ours: Mapping[str, torch.dtype], asked: torch.dtype | None) -> dict[str, torch.dtype]:
    """The type of every Megatron tensor: the widest of what it consists of, or the one asked for."""
    found = {}
    for name, row in table.rows.items():
        types = list(dict.fromkeys(ours[tile.source] for tile in row.tiling.tiles))
        dtype = types[0]
        for other in types[1:]:
            dtype = torch.promote_types(dtype, other)
        found[name] = _asked(name, dtype, asked)
    return found


def _asked(name: str, found: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    """The type a Megatron tensor gets; that of a router's correction bias is part of its meaning."""
    changes = asked is not None and found.is_floating_point and not name.endswith(".expert_bias")
    return asked if changes and asked is not None else found


def _elements(table: Table) -> int:
    return sum(prod(shape) for shape in table.ours.values())


__all__ = [
    "LEGACY",
    "TORCH_DIST",
    "Account",
    "Options",
    "Source",
    "from_hf",
    "from_megatron",
    "reshard",
    "to_hf",
    "to_megatron",
]
