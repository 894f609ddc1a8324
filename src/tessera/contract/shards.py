"""Which part of a tensor lies on this rank, as rooms that know no ranks see it.

However a model is spread, what a rank holds of a parameter is a box: a range of every dimension. A row-split weight
under data parallelism, for instance::

    W [8, 6] over 2 tensor ranks (columns) x 2 data ranks (rows)      rank (1, 0): [0:4, 3:6]

That box is all that reading, writing and initialising need: they take the same box of a file or of a random tensor,
and no rank ever sees the rest. Who knows how tensors are spread is a :class:`Shards`; :data:`WHOLE` is the one for
ordinary tensors, boxes that are everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Protocol

import torch
from torch import Tensor

Part = tuple[slice, ...]
"""A region of a tensor, one slice with both ends per dimension."""


def whole(shape: tuple[int, ...]) -> Part:
    """The region that is everything."""
    return tuple(slice(0, size) for size in shape)


def boxes(shape: tuple[int, ...], limit: int) -> Iterator[Part]:
    """Regions of at most ``limit`` elements (or one) that follow each other in memory and cover a tensor."""
    if prod(shape) <= limit:
        if prod(shape):
            yield whole(shape)
        return
    inner = prod(shape[1:])
    if inner > limit:
        for at in range(shape[0]):
            for rest in boxes(shape[1:], limit):
                yield (slice(at, at + 1), *rest)
        return
    rows = limit // inner
    for start in range(0, shape[0], rows):
        yield (slice(start, min(start + rows, shape[0])), *whole(shape[1:]))


class Shards(Protocol):
    """How to find this rank's part of a tensor."""

    def held(self, tensor: Tensor) -> Part:
        """The region of ``tensor`` that this rank holds."""

    def local(self, tensor: Tensor) -> Tensor:
        """The values of :meth:`held`, as an ordinary tensor that shares its memory."""


class Whole:
    """Every tensor is here."""

    def held(self, tensor: Tensor) -> Part:
        return whole(tuple(tensor.shape))

    def local(self, tensor: Tensor) -> Tensor:
        return tensor.detach()


WHOLE = Whole()


@torch.no_grad()
def keep(tensor: Tensor, value: Tensor, shards: Shards) -> None:
    """Copy this rank's region of ``value``, a whole tensor, into ``tensor``."""
    shards.local(tensor).copy_(value[shards.held(tensor)])
