"""Where a model's forward pass meets other ranks: a handful of places, each the identity on one device.

Models are written as if one device held everything. What tensor, context and expert parallelism have to do in between
happens at *seams*: a layer asks for the rows it needs before its first product and hands its sum back after its last
one, and whether other ranks take part is the seam's business::

    x = x + scatter(attention(gather(norm(x))))       gather: rows of this rank -> rows of all tensor ranks
    x = x + scatter(mlp(gather(norm(x))))             scatter: sum over tensor ranks -> rows of this rank

Between blocks every rank holds its own rows of the sequence (sequence parallelism), so norms, residuals and dropout
are computed once per row. :class:`Seams` is the version for one device; ``parallel/`` holds those that communicate.
Parameters that are divided among ranks are DTensors; a :class:`Divisible` module takes its ``part`` of them, an
ordinary tensor, where it computes.

:class:`ExpertSeam` brings tokens to the experts they chose and their results back. In between, the experts see rows
sorted by expert and know nothing of tokens, top-k or ranks::

    x [T, H], chosen [T, k] --dispatch--> rows [N, H] + counts [E local] --experts--> rows [N, H] --combine--> [T, H]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn


def whole(parameter: Tensor) -> Tensor:
    """A parameter that is not divided."""
    return parameter


class Divisible(nn.Module):
    """A module whose parameters may be divided among tensor ranks: it computes with ``part`` of each.

    ``bias_share`` is how much of a bias this rank adds: all, or its share where the outputs of ranks are summed.
    """

    part: Callable[[Tensor], Tensor] = staticmethod(whole)
    bias_share: float = 1.0


class RowWise(Divisible):
    """A module that needs sums over whole rows of a weight: ``across`` adds up what the ranks' columns contribute."""

    across: Callable[[Tensor], Tensor] = staticmethod(whole)


class Vocabulary:
    """The part of the vocabulary a rank holds, and reductions of ``[c]`` statistics over all parts."""

    offset: int = 0

    def part(self, weight: Tensor) -> Tensor:
        """This rank's rows of an embedding or head, as an ordinary tensor."""
        return weight

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


@dataclass(frozen=True, slots=True)
class Dispatched:
    """``rows [N, H]`` sorted by expert, of which the first ``counts[0]`` are the first local expert's, and so on.

    ``counts [experts held here] int64`` lies on the device of ``rows``. ``state`` is what the seam that made this needs
    to undo it; nobody else looks inside.
    """

    rows: Tensor
    counts: Tensor
    state: Any


class ExpertSeam(Protocol):
    """How tokens travel to experts and back; both directions are differentiable."""

    def dispatch(self, x: Tensor, chosen: Tensor, experts: int) -> Dispatched:
        """Copies of the rows of ``x [T, H]`` for their experts ``chosen [T, k] int64``, numbered 0 .. ``experts`` - 1.

        ``experts`` counts all experts of the layer, wherever they are held. T may be 0.
        """
        ...

    def combine(self, rows: Tensor, weights: Tensor, dispatched: Dispatched) -> Tensor:
        """``[T, H]``: each token's sum of its experts' results ``rows [N, H]`` times ``weights [T, k]``.

        ``rows`` are in the order of ``dispatched.rows``; ``weights`` in the order of ``chosen``, where the tokens are.
        """
        ...
