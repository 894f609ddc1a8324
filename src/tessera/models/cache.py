"""Keys and values of running sequences, laid out so that a decode step reads them where they lie.

Sequences have different lengths, and one rectangle around all of them would mostly be padding. They are therefore kept
in *lanes*, rectangles of a few fixed lengths::

    lane of 128 tokens   [slots, kv_heads, 128, D]   a a a a a a a . .
                                                     b b b b b b b b .     one attention call over the first rows,
    lane of 384 tokens   [slots, kv_heads, 384, D]   c c c c c c c c c c c c c c ...      up to the longest of them

The rows of a lane are its first slots: when one leaves, the last takes its place. A row that outgrows its lane moves
to the next longer one, so a token is copied about twice in its life and no step copies, gathers or concatenates. Heads
that share keys (grouped-query attention) are queries of one call instead of copies of the keys.

Memory is counted in tokens against a :class:`Budget`. Lanes grow by doubling their slots while there is room, and give
back what they do not use when there is not; :func:`size_class` says what a sequence costs at most.

A forward pass writes and reads through a :class:`Pass`: :class:`Filling` for prompts, or parts of them, and
:class:`Stepping` for one more token in every row.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.contract.batch import Segments
from tessera.models.attention import Layout, plan

_SIZES = tuple(size for power in range(6, 24) for size in (2**power, 3 * 2 ** (power - 1)))


def size_class(length: int) -> int:
    """Tokens that a row of ``length`` tokens takes: the smallest lane that holds it (at most 1.5 times as long)."""
    return _SIZES[bisect_left(_SIZES, length)] if length <= _SIZES[-1] else length


@dataclass(slots=True)
class Budget:
    """Tokens of keys and values that lanes may hold together; ``used`` of ``limit`` are allocated."""

    limit: int
    used: int = 0
    caches: list[KVCache] = field(default_factory=list)

    def fits(self, tokens: int) -> bool:
        """Whether so many more can be allocated as things are."""
        return self.used + tokens <= self.limit

    def take(self, tokens: int, least: int) -> int:
        """``tokens`` if there is room, else ``least``, for which unused slots of all lanes are given back."""
        tokens = tokens if self.fits(tokens) else least
        if not self.fits(tokens):
            for cache in self.caches:
                cache.trim()
        assert self.fits(tokens), "more rows were let in than there is room for"
        return tokens


@dataclass(eq=False, slots=True)
class Row:
    """One sequence: ``slot`` of ``lane``, of which the first ``length`` tokens are filled."""

    lane: Lane
    slot: int
    length: int = 0


class Lane:
    """Rows of at most ``capacity`` tokens in ``data [layers, 2, slots, kv_heads, capacity, D]``."""

    def __init__(self, capacity: int, aside: bool, empty: Tensor) -> None:
        self.capacity = capacity
        self.aside = aside
        self.rows: list[Row] = []
        self.data = empty.new_zeros(*empty.shape[:2], 0, empty.shape[3], capacity, empty.shape[5])
        self.flat: tuple[Tensor, ...] = ()
        self.views: tuple[Tensor, ...] = ()

    @property
    def slots(self) -> int:
        return self.data.shape[2]

    def resize(self, slots: int) -> None:
        """Have this many slots, at least one per row."""
        assert slots >= len(self.rows)
        old = self.data
        # Zeros: a masked token counts nothing only if it is finite.
        self.data = old.new_zeros(*old.shape[:2], slots, *old.shape[3:])
        used = max((row.length for row in self.rows), default=0)
        if used:
            self.data[:, :, : len(self.rows), :, :used] = old[:, :, : len(self.rows), :, :used]
        self.views = self.data.flatten(0, 1).unbind(0)
        self.flat = tuple(view.flatten(0, 2) for view in self.views) if slots else ()

    def of(self, slot: int, start: int, end: int) -> Tensor:
        """A view of some tokens of one slot, ``[layers, 2, kv_heads, end - start, D]``."""
        return self.data[:, :, slot, :, start:end]


class KVCache:
    """Keys and values of all ``layers`` of one model; ``like`` gives dtype and device."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, like: Tensor, budget: Budget) -> None:
        self.kv_heads = kv_heads
        self.token_bytes = token_bytes(layers, kv_heads, head_dim, like.dtype)
        self._empty = torch.zeros(layers, 2, 0, kv_heads, 0, head_dim, dtype=like.dtype, device=like.device)
        self._budget = budget
        self._lanes: dict[tuple[int, bool], Lane] = {}
        budget.caches.append(self)

    @property
    def device(self) -> torch.device:
        return self._empty.device

    @property
    def dtype(self) -> torch.dtype:
        return self._empty.dtype

    def join(self, length: int, *, aside: bool = False) -> Row:
        """A new, empty row with room for ``length`` tokens, or more later.

        Rows ``aside`` take no part in steps: prompts that take several passes wait there until :meth:`bring`.
        """
        capacity = size_class(length)
        lane = self._lanes.get((capacity, aside))
        if lane is None:
            lane = self._lanes[capacity, aside] = Lane(capacity, aside, self._empty)
        if len(lane.rows) == lane.slots:
            more = self._budget.take(max(lane.slots, 1) * capacity, capacity) // capacity
            # Making room may have taken what this lane did not use, or the empty lane itself.
            self._lanes[capacity, aside] = lane
            self._resize(lane, lane.slots + more)
        row = Row(lane, len(lane.rows))
        lane.rows.append(row)
        return row

    def leave(self, row: Row, *, wipe: bool = False) -> None:
        """Forget ``row``; ``wipe`` what it holds if that may not be finite."""
        lane, last = row.lane, row.lane.rows[-1]
        if wipe:
            lane.data[:, :, row.slot].zero_()
        if last is not row:
            lane.of(row.slot, 0, last.length).copy_(lane.of(last.slot, 0, last.length))
            lane.rows[row.slot] = last
            if wipe:
                lane.data[:, :, last.slot].zero_()
            last.slot = row.slot
        lane.rows.pop()

    def reserve(self, row: Row, length: int) -> None:
        """Give ``row`` room for ``length`` tokens, in a longer lane if need be."""
        if length > row.lane.capacity:
            self._move(row, length, row.lane.aside)

    def bring(self, row: Row) -> None:
        """From now on ``row`` takes part in steps."""
        if row.lane.aside:
            self._move(row, row.lane.capacity, aside=False)

    def _move(self, row: Row, length: int, aside: bool) -> None:
        if not self._budget.fits(size_class(length)):
            # For a moment the row is nowhere, so that it never needs its room twice.
            held = self.read(row, 0, row.length).clone()
            self.leave(row)
            moved = self.join(length, aside=aside)
            moved.lane.of(moved.slot, 0, row.length).copy_(held)
        else:
            moved = self.join(length, aside=aside)
            moved.lane.of(moved.slot, 0, row.length).copy_(self.read(row, 0, row.length))
            self.leave(row)
        # The caller keeps its handle.
        row.lane, row.slot = moved.lane, moved.slot
        row.lane.rows[row.slot] = row

    def fork(self, row: Row) -> Row:
        """Another row that holds the same."""
        twin = self.join(row.lane.capacity)
        twin.length = row.length
        twin.lane.of(twin.slot, 0, row.length).copy_(row.lane.of(row.slot, 0, row.length))
        return twin

    def read(self, row: Row, start: int, end: int) -> Tensor:
        """A view of tokens of ``row``, ``[layers, 2, kv_heads, end - start, D]``."""
        return row.lane.of(row.slot, start, end)

    def stepping(self) -> Stepping:
        """One more token in every row that is not aside."""
        for row in [row for lane in self._lanes.values() if not lane.aside for row in lane.rows]:
            self.reserve(row, row.length + 1)
        return Stepping(self, [lane for lane in self._lanes.values() if lane.rows and not lane.aside])

    def filling(self, parts: Sequence[tuple[Row, int]]) -> Filling:
        """So many more tokens in each row: either all rows are empty, or none."""
        for row, count in parts:
            self.reserve(row, row.length + count)
        return Filling(self, parts)

    def trim(self) -> None:
        """Give back all unused slots."""
        for key, lane in list(self._lanes.items()):
            if lane.slots > len(lane.rows):
                self._resize(lane, len(lane.rows))
            if not lane.rows:
                del self._lanes[key]

    def _resize(self, lane: Lane, slots: int) -> None:
        self._budget.used += (slots - lane.slots) * lane.capacity
        lane.resize(slots)


