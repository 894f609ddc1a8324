"""Where a parallel engine enters a model: small protocols that are identities on one device.

``models/`` reads as single-device code. Where several devices have to talk, it calls an object, a *seam*, that it was
given; the one it starts with does the work of a single device, and ``parallel/`` may put another in its place. A seam
is an attribute, not a module: it has no parameters, and models that hold different seams have the same state dict.

:class:`ExpertSeam` brings tokens to the experts they chose and their results back. In between, the experts see rows
sorted by expert and know nothing of tokens, top-k or ranks::

    x [T, H], chosen [T, k] --dispatch--> rows [N, H] + counts [E local] --experts--> rows [N, H] --combine--> [T, H]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


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
