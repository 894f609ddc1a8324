"""The collectives that activations go through, each with the one that its gradient takes.

    all-gather of rows        <->  reduce-scatter of rows
    all-to-all (equal parts)  <->  all-to-all (its own inverse)

An autograd function per pair, so that a forward pass reads as arithmetic and no gradient is summed twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """``x`` of all ranks, one behind the other along the first dimension; no gradient."""
    out = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's rows of the sum over all ranks; no gradient."""
    out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
    return out


class Gather(torch.autograd.Function):
    """All-gather of rows; backward sums what every rank made of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grads[0], ctx.group), None


class Scatter(torch.autograd.Function):
    """Reduce-scatter of rows; backward hands every rank the gradient of all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_gather(grads[0], ctx.group), None


class Exchange(torch.autograd.Function):
    """All-to-all of equal parts along the first dimension; its own inverse, hence its own gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return all_to_all(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_to_all(grads[0], ctx.group), None


def all_to_all(x: Tensor, group: ProcessGroup) -> Tensor:
    """Part ``i`` of ``x`` to rank ``i``, and what every rank sent here; no gradient."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, x.contiguous(), group=group)
    return out
