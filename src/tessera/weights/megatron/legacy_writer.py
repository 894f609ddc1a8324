"""Writing rank by rank checkpoints: every rank's shards under the names of its own module.

The same tables that put shards together cut them here; see :mod:`tessera.weights.megatron.legacy` for what the files
hold. Ranks are written side by side, each band by band, so that eight ranks need no more memory than one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tessera.weights.files import at_once
from tessera.weights.megatron import archive
from tessera.weights.megatron.legacy import FILES, LAYER
from tessera.weights.megatron.names import local_spelling
from tessera.weights.megatron.ranks import Ranks, shard
from tessera.weights.megatron.stored import Reader
from tessera.weights.megatron.table import Table
from tessera.weights.megatron.tiling import Tile, Tiling

EXTRA = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""Modules that have an extra state, empty here, under Transformer Engine."""


def write(
    folder: Path,
    table: Table,
    dtypes: Mapping[str, torch.dtype],
    ranks: Ranks,
    values: Mapping[str, Tiling],
    reader: Reader,
    common: Mapping[str, Any],
    *,
    local: bool = False,
) -> None:
    """Write every rank's file into the existing, empty directory ``folder``; OSError if the disk refuses.

    ``local``: under the names of Megatron's own modules, not Transformer Engine's, with experts run one by one.
    """

    def write_rank(rank: tuple[int, int, int]) -> None:
        made: dict[archive.Blank, Tiling] = {}
        model: dict[str, Any] = {}
        for name, tiling in _held(table, ranks, rank, local):
            blank = archive.Blank(dtypes[tiling.tiles[0].source], tiling.shape)
            made[blank] = tiling
            model[name] = blank
            module = name.rpartition(".")[0]
            if not local and module.rpartition(".")[2] in EXTRA and not name.startswith("visual."):
                model[f"{module}._extra_state"] = None
        write_file(folder / folder_of(ranks, *rank), {**common, "model": model}, made, values, reader)

    every = product(range(ranks.tp), range(ranks.pp), range(ranks.ep))
    at_once(partial(write_rank, rank) for rank in every)


def write_file(
    folder: Path,
    held: Mapping[str, Any],
    made: Mapping[archive.Blank, Tiling],
    values: Mapping[str, Tiling],
    reader: Reader,
) -> None:
    """Write one rank's ``held``, its :class:`Blank` tensors ``made`` of ``values``; OSError if the disk refuses."""
    folder.mkdir()
    with ExitStack() as stack:
        descriptor = os.open(folder / FILES[0], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        stack.callback(os.close, descriptor)

        def payload(blank: archive.Blank, offset: int) -> None:
            reader.write(made[blank].through(values), blank.dtype, descriptor, offset)

        archive.save(descriptor, 0, held, payload, FILES[0].removesuffix(".pt"))
        os.fsync(descriptor)


def folder_of(ranks: Ranks, tp: int, pp: int, ep: int) -> str:
    """What the directory of a rank is called."""
    parts = [f"mp_rank_{tp:02d}"]
    parts += [f"{pp:03d}"] if ranks.pp > 1 else []
    parts += [f"{ep:03d}"] if ranks.ep > 1 else []
    return "_".join(parts)


def _held(table: Table, ranks: Ranks, rank: tuple[int, int, int], local_modules: bool) -> Iterator[tuple[str, Tiling]]:
    """What a rank holds: its names, and its shards in terms of canonical tensors."""
    tp, pp, ep = rank
    layers = ranks.layers(table.layers)[pp]
    for name, row in table.rows.items():
        if ranks.stage_of(row, table) != pp:
            continue
        local = name
        found = LAYER.fullmatch(name)
        if found is not None and row.layer is not None:
            local = f"{found[1]}{row.layer - layers.start}.{found[3]}"
        if local_modules:
            local = local_spelling(local, sparse=False, sharded=False)
        mine = shard(name, row, ranks, tp, ep)
        if not row.split.experts:
            yield local, mine
            continue
        stem, leaf = local.split(".experts.experts.")
        for expert in range(mine.shape[0]):
            tiles = (Tile(t.source, (_one(t.inside[0], expert), *t.inside[1:]), t.where[1:]) for t in mine.tiles)
            alone, grouped = f"{stem}.experts.local_experts.{expert}.{leaf}", f"{stem}.experts.{leaf}{expert}"
            yield alone if local_modules else grouped, Tiling(mine.shape[1:], tuple(tiles))
    if table.tied and ranks.pp > 1 and pp == ranks.pp - 1:
        yield table.head, shard(table.embedding, table.rows[table.embedding], ranks, tp, ep)


def _one(experts: slice, at: int) -> slice:
    return slice(experts.start + at, experts.start + at + 1)