def token_bytes(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes that a token takes in a cache."""
    return layers * 2 * kv_heads * head_dim * dtype.itemsize


def _grouped(q: Tensor, kv_heads: int) -> Tensor:
    """``q [rows, heads, D]`` as ``[rows, kv_heads, heads / kv_heads, D]``: the queries that share keys."""
    return q.unflatten(1, (kv_heads, -1))


class Pass:
    """What one forward pass does with the cache: layers ``write`` and then ``attend``.

    ``layout`` is set where attention needs nothing from the cache. ``last [S]`` lists the rows of the pass that are
    wanted in the end (None: all).
    """

    layout: Layout | None = None
    last: Tensor | None = None

    def __init__(self, cache: KVCache) -> None:
        self._kv_heads = cache.kv_heads
        self._writes: list[tuple[Lane, Tensor, Tensor | None]] = []

    def write(self, layer: str, k: Tensor, v: Tensor) -> None:
        """Store ``k``, ``v`` ``[tokens, kv_heads, D]`` of the tokens of this pass."""
        at = 2 * int(layer)
        for lane, cells, chosen in self._writes:
            for store, new in ((lane.flat[at], k), (lane.flat[at + 1], v)):
                store.index_copy_(0, cells, (new if chosen is None else new.index_select(0, chosen)).flatten(0, 1))

    def attend(self, layer: str, q: Tensor) -> Tensor:
        """``q [tokens, heads, D]`` over everything in their rows up to themselves, to ``[tokens, heads, D]``."""
        raise NotImplementedError


class Stepping(Pass):
    """One token in every row; ``rows`` is their order in the pass."""

    def __init__(self, cache: KVCache, lanes: Sequence[Lane]) -> None:
        super().__init__(cache)
        device, kv = cache.device, cache.kv_heads
        self.rows = [row for lane in lanes for row in lane.rows]
        self._reads: list[tuple[int, tuple[Tensor, ...], Tensor | None]] = []
        heads, first = np.arange(kv), 0
        for lane in lanes:
            count, capacity = len(lane.rows), lane.capacity
            ends = np.array([row.length for row in lane.rows])
            longest = int(ends.max()) + 1
            cells = ((np.arange(count)[:, None] * kv + heads) * capacity + ends[:, None]).ravel()
            several = len(lanes) > 1
            chosen = torch.arange(first, first + count, device=device) if several else None
            self._writes.append((lane, torch.from_numpy(cells).to(device), chosen))
            mask = None
            if int(ends.min()) + 1 < longest:
                hidden = np.where(np.arange(longest) <= ends[:, None], np.float32(0), np.float32("-inf"))
                mask = torch.from_numpy(hidden[:, None, None]).to(device, cache.dtype)
            views = lane.data[:, :, :count, :, :longest].flatten(0, 1).unbind(0)
            self._reads.append((count, views, mask))
            first += count
        for row in self.rows:
            row.length += 1

    def attend(self, layer: str, q: Tensor) -> Tensor:
        at, outs, first = 2 * int(layer), [], 0
        for count, views, mask in self._reads:
            mine = _grouped(q if len(self._reads) == 1 else q[first : first + count], self._kv_heads)
            outs.append(F.scaled_dot_product_attention(mine, views[at], views[at + 1], mask).flatten(1, 2))
            first += count
        return outs[0] if len(outs) == 1 else torch.cat(outs)


class Filling(Pass):
    """A packed pass over prompts, or over what follows what rows already hold."""

    def __init__(self, cache: KVCache, parts: Sequence[tuple[Row, int]]) -> None:
        super().__init__(cache)
        device = cache.device
        segments = Segments.of([count for _, count in parts])
        self._parts = [(row.lane, row.slot, row.length, row.length + count) for row, count in parts]
        fresh = not any(start for _, _, start, _ in self._parts)
        assert fresh or all(start for _, _, start, _ in self._parts)
        ends = segments.cu_seqlens[1:].long() - 1
        if fresh:
            self.layout = plan(segments.to(device), causal=True, dtype=cache.dtype)
        order = None if self.layout is None or self.layout.order is None else self.layout.order.cpu()
        if order is not None:
            assert self.layout is not None and self.layout.inverse is not None
            ends = self.layout.inverse.cpu()[ends]
        self.last = ends.to(device)
        self._place(cache, None if order is None else order.numpy())
        self._masks: list[Tensor | None] = []
        if not fresh:
            self._masks = [_causal(end - start, end, cache) for _, _, start, end in self._parts]
        for row, count in parts:
            row.length += count

    def _place(self, cache: KVCache, order: np.ndarray | None) -> None:
        """Where each token of the pass, in layout order, is written."""
        kv, owners, cells = cache.kv_heads, [], []
        lanes = list(dict.fromkeys(lane for lane, *_ in self._parts))
        for lane, slot, start, end in self._parts:
            heads = (slot * kv + np.arange(kv)) * lane.capacity
            cells.append(np.arange(start, end)[:, None] + heads)
            owners.append(np.full(end - start, lanes.index(lane)))
        cell, owner = np.concatenate(cells), np.concatenate(owners)
        if order is not None:
            cell, owner = cell[order], owner[order]
        for index, lane in enumerate(lanes):
            if len(lanes) == 1:
                self._writes.append((lane, torch.from_numpy(cell.ravel()).to(cache.device), None))
                continue
            chosen = np.flatnonzero(owner == index)
            where = torch.from_numpy(cell[chosen].ravel()).to(cache.device)
            self._writes.append((lane, where, torch.from_numpy(chosen).to(cache.device)))

    def attend(self, layer: str, q: Tensor) -> Tensor:
        at, outs, first = 2 * int(layer), [], 0
        for (lane, slot, start, end), mask in zip(self._parts, self._masks, strict=True):
            count = end - start
            # [count, heads, D] -> [1, kv_heads, group * count, D]
            mine = _grouped(q[first : first + count], self._kv_heads).permute(1, 2, 0, 3)
            group = mine.shape[1]
            keys, values = lane.views[at][slot, :, :end], lane.views[at + 1][slot, :, :end]
            wide = None if mask is None else mask.expand(group, -1, -1).reshape(1, 1, group * count, end)
            out = F.scaled_dot_product_attention(
                mine.flatten(1, 2).unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), wide
            )
            outs.append(out.squeeze(0).unflatten(1, (group, count)).permute(2, 0, 1, 3).flatten(1, 2))
            first += count
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def _causal(queries: int, keys: int, cache: KVCache) -> Tensor | None:
    """Additive mask ``[1, queries, keys]`` for queries that end with their keys; None if all are seen."""
    if queries == 1:
        return None
    hidden = torch.full((queries, keys), float("-inf")).triu(keys - queries + 1)
    return hidden.unsqueeze(0).to(cache.device, cache.dtype)
