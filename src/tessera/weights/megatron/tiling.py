"""One idea carries every layout: a tensor is tiled by boxes of other tensors; what no tile covers is padding.

Fused projections, interleaved heads, gate beside up, stacked layers and experts, the shard of a tensor rank, padded
rows: each says "this box here is that box there". A linear_qkv of two groups, for instance, with two query heads each::

    rows  0:16  q_proj[0:16]      rows 16:24  k_proj[0:8]       rows 24:32  v_proj[0:8]
    rows 32:48  q_proj[16:32]     rows 48:56  k_proj[8:16]      rows 56:64  v_proj[8:16]

A :class:`Tile` is one such statement, a :class:`Tiling` all of them for one tensor. They are an algebra: tilings
compose (shard <- Megatron's tensor <- ours <- file), which is how a slice of anything finds its bytes, and a table of
them can be inverted, so that the two directions of a conversion cannot drift apart.

Shapes are aligned at the right: where one side has more dimensions, its box has extent 1 in them (an expert's [F, H]
in [E, F, H], a layer's [H] in [L, H]). A ``turned`` tile swaps the last two dimensions on the way.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod

from tessera.contract.shards import Part, whole

Shape = tuple[int, ...]


def extents(part: Part) -> Shape:
    """Sizes of a box."""
    return tuple(cut.stop - cut.start for cut in part)


def box(*ranges: tuple[int, int]) -> Part:
    """A box from (start, stop) pairs."""
    return tuple(slice(start, stop) for start, stop in ranges)


def meet(one: Part, two: Part) -> Part | None:
    """The box that two boxes share, None if they share nothing."""
    found = []
    for a, b in zip(one, two, strict=True):
        low, high = max(a.start, b.start), min(a.stop, b.stop)
        if low >= high:
            return None
        found.append(slice(low, high))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Tile:
    """The box ``where`` of a tensor has the values of the box ``inside`` of the tensor ``source``."""

    source: str
    inside: Part
    where: Part
    turned: bool = False

    def __post_init__(self) -> None:
        one = list(extents(self.inside))
        if self.turned:
            one[-2:] = one[:-3:-1]
        two = list(extents(self.where))
        size = min(len(one), len(two))
        fits = one[len(one) - size :] == two[len(two) - size :]
        rest = one[: len(one) - size] + two[: len(two) - size]
        assert fits and all(extent == 1 for extent in rest), f"boxes differ: {self}"

    def seen_through(self, part: Part) -> Part:
        """The box of ``source`` that the box ``part``, within ``where``, takes its values from."""
        moved = [(p.start - w.start, p.stop - w.start) for p, w in zip(part, self.where, strict=True)]
        size = min(len(moved), len(self.inside))
        moved = moved[len(moved) - size :]
        if self.turned:
            moved[-2:] = moved[:-3:-1]
        ahead = len(self.inside) - size
        shifted = (slice(i.start + a, i.start + b) for i, (a, b) in zip(self.inside[ahead:], moved, strict=True))
        return (*self.inside[:ahead], *shifted)

    def swapped(self, target: str) -> Tile:
        """The same statement about ``source``, whose values are then those of ``target``."""
        return Tile(target, self.where, self.inside, self.turned)


@dataclass(frozen=True)
class Tiling:
    """A tensor of this ``shape``, put together from boxes of others that do not overlap."""

    shape: Shape
    tiles: tuple[Tile, ...]

    @cached_property
    def _rows(self) -> tuple[list[Tile], list[int], list[int]]:
        """The tiles by where they begin in dimension 0, their beginnings, and how far the tiles so far reach."""
        tiles = sorted(self.tiles, key=lambda tile: tile.where[0].start if tile.where else 0)
        starts = [tile.where[0].start if tile.where else 0 for tile in tiles]
        ends = list(accumulate((tile.where[0].stop if tile.where else 1 for tile in tiles), max))
        return tiles, starts, ends

    def within(self, part: Part) -> Iterator[Tile]:
        """What the box ``part`` consists of; ``where`` of each tile is relative to the whole tensor."""
        tiles, starts, ends = self._rows
        rows = part[0] if part else slice(0, 1)
        for tile in tiles[bisect_right(ends, rows.start) : bisect_left(starts, rows.stop)]:
            shared = meet(tile.where, part)
            if shared is not None:
                inside = tile.seen_through(shared)
                yield Tile(tile.source, inside, shared, tile.turned)

    def resized(self, dim: int, size: int) -> Tiling:
        """The same with ``size`` places along a dimension: what is beyond is cut off, what is added is padding."""
        shape = (*self.shape[:dim], size, *self.shape[dim + 1 :])
        kept = whole((*self.shape[:dim], min(size, self.shape[dim]), *self.shape[dim + 1 :]))
        return Tiling(shape, tuple(self.within(kept)))

    @property
    def covered(self) -> int:
        """How many elements have a source."""
        return sum(prod(extents(tile.where)) for tile in self.tiles)

    @property
    def is_full(self) -> bool:
        """Whether nothing is padding."""
        return self.covered == prod(self.shape)

    def through(self, sources: Mapping[str, Tiling]) -> Tiling:
        """The same tensor in terms of what its sources consist of; what is padding in them is padding in it."""
        found = []
        for tile in self.tiles:
            back = tile.swapped("")
            for inner in sources[tile.source].within(tile.inside):
                where = back.seen_through(inner.where)
                found.append(Tile(inner.source, inner.inside, where, tile.turned != inner.turned))
        return Tiling(self.shape, tuple(found))


def same(name: str, shape: Shape) -> Tiling:
    """A tensor that is another one, ``name``, as it is."""
    return Tiling(shape, (Tile(name, whole(shape), whole(shape)),))


def inverted(table: Mapping[str, Tiling], shapes: Mapping[str, Shape]) -> dict[str, Tiling]:
    """The tensors of these ``shapes`` in terms of those they are the sources of.

    Of several tiles with the same source box (the copies that ranks hold of a norm) the first one counts.
    """
    found: dict[str, dict[tuple[tuple[int, int], ...], Tile]] = {name: {} for name in shapes}
    for target, tiling in table.items():
        for tile in tiling.tiles:
            if tile.source in found:
                key = tuple((cut.start, cut.stop) for cut in tile.inside)
                found[tile.source].setdefault(key, tile.swapped(target))
    return {name: Tiling(shape, tuple(found[name].values())) for name, shape in shapes.items()}


def uncovered(table: Mapping[str, Tiling]) -> list[str]:
    """Tensors of ``table`` that are not covered exactly once by what they consist of."""
    return [name for name, tiling in table.items() if not tiling.is_full or overlapping(tiling.tiles)]


def overlapping(tiles: Iterable[Tile]) -> bool:
    """Whether two of the tiles claim the same element of their tensor."""
    ordered = sorted(tiles, key=lambda tile: tuple(cut.start for cut in tile.where))
    active: list[Tile] = []
    for tile in ordered:
        if tile.where:
            active = [other for other in active if other.where[0].stop > tile.where[0].start]
        if any(meet(other.where, tile.where) is not None for other in active):
            return True
        active.append(tile)
    return False
