"""Writing ``torch_dist`` checkpoints, chunk by chunk, as a job of given ranks would have.

What each rank would write is known from the table alone, so the files are planned first and filled one after the other,
band by band; no tensor is ever whole in memory. Readers find chunks by their offsets, whatever layout they run in, so a
checkpoint for one rank loads on many and the other way round.

Two things are for readers only. Modules of Transformer Engine ask for an ``_extra_state`` each: an empty one is written
for every module that any version asks for (what is not asked for is ignored). And ``common.pt`` holds the arguments of
the job, which Megatron compares with its own.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tessera.contract.shards import whole
from tessera.weights.files import at_once, write_all
from tessera.weights.megatron import archive
from tessera.weights.megatron.names import local_spelling
from tessera.weights.megatron.ranks import Ranks, shard
from tessera.weights.megatron.stored import Reader
from tessera.weights.megatron.table import Row, Table
from tessera.weights.megatron.tiling import Shape, Tile, Tiling, extents
from tessera.weights.megatron.torch_dist import METADATA, Chunk

THREADS = 2
LAYER = re.compile(r"(.*\.|)(layers|deepstack_merger_list)\.(\d+)\.(.*)")
LINEAR = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
ADAPTERS = ("default",)
NORMS = ("q_layernorm", "k_layernorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm")


@dataclass(frozen=True, slots=True)
class Planned:
    """A chunk to be written: its tensor on disk, where in it, what it consists of, and which rank writes it."""

    name: str
    offset: Shape
    tiling: Tiling
    rank: int


@dataclass(frozen=True, slots=True)
class Plan:
    """All chunks of a checkpoint, the global shapes and types, and the names of empty extra states by rank."""

    chunks: tuple[Planned, ...]
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, torch.dtype]
    extras: Mapping[str, int]


def plan(table: Table, dtypes: Mapping[str, torch.dtype], ranks: Ranks, *, stacked: bool, local: bool = False) -> Plan:
    """What ``ranks`` would write; ``stacked``: blocks of equal layers as one tensor each.

    ``local``: under the names of Megatron's own modules.
    """
    counts = _stackable(table, dtypes) if stacked else {}
    size = max(ranks.tp, ranks.expert_tp * ranks.ep)
    chunks: list[Planned] = []
    shapes: dict[str, Shape] = {}
    types: dict[str, torch.dtype] = {}
    extras: dict[str, int] = {}
    for name, row in table.rows.items():
        first = ranks.stage_of(row, table) * size
        spelled = local_spelling(name, sparse=row.layer in table.sparse, sharded=True) if local else name
        disk, layer, count = _on_disk(spelled, counts)
        lead = () if layer is None else (layer,)
        shapes[disk] = (*((count,) if lead else ()), *row.shape)
        types[disk] = dtypes[name]
        for rank, box in _boxes(name, row, ranks):
            offset = tuple(cut.start for cut in box)
            shape = (*(1 for _ in lead), *extents(box))
            tiling = Tiling(shape, (Tile(name, box, whole(shape)),))
            chunks.append(Planned(disk, (*lead, *offset), tiling, first + rank))
        for extra in _extra_states(name, row, layer, count, disk):
            extras[extra] = first
    return Plan(tuple(chunks), shapes, types, extras)


def _stackable(table: Table, dtypes: Mapping[str, torch.dtype]) -> dict[str, int]:
    """The number of layers of each block ("decoder.layers") whose layers are all alike."""
    blocks: dict[str, dict[int, dict[str, tuple[Shape, torch.dtype]]]] = {}
    for name, row in table.rows.items():
        found = LAYER.fullmatch(name)
        # transformers' own modules are no blocks of Megatron's; one dialect never stacks its mergers, for they nest.
        if found is not None and not name.startswith("visual.") and ".encoder." not in found[4]:
            block = blocks.setdefault(f"{found[1]}{found[2]}", {})
            block.setdefault(int(found[3]), {})[found[4]] = (row.shape, dtypes[name])
    return {block: len(layers) for block, layers in blocks.items() if all(one == layers[0] for one in layers.values())}


def _on_disk(name: str, counts: Mapping[str, int]) -> tuple[str, int | None, int]:
    """What a tensor is called on disk, its place in dimension 0 there if it is stacked, and that dimension's size."""
    found = LAYER.fullmatch(name)
    block = f"{found[1]}{found[2]}" if found else ""
    if found is None or block not in counts:
        return name, None, 1
    return f"{block}.{found[4]}", int(found[3]), counts[block]


def _boxes(name: str, row: Row, ranks: Ranks) -> Iterator[tuple[int, tuple[slice, ...]]]:
    """The boxes that ranks of a stage write, each by the first rank that has it; experts one by one."""
    split = row.split
    tensor = 1 if split.axis is None else ranks.expert_tp if split.experts else ranks.tp
    for ep in range(ranks.ep if split.experts else 1):
        for tp in range(tensor):
            for tile in shard(name, row, ranks, tp, ep).tiles:
                rank = ep * ranks.expert_tp + tp if split.experts else tp
                if not split.experts:
                    yield rank, tile.inside
                    continue
                for expert in range(tile.inside[0].start, tile.inside[0].stop):
                    yield rank, (slice(expert, expert + 1), *tile.inside[1:])


