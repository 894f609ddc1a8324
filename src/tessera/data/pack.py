"""Which rows share a unit: the order of an epoch as a pure function of (lengths, seed, epoch).

A *unit* is what a microbatch is made of: one row, or with packing as many whole rows as fit into ``capacity`` tokens.
Rows are shuffled first and packed window by window, best fit for the longest row first, so that a pack mixes rows
from a neighbourhood of the shuffled order; the packs are then shuffled again, because best fit leaves the long rows in
front. No row is ever cut and none is left out.

There is no hidden state: any process can compute any epoch's plan, on any number of ranks, at any time. That is what
makes resuming exact.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

Unit = tuple[int, ...]
"""Corpus indices of the rows of one unit, in the order in which they are laid out."""

WINDOW = 1000
"""Rows among which packs are looked for (more if rows are so short that few packs would come of it)."""


def plan_epoch(
    lengths: np.ndarray,
    seed: int,
    epoch: int,
    *,
    packing: bool = False,
    capacity: int | None = None,
    shuffle: bool = True,
) -> list[Unit]:
    """The units of one epoch, in order; every row of ``lengths [N]`` (tokens) is in exactly one of them."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths)) if shuffle else np.arange(len(lengths))
    if not packing:
        return [(index,) for index in order.tolist()]
    assert capacity is not None and (len(lengths) == 0 or int(lengths.max()) <= capacity), "a row exceeds the pack"
    mean = max(float(lengths.mean()), 1.0) if len(lengths) else 1.0
    window = max(WINDOW, int(32 * capacity / mean))
    units: list[Unit] = []
    for start in range(0, len(order), window):
        units += best_fit(order[start : start + window].tolist(), lengths, capacity)
    return [units[index] for index in rng.permutation(len(units))] if shuffle else units


def best_fit(rows: Sequence[int], lengths: np.ndarray, capacity: int) -> list[Unit]:
    """``rows`` as packs of at most ``capacity`` tokens: longest row first, into the fullest pack that has room."""
    sizes = lengths[np.asarray(rows)].tolist()
    packs: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, pack), sorted
    for place in sorted(range(len(rows)), key=lambda place: (-sizes[place], place)):
        at = bisect_left(free, (sizes[place], -1))
        if at == len(free):
            packs.append([place])
            insort(free, (capacity - sizes[place], len(packs) - 1))
        else:
            room, pack = free.pop(at)
            packs[pack].append(place)
            insort(free, (room - sizes[place], pack))
    # Inside a pack and among packs, rows keep the order in which they came.
    return [tuple(rows[place] for place in pack) for pack in sorted(sorted(pack) for pack in packs)]
