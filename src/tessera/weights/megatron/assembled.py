"""A checkpoint's tensors under a table's names: what both formats come to when they are read.

Whatever lies on disk (chunks, shards of ranks, stacked or single layers), a format offers *found* tensors: canonical
names, each tiled by what is stored. :func:`assemble` then holds them against a table. Nothing is left open: a tensor
that is missing, one the model has no place for and one of another shape stop the reading with their names. Only what
readers of these formats agree to add is allowed to be more: rows beyond the vocabulary, empty heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tessera.config.errors import UserError
from tessera.weights.megatron.names import spellings
from tessera.weights.megatron.stored import Stored
from tessera.weights.megatron.table import Table
from tessera.weights.megatron.tiling import Shape, Tiling
from tessera.weights.saving import some


@dataclass(frozen=True, slots=True)
class Found:
    """Tensors of a checkpoint: tilings by canonical name in terms of ``stored`` ones, and their types."""

    path: Path
    tilings: Mapping[str, Tiling]
    dtypes: Mapping[str, torch.dtype]
    stored: Mapping[str, Stored]


@dataclass(frozen=True, slots=True)
class Assembled:
    """The tensors of a model: those of ``table`` in terms of what is ``stored``.

    ``absent``: rows of the table that are not there, because they may be absent.
    """

    path: Path
    table: Table
    tilings: Mapping[str, Tiling]
    dtypes: Mapping[str, torch.dtype]
    stored: Mapping[str, Stored]
    absent: frozenset[str] = frozenset()

    def ours(self) -> dict[str, Tiling]:
        """Our tensors in terms of what is stored, without absent ones."""
        inverse = self.table.inverse.items()
        return {name: tiling.through(self.tilings) for name, tiling in inverse if not self._lacks(tiling)}

    def our_dtypes(self) -> dict[str, torch.dtype]:
        """The types of our tensors."""
        inverse = self.table.inverse.items()
        return {name: self.dtypes[tiling.tiles[0].source] for name, tiling in inverse if not self._lacks(tiling)}

    def _lacks(self, tiling: Tiling) -> bool:
        return any(tile.source in self.absent for tile in tiling.tiles)


def fitting(names: Mapping[str, object], table: Table) -> dict[str, str]:
    """Which of the found ``names`` is which canonical one of the table, as far as there is one."""
    found = {}
    for name in table.rows:
        for spelled in (name, *spellings(name)):
            # A sparse layer may have both spellings' owners: its own norm, and another module's.
            if spelled in names and (spelled == name or spelled not in table.rows):
                found[name] = spelled
                break
    return found


def assemble(found: Found, table: Table, absent: Sequence[str] = ()) -> Assembled:
    """Hold what was found against what the model has; UserError with the names where they differ.

    Tensors whose names begin with one of ``absent`` need not be there.
    """
    called = fitting(found.tilings, table)
    copies = {table.head} if table.tied else set()  # the last pipeline stage holds the embedding a second time
    spare = sorted(found.tilings.keys() - set(called.values()) - copies)
    missing = sorted(table.rows.keys() - called.keys())
    spared = frozenset(name for name in missing if name.startswith(tuple(absent)))
    missing = [name for name in missing if name not in spared]
    resized, wrong = _sizes(table, {name: found.tilings[spelled].shape for name, spelled in called.items()})
    holes = sorted(name for name, spelled in called.items() if not found.tilings[spelled].is_full)
    problems = {"missing": missing, "unexpected": spare, "of another shape": wrong, "incomplete": holes}
    told = [f"{len(names)} {kind}: {some(names)}" for kind, names in problems.items() if names]
    if told:
        raise UserError(f"{found.path}: tensors do not fit config.json; {'; '.join(told)}")
    tilings = {name: found.tilings[spelled] for name, spelled in called.items()}
    dtypes = {name: found.dtypes[spelled] for name, spelled in called.items()}
    return Assembled(found.path, table.resized(resized), tilings, dtypes, found.stored, spared)


def _sizes(table: Table, shapes: Mapping[str, Shape]) -> tuple[dict[str, int], list[str]]:
    """Tensors that are of another length than the model's where they may be, and those that differ otherwise."""
    resized, wrong = {}, []
    for name, shape in shapes.items():
        row = table.rows[name]
        if shape == row.shape:
            continue
        axis = row.split.axis
        least = row.shape[axis or 0] if name in (table.embedding, table.head) else row.split.least
        same = axis is not None and len(shape) == len(row.shape) and all(
            one == two or (at == axis and one >= least > 0)
            for at, (one, two) in enumerate(zip(shape, row.shape, strict=True))
        )  # fmt: skip
        if same and axis is not None:
            resized[name] = shape[axis]
        else:
            wrong.append(f"{name} (model {list(row.shape)}, file {list(shape)})")
    return resized, wrong
