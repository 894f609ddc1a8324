"""DoRA's magnitudes, for weights that may be divided among ranks (Liu et al., 2024, sec. 4).

DoRA learns a weight's rows as magnitude times direction, ``W' = m * V / |V|`` with ``V = W + s B A``. With the output
of the base layer at hand, what it adds is::

    (m / |V| - 1) * W x  +  (m / |V|) * s B A x            |V| per row, taken as a constant in backward

The norm is over a whole row. Ranks that hold some rows have theirs; ranks that hold some *columns* (a row-split layer)
add their squares up, and since both terms are linear in the products, summands of the output stay summands.
``peft``'s module of the same name and the same parameter is replaced by this one; the file is the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.contract.seams import RowWise
from tessera.models.layers import Linear


def row_squares(weight: Tensor) -> Tensor:
    """``|W|^2`` per row of ``weight [out, in]``, float32; magnitudes start at its root, hence at a factor of one."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()


class Dora(RowWise):
    """The magnitudes ``weight [out]`` of one layer; called by peft's layer, whose result it corrects."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: Linear,
        lora_B: Linear,
        scaling: float,
        base_layer: nn.Linear,
        base_result: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        """What to add to the base layer's output ``[T, out]``; ``base_result`` is that output if ``x`` went into it."""
        weight: Tensor = base_layer.weight
        bias: Tensor | None = base_layer.bias
        if isinstance(base_layer, Linear):  # others are never divided
            weight = base_layer.part(weight)
            bias = None if bias is None else base_layer.part(bias) * base_layer.bias_share
        scale = (self.part(self.weight) / self._norms(weight, lora_A, lora_B, scaling)).to(x.dtype)
        low = lora_B(lora_A(x)) * scaling
        if base_result is None:
            base_result = F.linear(x, weight)
        elif bias is not None:
            base_result = base_result - bias
        return (scale - 1) * base_result + scale * low

    @torch.no_grad()
    def _norms(self, weight: Tensor, first: Linear, second: Linear, scaling: float) -> Tensor:
        """``|W + s B A|`` per row, float32, without the sum, which is as large as ``W``.

        ``|W + s U|^2 = |W|^2 + 2 s <W, U> + s^2 |U|^2``, and with ``U = B A`` ``<W, U> = <W A', B>``.
        """
        a, b = first.part(first.weight).float(), second.part(second.weight).float()
        squares = row_squares(weight)
        squares = squares + 2 * scaling * ((weight @ a.t().to(weight.dtype)).float() * b).sum(1)
        squares = squares + scaling**2 * ((b @ (a @ a.t())) * b).sum(1)
        return self.across(squares).clamp_min_(0).sqrt_()
