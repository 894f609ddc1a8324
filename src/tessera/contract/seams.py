"""Where a model's forward pass meets other ranks: a handful of places, each the identity on one device.

Models are written as if one device held everything. What tensor, context and expert parallelism have to do in between
happens at *seams*: a layer asks for the rows it needs before its first product and hands its sum back after its last
one, and whether other ranks take part is the seam's business::

    x = x + scatter(attention(gather(norm(x))))       gather: rows of this rank -> rows of all tensor ranks
    x = x + scatter(mlp(gather(norm(x))))             scatter: sum over tensor ranks -> rows of this rank

Between blocks every rank holds its own rows of the sequence (sequence parallelism), so norms, residuals and dropout
are computed once per row. :class:`Seams` is the version for one device; ``parallel/`` holds those that communicate.
A parameter that is spread over ranks is a DTensor; :func:`here` is the ordinary tensor that a product needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Reduce = Callable[[Tensor], Tensor]


class Vocabulary:
    """The part of the vocabulary a rank holds, and reductions of ``[c]`` statistics over all parts."""

    offset: int = 0

    def max(self, x: Tensor) -> Tensor:
        """Element-wise largest value over the parts."""
        return x

    def min(self, x: Tensor) -> Tensor:
        """Element-wise smallest value over the parts."""
        return x

    def sum(self, x: Tensor) -> Tensor:
        """Element-wise sum over the parts."""
        return x


class Seams:
    """Everything on one device; see the module docstring."""

    vocabulary = Vocabulary()

    def gather(self, x: Tensor) -> Tensor:
        """``x [n / tp, ...]``, this rank's rows, to ``[n, ...]``, those of all tensor ranks."""
        return x

    def scatter(self, x: Tensor) -> Tensor:
        """``x [n, ...]``, a summand on each tensor rank, to the sum's rows of this rank, ``[n / tp, ...]``."""
        return x

    def before_attention(self, q: Tensor, k: Tensor, v: Tensor, shard: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as the rows that this rank's attention is about (``shard`` is the batch's)."""
        return q, k, v

    def after_attention(self, out: Tensor, shard: Any) -> Tensor:
        """The mixed values ``[., heads, D]`` back to this rank's rows."""
        return out

    def exchange(self, features: Tensor, route: Any) -> Tensor:
        """Tower features ``[V, ...]`` of the items encoded here to those that land on this rank's rows."""
        return features


ONE_DEVICE = Seams()


def here(parameter: Tensor) -> Tensor:
    """This rank's part of ``parameter`` as an ordinary tensor (itself, unless it is spread over tensor ranks).

    A parameter that every tensor rank holds whole sees only the rows or heads of its own rank, so its gradient here is
    a summand; it is declared as such, and reduced together with the data-parallel sum.
    """
    if type(parameter) is nn.Parameter or type(parameter) is Tensor:
        return parameter
    placed: Any = parameter
    if not hasattr(placed, "placements"):
        return parameter
    from torch.distributed.tensor import Partial

    grads = [Partial() if placement.is_replicate() else placement for placement in placed.placements]
    local = placed.to_local(grad_placements=grads)
    assert isinstance(local, torch.Tensor)
    return local
