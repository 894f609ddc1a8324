"""Context parallelism: the tokens of one packed batch over several ranks.

Everything but attention treats tokens one by one, so a rank may hold any of them. Which ones decides how evenly
attention is spread: under a causal mask the end of a document costs more than its beginning. Each document is therefore
cut into ``2 cp`` chunks and rank ``r`` takes chunks ``r`` and ``2 cp - 1 - r``, an early and a late one (the zigzag of
Megatron, but per *document*, so that it stays balanced when many are packed)::

    cp = 2     document a: a0 a1 a2 a3     document b: b0 b1 b2 b3
               rank 0: a0 a3 b0 b3         rank 1: a1 a2 b1 b2

Attention then brings together what belongs together, in one of two ways:

    allgather   keys and values of all ranks come to each; a rank's chunk attends to its document up to its own end
    a2a         queries, keys and values are exchanged so that each rank holds all tokens of ``1 / cp`` of the heads
                (DeepSpeed-Ulysses, Jacobs et al., 2023), and exchanged back afterwards

All indices are computed here, on the host, once per batch. Ranks hold equally many rows: fillers, which nothing attends
to and nothing is learned from, make up the difference (and what tensor ranks need to divide the rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tessera.contract.batch import Batch, Segments, Shard
from tessera.parallel.collectives import Exchange, all_gather, reduce_scatter


@dataclass(frozen=True, slots=True)
class Division:
    """Who holds which rows of a packed row of ``total`` tokens.

    ``held[r]`` are the rows of rank ``r`` in its order, ``rows`` (fillers included) how many each holds, ``runs[r]``
    its stretches as (segment, first row within the segment, rows). ``place [total]`` is each row's slot when all
    ranks' rows lie one behind the other.
    """

    rows: int
    held: tuple[np.ndarray, ...]
    runs: tuple[tuple[tuple[int, int, int], ...], ...]
    place: np.ndarray


def divide(lengths: Sequence[int], cp: int, multiple: int = 1, least: int = 0) -> Division:
    """Segments of ``lengths`` over ``cp`` ranks; each holds a multiple of ``multiple`` rows, at least ``least``."""
    held: list[list[np.ndarray]] = [[] for _ in range(cp)]
    runs: list[list[tuple[int, int, int]]] = [[] for _ in range(cp)]
    start = 0
    for segment, length in enumerate(lengths):
        bounds = [length * i // (2 * cp) for i in range(2 * cp + 1)] if cp > 1 else [0, length]
        for chunk in range(len(bounds) - 1):
            rank = min(chunk, 2 * cp - 1 - chunk)
            first, last = bounds[chunk], bounds[chunk + 1]
            if first < last:
                held[rank].append(np.arange(start + first, start + last))
                runs[rank].append((segment, first, last - first))
        start += length
    rows_of = [np.concatenate(parts) if parts else np.empty(0, dtype=np.int64) for parts in held]
    most = max(least, *(len(rows) for rows in rows_of))
    rows = -(-most // multiple) * multiple
    place = np.empty(start, dtype=np.int64)
    for rank, mine in enumerate(rows_of):
        place[mine] = rank * rows + np.arange(len(mine))
    return Division(rows, tuple(rows_of), tuple(tuple(part) for part in runs), place)


def shard(batch: Batch, division: Division, cp_rank: int, *, comm: str, tp: tuple[int, int] = (0, 1)) -> Batch:
    """Context rank ``cp_rank``'s part of ``batch``, as seen by tensor rank ``tp`` (rank, ranks).

    The batch's media are left as they are (``parallel/balance.py`` routes them).
    """
    held, runs = division.held[cp_rank], division.runs[cp_rank]
    filler = division.rows - len(held)
    index = torch.from_numpy(held)

    def part(tensor: Tensor) -> Tensor:
        mine = tensor.index_select(-1, index)
        return torch.nn.functional.pad(mine, (0, filler)) if filler else mine

    weights = part(batch.loss_weight)
    slice_rows = division.rows // tp[1]
    own = min(max(len(held) - tp[0] * slice_rows, 0), slice_rows)
    pieces = [count for _, _, count in runs] + ([filler] if filler else [])
    ids = [batch.sample_ids[segment] for segment, _, _ in runs] + ([-1] if filler else [])
    return replace(
        batch,
        tokens=part(batch.tokens),
        targets=part(batch.targets),
        loss_weight=weights,
        positions=part(batch.positions),
        segments=Segments.of(pieces),
        supervised=weights.nonzero().flatten(),
        weight=float(weights.double().sum()),
        sample_ids=tuple(ids),
        shard=_attention(batch.segments, division, cp_rank, comm, own),
    )


def _attention(whole: Segments, division: Division, cp_rank: int, comm: str, own: int) -> Shard:
    runs, rows = division.runs[cp_rank], division.rows
    filler = rows - len(division.held[cp_rank])
    if len(division.held) == 1:
        return Shard(rows, Segments.of([*whole.lengths, *([filler] if filler else [])]), own)
    if comm == "a2a":
        place = torch.from_numpy(division.place)
        inverse = torch.full((len(division.held) * rows,), -1, dtype=torch.int64)
        inverse[place] = torch.arange(len(place))
        return Shard(rows, whole, own, gathered=place, inverse=inverse)
    starts = np.concatenate([[0], np.cumsum(whole.lengths)])
    seen = [division.place[starts[segment] : starts[segment] + first + count] for segment, first, count in runs]
    if filler:  # fillers attend to themselves, so that no key of anybody else gets a gradient from them
        seen.append(cp_rank * rows + np.arange(rows - filler, rows))
    queries = [count for _, _, count in runs] + ([filler] if filler else [])
    return Shard(
        rows,
        Segments.of(queries),
        own,
        keys=Segments.of([len(part) for part in seen]),
        gathered=torch.from_numpy(np.concatenate(seen)),
    )


class GatherKeys(torch.autograd.Function):
    """Rows ``gathered`` of what all context ranks hold; backward sums over everyone who used a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gathered: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group, ctx.rows = group, x.shape[0]
        ctx.save_for_backward(gathered)
        return all_gather(x, group).index_select(0, gathered)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gathered,) = ctx.saved_tensors
        everyone = grads[0].new_zeros(ctx.rows * ctx.group.size(), *grads[0].shape[1:])
        return reduce_scatter(everyone.index_add_(0, gathered, grads[0]), ctx.group), None, None


def to_heads(x: Tensor, gathered: Tensor, group: ProcessGroup) -> Tensor:
    """``x [rows, heads, D]`` of this rank to all rows of its share of the heads, ``[T, heads / cp, D]``."""
    cp, (rows, heads, size) = group.size(), x.shape
    if heads < cp:  # fewer key heads than ranks: each is needed by several
        x, heads = x.repeat_interleave(cp // heads, dim=1), cp
    parts = x.unflatten(1, (cp, heads // cp)).transpose(0, 1)
    everyone: Tensor = Exchange.apply(parts, group)
    return everyone.reshape(cp * rows, heads // cp, size).index_select(0, gathered)


def to_rows(x: Tensor, inverse: Tensor, group: ProcessGroup) -> Tensor:
    """The way back: ``x [T, heads / cp, D]`` to this rank's rows, ``[rows, heads, D]``; fillers are zero."""
    cp = group.size()
    padded = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
    slots = torch.where(inverse < 0, x.shape[0], inverse)
    parts = padded.index_select(0, slots).unflatten(0, (cp, -1))
    mine: Tensor = Exchange.apply(parts, group)
    return mine.transpose(0, 1).flatten(1, 2)