def _extra_states(name: str, row: Row, layer: int | None, count: int, disk: str) -> Iterator[str]:
    """Keys of the extra states that readers may ask for because of the tensor ``name``, called ``disk``."""
    if name.startswith("visual."):
        return
    module = disk.rpartition(".")[0]
    shard_of = "shard_0_1" if layer is None else f"shard_{layer}_{count}"
    if row.split.experts:
        for expert in range(row.shape[0]):
            own = f"shard_{expert}_{row.shape[0]}"
            stacked = f"shard_{layer}.{expert}_{count}.{row.shape[0]}"
            yield f"{module}._extra_state/{own if layer is None else stacked}"
    elif module.rpartition(".")[2] in LINEAR + NORMS + ADAPTERS:
        yield f"{module}._extra_state/{shard_of}"
        if module.endswith(".self_attention.linear_qkv"):
            yield f"{module.removesuffix('linear_qkv')}core_attention._extra_state/{shard_of}"


def write(folder: Path, planned: Plan, values: Mapping[str, Tiling], reader: Reader, common: Mapping[str, Any]) -> None:
    """Write the checkpoint into the existing, empty directory ``folder``; OSError if the disk refuses.

    ``values`` are the tensors of the table in terms of what ``reader`` reads.
    """
    placed: dict[tuple[str, Shape], Chunk] = {}
    objects: dict[str, Chunk] = {}

    def write_file(file: str, chunks: Sequence[Planned], extras: Sequence[str]) -> None:
        with ExitStack() as stack:
            descriptor = os.open(folder / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            stack.callback(os.close, descriptor)

            def put(made: Tiling | None, blank: archive.Blank, offset: int) -> None:
                assert made is not None, "an extra state holds no tensor"
                reader.write(made, blank.dtype, descriptor, offset)

            at = 0
            for chunk in chunks:
                made = chunk.tiling.through(values)
                blank = archive.Blank(planned.dtypes[chunk.name], made.shape)
                length = archive.save(descriptor, at, blank, partial(put, made))
                placed[chunk.name, chunk.offset] = Chunk(chunk.offset, made.shape, file, at, length)
                at += length
            for name in extras:
                length = archive.save(descriptor, at, [None], partial(put, None))
                objects[name] = Chunk((), (), file, at, length)
                at += length
            os.fsync(descriptor)

    at_once(partial(write_file, *held) for held in _files(planned))
    torch.save(dict(common), folder / "common.pt")
    version = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    version |= {"common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(version), "utf-8")
    _write_metadata(folder / METADATA, planned, placed, objects)


def _files(planned: Plan) -> Iterator[tuple[str, list[Planned], list[str]]]:
    """File by file what goes into it: of each rank, chunks spread evenly over the files it writes."""
    ranks = sorted({chunk.rank for chunk in planned.chunks})
    for rank in ranks:
        mine = [chunk for chunk in planned.chunks if chunk.rank == rank]
        held: list[list[Planned]] = [[] for _ in range(THREADS)]
        sizes = [0] * THREADS
        for chunk in mine:
            least = sizes.index(min(sizes))
            held[least].append(chunk)
            sizes[least] += torch.Size(chunk.tiling.shape).numel() * planned.dtypes[chunk.name].itemsize
        extras = [name for name, owner in planned.extras.items() if owner == rank]
        for number, chunks in enumerate(held):
            if chunks or (extras and not number):
                yield f"__{rank}_{number}.distcp", chunks, [] if number else extras


def _write_metadata(
    file: Path, planned: Plan, placed: Mapping[tuple[str, Shape], Chunk], objects: Mapping[str, Chunk]
) -> None:
    """The table of contents, without which the directory is no checkpoint; written last."""
    import pickle

    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    described: dict[str, Any] = {}
    stored: dict[MetadataIndex, Any] = {}
    for written in planned.chunks:
        name, offset = written.name, written.offset
        chunk = placed[name, offset]
        if name not in described:
            properties = TensorProperties(dtype=planned.dtypes[name])
            described[name] = TensorStorageMetadata(properties, torch.Size(planned.shapes[name]), [])
        parts = described[name].chunks
        stored[MetadataIndex(name, offset, len(parts))] = _StorageInfo(chunk.file, chunk.start, chunk.length)
        parts.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(chunk.shape)))
    for name in planned.extras:
        chunk = objects[name]
        described[name] = BytesStorageMetadata()
        stored[MetadataIndex(name)] = _StorageInfo(chunk.file, chunk.start, chunk.length)
    data = pickle.dumps(Metadata(described, None, stored))
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        write_all(descriptor, data, 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
