"""Opening a Megatron checkpoint directory, whatever its format, and showing it under our names.

    <root>/latest_checkpointed_iteration.txt      "10" or "release"
    <root>/iter_0000010/ or <root>/release/       with metadata.json: torch_dist; with mp_rank_*: one file per rank

The root, the iteration's own directory, or one of an older iteration can be named. :class:`OurNames` is a checkpoint of
the interface of :class:`~tessera.weights.hf.Checkpoint` whose tensors are called as in memory, so that a model, sharded
or not, loads from here as it loads from safetensors: slice by slice, through an identical weight map.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.config.errors import UserError
from tessera.config.sources import TRACKER
from tessera.contract.model import Family, HFConfig
from tessera.contract.weightmap import WeightMap
from tessera.models.init import drawn
from tessera.weights.files import Entry
from tessera.weights.hf import Checkpoint, shapes_of
from tessera.weights.megatron import legacy, torch_dist
from tessera.weights.megatron.assembled import Assembled, assemble, fitting
from tessera.weights.megatron.stored import Reader
from tessera.weights.megatron.tiling import Shape
from tessera.weights.megatron.towers import dialects_of, make_table

TORCH_DIST, LEGACY = "torch_dist", "torch"


@dataclass(frozen=True, slots=True)
class Megatron:
    """A checkpoint that was found: ``path`` holds the tensors, ``root`` the tracker and what lies beside it."""

    root: Path
    path: Path
    format: str

    @property
    def iteration(self) -> int | None:
        """The training iteration, None of a release."""
        found = re.fullmatch(r"iter_(\d+)", self.path.name)
        return int(found[1]) if found else None

    @property
    def common(self) -> Mapping[str, Any]:
        """What is not a tensor: ``args``, ``iteration``, ..."""
        return torch_dist.common(self.path) if self.format == TORCH_DIST else legacy.common(self.path)

    @property
    def args(self) -> Namespace | None:
        """The arguments of the job that wrote it, if it says so."""
        found = self.common.get("args")
        return found if isinstance(found, Namespace) else None

    def assembled(
        self, family: Family, config: HFConfig, dialect: str | None = None, *, absent: Sequence[str] = ()
    ) -> Assembled:
        """Its tensors as those of a model; UserError unless they are exactly the model's.

        The dialect is found out by the names if it is not given. Tensors whose Megatron names begin with one of
        ``absent`` (a projection that is yet to be trained) need not be there.
        """
        if self.format == TORCH_DIST:
            found = torch_dist.read(self.path)
            table = make_table(family, config, dialect or self._dialect(family, config, found.tilings))
            return assemble(found, table, absent)
        files = legacy.read(self.path)
        table = make_table(family, config, dialect or self._dialect(family, config, files.names))
        return assemble(files.merged(table), table, absent)

    def _dialect(self, family: Family, config: HFConfig, names: Mapping[str, object]) -> str:
        """The dialect in which most of the names make sense."""
        tables = {dialect: make_table(family, config, dialect) for dialect in dialects_of(family)}
        if not tables:
            raise UserError(f"model_type {family.name!r}: no Megatron toolkit has a layout for it")
        return max(tables, key=lambda dialect: len(fitting(names, tables[dialect])))


def locate(path: Path) -> Megatron:
    """The checkpoint at ``path``: a root (its latest iteration) or one iteration; UserError if there is none."""
    if not path.is_dir():
        raise UserError(f"--mcore_model {path}: no such directory")
    own = _format(path)
    if own is not None:
        inside = path.name == "release" or path.name.startswith("iter_")
        return Megatron(path.parent if inside else path, path, own)
    held = path / TRACKER
    if held.is_file():
        text = held.read_text("utf-8", "replace").strip()
        if text != "release" and not text.isdigit():
            raise UserError(f'{held}: expected an iteration or "release", found {text[:40]!r}')
        folder = path / ("release" if text == "release" else f"iter_{int(text):07d}")
    else:
        found = _iterations(path)
        if not found:
            raise UserError(
                f"--mcore_model {path}: no Megatron checkpoint (neither {TRACKER} nor iter_* nor mp_rank_*)"
            )
        folder = found[-1]
    kind = _format(folder)
    if kind is None:
        reason = "is missing" if not folder.is_dir() else "holds neither metadata.json nor mp_rank_*"
        raise UserError(f"{folder}: {reason}, although {path} names it as the latest checkpoint")
    return Megatron(path, folder, kind)


def _format(path: Path) -> str | None:
    if (path / "metadata.json").is_file() or (path / torch_dist.METADATA).is_file():
        return TORCH_DIST
    return LEGACY if any(path.glob("mp_rank_*")) else None


def _iterations(path: Path) -> list[Path]:
    return sorted(p for p in (*path.glob("iter_*"), path / "release") if _format(p) is not None)


class OurNames(Checkpoint):
    """A Megatron checkpoint as one whose tensors are called and shaped as in memory."""

    def __init__(self, assembled: Assembled, root: Path) -> None:
        self.path = root
        self.metadata = {}
        self.assembled = assembled
        self._tilings = assembled.ours()
        self._reader = Reader(assembled.stored)
        types = assembled.our_dtypes()
        self.entries = {
            name: Entry(assembled.path.name, types[name], tiling.shape, 0, prod(tiling.shape) * types[name].itemsize)
            for name, tiling in self._tilings.items()
        }

    @property
    def weightmap(self) -> WeightMap:
        """Names in memory are those of this checkpoint."""
        return WeightMap()

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> Tensor:
        """The tensor ``name`` on the CPU, or the ``part`` of it that these slices cut out."""
        return self._reader.read(self._tilings[name], part, self.entries[name].dtype)


class Completed(OurNames):
    """The same with tensors that the checkpoint lacks (``shapes``): drawn, a function of their names alone."""

    def __init__(self, assembled: Assembled, root: Path, shapes: Mapping[str, Shape], config: HFConfig) -> None:
        super().__init__(assembled, root)
        self._config = config
        self._drawn = {name: shape for name, shape in shapes.items() if name not in self.entries}
        dtype = next(entry.dtype for entry in self.entries.values() if entry.dtype.is_floating_point)
        self.entries |= {name: Entry("", dtype, shape, 0, 0) for name, shape in self._drawn.items()}

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> Tensor:
        """As :meth:`OurNames.read`."""
        if name not in self._drawn:
            return super().read(name, part)
        value = drawn(name, self._drawn[name], self._config, 0).to(self.entries[name].dtype)
        return value if part is None else value[part]


def open_as_ours(
    path: Path, family: Family, config: HFConfig, dialect: str | None = None, *, absent: Sequence[str] = ()
) -> OurNames:
    """The Megatron checkpoint at ``path`` under the names of ``family``'s modules; every tensor accounted for.

    ``absent``: as in :meth:`Megatron.assembled`; what is not there is drawn.
    """
    found = locate(path)
    assembled = found.assembled(family, config, dialect, absent=absent)
    if not assembled.absent:
        return OurNames(assembled, found.root)
    with torch.device("meta"):
        shapes = shapes_of(family.build(config))
    return Completed(assembled, found.root, shapes, config)
