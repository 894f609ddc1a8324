"""The models that a new one is put together from, and which of their tensors goes where.

A model has three groups of tensors, its plan's ``vit``, ``aligner`` and ``llm``. A new model takes each group from one
:class:`Part`, or draws it from a seed::

    part 1   vit  aligner  llm                   new    vit  aligner  llm
              |      x      x          ----->            |      |      |
    part 2                  llm                          |     seed    |
                             +---------------------------|-------------+

Because all our models name the tensors of a group alike, a tensor's place follows from its name. Its values are read in
blocks of a few rows and written to their places at once (``weights/saving.py``), whatever layout they have on either
side: memory does not grow with the models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from tessera.checkpoint import open as door
from tessera.config.errors import UserError
from tessera.contract.model import HFConfig
from tessera.contract.plan import Plan, within
from tessera.contract.shards import Part as Region
from tessera.contract.shards import whole
from tessera.contract.weightmap import Piece, WeightMap
from tessera.models import init
from tessera.models.families import family_of
from tessera.models.families.pairing import built
from tessera.weights import hf

Shape = tuple[int, ...]
GROUPS: Mapping[str, str] = {"vit": "--vision", "aligner": "--aligner", "llm": "--llm"}
"""The flag that says where a group comes from."""

BLOCK = 16 * 2**20
"""Bytes of a tensor that are read before they are written."""


@dataclass(frozen=True, slots=True)
class Part:
    """A model directory and the ``groups`` that are taken from it; ``shapes`` are those of all its tensors."""

    source: door.Source
    groups: tuple[str, ...]
    shapes: Mapping[str, Shape]
    weightmap: WeightMap

    @classmethod
    def open(cls, path: Path, groups: tuple[str, ...]) -> Part:
        """Read the headers; UserError unless the directory holds exactly the tensors that its config describes."""
        source = door.read(path)
        shapes = hf.shapes_of(built(source.config))
        weightmap, _ = hf.account(shapes, source.checkpoint, source.weightmap)
        return cls(source, groups, shapes, weightmap)

    @property
    def label(self) -> str:
        """The groups by their flags, for a table."""
        return "+".join(GROUPS[group].removeprefix("--") for group in self.groups)

    @property
    def language_model(self) -> str:
        """The module that is the decoder."""
        return self.source.plan.groups.llm[0]

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """The disk tensors that are our tensor ``name``."""
        return self.weightmap.pieces(name, self.shapes[name])

    def dtype(self, name: str) -> torch.dtype:
        """The type of our tensor ``name`` on disk."""
        return self.source.checkpoint.entries[self.pieces(name)[0].disk].dtype

    def values(self, name: str) -> Iterator[tuple[Region, Tensor]]:
        """Our tensor ``name`` in blocks of whole rows, and where in it each belongs."""
        shape, pieces, dtype = self.shapes[name], self.pieces(name), self.dtype(name)
        for region in blocks(shape, dtype):
            found = hf.regions(self.source.checkpoint, pieces, region)
            if len(pieces) == 1:
                yield region, next(found)[1]
                continue
            value = torch.empty([cut.stop - cut.start for cut in region], dtype=dtype)
            for where, piece in found:
                value[where].copy_(piece)
            yield region, value

    def check_ties(self) -> None:
        """UserError unless stored copies of a tied embedding are copies."""
        checkpoint = self.source.checkpoint
        for tie in self.weightmap.ties:
            original = self.weightmap.to_disk(tie.ours)
            hf.check_copy(checkpoint, tie.copy, original, whole(checkpoint.entries[original].shape))


def blocks(shape: Shape, dtype: torch.dtype) -> Iterator[Region]:
    """Regions of whole rows, of at most :data:`BLOCK` bytes or one row each, that make up a tensor."""
    if not shape:
        yield ()
        return
    rows = max(1, BLOCK // max(1, prod(shape[1:]) * dtype.itemsize))
    for start in range(0, shape[0], rows):
        yield (slice(start, min(start + rows, shape[0])), *whole(shape[1:]))


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a new tensor comes from: tensor ``name`` of ``part``, with ``more`` rows that it does not have there."""

    part: Part
    name: str
    more: int = 0


@dataclass(frozen=True, slots=True)
class Composition:
    """A new model: shapes, types and origins (None: drawn from the seed) of its tensors, by our names.

    ``known`` is the number of embeddings that stand for a token of the language model.
    """

    config: HFConfig
    plan: Plan
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, torch.dtype]
    weightmap: WeightMap
    origins: Mapping[str, Origin | None]
    known: int

    @classmethod
    def of(cls, config: HFConfig, parts: Sequence[Part], dtype: torch.dtype | None, known: int) -> Composition:
        """The model of ``config`` from ``parts``, in ``dtype`` (None: each tensor's own).

        UserError if a part's tensors are too large or small for it.
        """
        family = family_of(config)
        plan, shapes = family.plan(config), hf.shapes_of(built(config))
        giving = {group: part for part in parts for group in part.groups}
        origins = {name: _origin(plan, name, shape, giving) for name, shape in shapes.items()}
        tower = giving["vit"]
        fresh = tower.dtype(next(name for name in tower.shapes if tower.source.plan.groups.of(name) == "vit"))
        own = {n: fresh if origin is None else origin.part.dtype(origin.name) for n, origin in origins.items()}
        dtypes = {n: dtype if dtype is not None and found.is_floating_point else found for n, found in own.items()}
        return cls(config, plan, shapes, dtypes, family.weightmap(config, ()), origins, known)

    def values(self, name: str, seed: int) -> Iterator[tuple[Region, Tensor]]:
        """The tensor ``name`` in blocks, and where in it each belongs."""
        origin, shape = self.origins[name], self.shapes[name]
        if origin is None:
            yield whole(shape), init.drawn(name, shape, self.config, seed)
            return
        yield from origin.part.values(origin.name)
        if origin.more:
            mean = self._mean(origin).to(self.dtypes[name])
            end = shape[0] - origin.more
            for first, *rest in blocks((origin.more, *shape[1:]), self.dtypes[name]):
                region = (slice(end + first.start, end + first.stop), *rest)
                yield region, mean.expand(first.stop - first.start, -1)

    def _mean(self, origin: Origin) -> Tensor:
        """The mean ``[H] float64`` of the rows that stand for a token."""
        total = torch.zeros(origin.part.shapes[origin.name][1:], dtype=torch.float64)
        for region, value in origin.part.values(origin.name):
            total += value[: max(0, self.known - region[0].start)].sum(0, dtype=torch.float64)
        return total / self.known


def _origin(plan: Plan, name: str, shape: Shape, giving: Mapping[str, Part]) -> Origin | None:
    """Where the new model's tensor ``name`` comes from."""
    group = plan.groups.of(name)
    part = giving.get(group)
    if part is None:
        return None
    own = name
    if group == "llm" and within(plan.groups.llm[:1], name):
        own = part.language_model + name.removeprefix(plan.groups.llm[0])
    found = part.shapes.get(own)
    fits = found is not None and found[1:] == shape[1:]
    if not fits or found is None or found[0] > shape[0] or (found[0] < shape[0] and group != "llm"):
        holds = "is not there" if found is None else f"is {list(found)}"
        way_out = "; --aligner init makes a new one" if group == "aligner" else ""
        raise UserError(
            f"{GROUPS[group]} {part.source.path}: {own} {holds}, the new model needs {list(shape)}{way_out}"
        )
    return Origin(part, own, shape[0] - found[0])
