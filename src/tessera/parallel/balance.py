"""The vision tower without replicated work: every image is encoded once, by the rank that has the least to do.

Ranks that work on the same batch (context, tensor) would each encode the same images, and ranks with batches of their
own (data) wait for whoever drew the largest ones. So, before the forward passes of a step, all of them agree who
encodes what: sizes are exchanged, and a deterministic rule (longest first, to the least loaded) gives the same answer
everywhere. Pixels go to their encoder unless it has them already; features come back to the rank whose token they land
on, deepstack levels with them, through one differentiable exchange::

    rank 0   image A (large)                     encodes A              features of A -> rows of rank 0 and 1
    rank 1   (same batch)                        encodes B, C           features of B, C -> rows of rank 2
    rank 2   images B, C, D                      encodes D              ...

The tower's parameters are sharded over all these ranks and their gradients summed, each image contributing once. A rank
without an item encodes a minimal frame whose features go nowhere, so that every rank takes part in every collective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from tessera.contract.batch import Batch, Grid, Media, Route
from tessera.contract.model import Geometry
from tessera.parallel.collectives import travel
from tessera.parallel.context import Division
from tessera.parallel.mesh import Mesh

Cost = Callable[[Grid], float]


@dataclass(frozen=True, slots=True)
class Item:
    """One image or video of a batch: whose batch (index of the group of ranks that share it), grid, and the rank of
    the exchange group on which each of its tokens lies, ``owners [v] int16``."""

    batch: int
    grid: Grid
    owners: np.ndarray


def assign(costs: Sequence[float], ranks: int) -> list[int]:
    """Which rank takes each item: longest first, to the least loaded (ties: the lowest rank)."""
    loads = [0.0] * ranks
    chosen = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        rank = min(range(ranks), key=lambda index: loads[index])
        chosen[item] = rank
        loads[rank] += costs[item]
    return chosen


def at_home(costs: Sequence[float], batches: Sequence[int], peers: int) -> list[int]:
    """Which rank would take each item if the ``peers`` ranks of its batch shared it among themselves."""
    chosen = [0] * len(costs)
    for batch in set(batches):
        mine = [index for index, owner in enumerate(batches) if owner == batch]
        for index, rank in zip(mine, assign([costs[index] for index in mine], peers), strict=True):
            chosen[index] = batch * peers + rank
    return chosen


def imbalance(costs: Sequence[float], chosen: Sequence[int], ranks: int) -> float:
    """Largest over mean load; 1.0 is perfect (and the value without any item)."""
    loads = np.bincount(np.asarray(chosen, dtype=np.int64), weights=np.asarray(costs), minlength=ranks)
    return float(loads.max() / loads.mean()) if len(costs) else 1.0


@dataclass(frozen=True, slots=True)
class Balancer:
    """Routes the media of a step's microbatches; ``across_data`` also shares them among ranks of different batches."""

    mesh: Mesh
    geometry: Geometry
    cost: Cost
    across_data: bool

    @property
    def axis(self) -> str:
        return "stage" if self.across_data else "model"

    def route(self, batches: Sequence[Batch], divisions: Sequence[Division]) -> list[tuple[Media, float, float]]:
        """The media this rank encodes for each (unsharded) microbatch, and how uneven the loads are (max / mean).

        The last number is how uneven they would be had every batch's images stayed with the ranks of that batch.
        """
        mine = [self._items(batch, division) for batch, division in zip(batches, divisions, strict=True)]
        batches = self._as_wide(batches)
        peers = self.mesh.layout.cp * self.mesh.layout.tp
        if self.across_data:
            everyone = self.mesh.gather(mine, self.axis)[::peers]
        else:
            everyone = [mine]
        routed = []
        for number, batch in enumerate(batches):
            items = [replace(item, batch=share) for share, lists in enumerate(everyone) for item in lists[number]]
            routed.append(self._routed(batch, divisions[number], items))
        return routed

    def _as_wide(self, batches: Sequence[Batch]) -> list[Batch]:
        """Stills repeated over the temporal patch where another rank sends videos: an exchange has one row width."""
        widths = [0 if batch.media is None else batch.media.patches.shape[1] for batch in batches]
        most = np.max(self.mesh.gather(widths, self.axis), axis=0)
        out = []
        for batch, width, wide in zip(batches, widths, most.tolist(), strict=True):
            media = batch.media
            assert media is not None
            if width != wide:
                media = replace(media, patches=media.patches.repeat(1, wide // width))
            out.append(replace(batch, media=media))
        return out

    def _items(self, batch: Batch, division: Division) -> list[Item]:
        """This rank's batch as items; ``owners`` count from the first rank of those that share the batch."""
        media = batch.media
        assert media is not None
        if media.minimal:
            return []
        per_rank = division.rows // self.mesh.layout.tp
        slots = division.place[media.dest.numpy()]
        owners = (slots // per_rank).astype(np.int16)
        counts = [t * h * w // self.geometry.merge_size**2 for t, h, w in media.sizes]
        assert sum(counts) == len(owners), "an item without its tokens"
        parts = np.split(owners, np.cumsum(counts)[:-1])
        return [Item(0, grid, part) for grid, part in zip(media.sizes, parts, strict=True)]

    def _routed(self, batch: Batch, division: Division, items: list[Item]) -> tuple[Media, float, float]:
        group = self.mesh.group(self.axis)
        ranks, me = group.size(), group.rank()
        peers = self.mesh.layout.cp * self.mesh.layout.tp
        costs = [self.cost(item.grid) for item in items]
        chosen = assign(costs, ranks)
        media = batch.media
        assert media is not None
        encoded = [index for index, rank in enumerate(chosen) if rank == me]
        patches = self._pixels(media, items, chosen, group)
        grids = [items[index].grid for index in encoded]
        minimal = not grids
        if minimal:
            grids = [self.geometry.minimal_grid()]
            patches = media.patches.new_zeros(int(np.prod(grids[0])), media.patches.shape[1])
        tower, segments = self.geometry.tower_inputs(grids)
        targets = [items[index].owners.astype(np.int64) + items[index].batch * peers for index in encoded]
        target = np.concatenate(targets) if targets else np.empty(0, dtype=np.int64)
        share = me // peers
        arriving = [(chosen[index], item) for index, item in enumerate(items) if item.batch == share]
        received = [
            sum(int((item.owners == me % peers).sum()) for rank, item in arriving if rank == source)
            for source in range(ranks)
        ]
        route = Route(
            picked=torch.from_numpy(np.argsort(target, kind="stable")),
            sent=tuple(np.bincount(target, minlength=ranks).tolist()),
            received=tuple(received),
        )
        moved = replace(
            media,
            patches=patches,
            grids=torch.tensor(grids, dtype=torch.int64),
            dest=self._dest(media, division, arriving, me % peers),
            sizes=tuple(grids),
            owners=tuple(items[index].batch for index in encoded) or (0,),
            tower=tower,
            tower_segments=segments,
            minimal=minimal,
            route=route,
        )
        stayed = at_home(costs, [item.batch for item in items], peers)
        return moved, imbalance(costs, chosen, ranks), imbalance(costs, stayed, ranks)

    def _dest(self, media: Media, division: Division, arriving: list[tuple[int, Item]], peer: int) -> Tensor:
        """This rank's rows in the order in which features arrive: by encoder, then by item."""
        if media.minimal:
            return media.dest
        per_rank = division.rows // self.mesh.layout.tp
        slots = division.place[media.dest.numpy()]
        counts = np.cumsum([len(item.owners) for _, item in arriving])[:-1]
        parts = np.split(slots, counts)
        order = sorted(range(len(arriving)), key=lambda index: (arriving[index][0], index))
        rows = [parts[index][arriving[index][1].owners == peer] % per_rank for index in order]
        return torch.from_numpy(np.concatenate(rows)) if rows else media.dest[:0]

    def _pixels(self, media: Media, items: list[Item], chosen: list[int], group: ProcessGroup) -> Tensor:
        """The patches of the items this rank encodes, in order; pixels it does not hold come from one that does."""
        ranks, me = group.size(), group.rank()
        peers = self.mesh.layout.cp * self.mesh.layout.tp
        held: dict[int, Tensor] = {}
        mine = [index for index, item in enumerate(items) if item.batch == me // peers]
        if mine:
            parts = media.patches.split([int(np.prod(items[index].grid)) for index in mine])
            held = dict(zip(mine, parts, strict=True))
        if self.across_data and ranks > peers:
            held |= self._fetched(media, held, items, chosen, group)
        wanted = [held[index] for index, rank in enumerate(chosen) if rank == me]
        return torch.cat(wanted) if wanted else media.patches[:0]

    def _fetched(
        self, media: Media, held: dict[int, Tensor], items: list[Item], chosen: list[int], group: ProcessGroup
    ) -> dict[int, Tensor]:
        """Items of other batches that this rank encodes, by one exchange of pixels among all ranks."""
        ranks, me = group.size(), group.rank()
        peers = self.mesh.layout.cp * self.mesh.layout.tp
        width = media.patches.shape[1]
        out: list[list[Tensor]] = [[] for _ in range(ranks)]
        coming: list[list[int]] = [[] for _ in range(ranks)]
        for index, (item, rank) in enumerate(zip(items, chosen, strict=True)):
            if rank // peers == item.batch:
                continue
            source = item.batch * peers + index % peers  # whoever holds it takes turns sending
            if source == me:
                out[rank].append(held[index])
            if rank == me:
                coming[source].append(index)
        sizes = [[int(np.prod(items[index].grid)) for index in part] for part in coming]
        sending = torch.cat([part for parts in out for part in parts] or [media.patches[:0]])
        arrived = media.patches.new_empty(sum(map(sum, sizes)), width)
        device = self.mesh.device
        target = arrived.to(device)
        dist.all_to_all_single(
            target,
            sending.contiguous().to(device),
            [sum(part) for part in sizes],
            [sum(len(part) for part in parts) for parts in out],
            group=group,
        )
        flat = [index for part in coming for index in part]
        return dict(zip(flat, target.to(arrived.device).split([n for part in sizes for n in part]), strict=True))


class Deliver(torch.autograd.Function):
    """Rows to the ranks they land on; backward brings their gradients back to where they were made."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, route: Route, group: ProcessGroup) -> Tensor:
        ctx.group, ctx.route, ctx.rows = group, route, x.shape[0]
        return travel(x.index_select(0, route.picked), route.sent, route.received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        route: Route = ctx.route
        back = travel(grads[0], route.received, route.sent, ctx.group)
        return back.new_zeros(ctx.rows, *back.shape[1:]).index_copy_(0, route.picked, back), None, None


def deliver(x: Tensor, route: Route, group: ProcessGroup) -> Tensor:
    """Tower features ``x [V, ...]`` of this rank's items to the rows that land on this rank."""
    return cast(Tensor, Deliver.apply(x, route, group))
