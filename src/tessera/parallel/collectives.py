"""The collectives that activations go through, each with the one that its gradient takes.

    all-gather of rows        <->  reduce-scatter of rows
    all-to-all (equal parts)  <->  all-to-all (its own inverse)
    all-to-all (any parts)    <->  all-to-all with sent and received exchanged

An autograd function per pair, so that a forward pass reads as arithmetic and no gradient is summed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """``x`` of all ranks, one behind the other along the first dimension; no gradient."""
    out = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    dist.all_gather_single(out, x.contiguous(), group=group)
    return out


def reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's rows of the sum over all ranks; no gradient."""
    out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    dist.reduce_scatter_single(out, x.contiguous(), group=group)
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


class Travel(torch.autograd.Function):
    """Rows to other ranks, ``sent[r]`` of them to rank ``r``; backward brings their gradients back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: Sequence[int], received: Sequence[int], group: ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return travel(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return travel(grads[0], ctx.received, ctx.sent, ctx.group), None, None, None


def travel(x: Tensor, sent: Sequence[int], received: Sequence[int], group: ProcessGroup) -> Tensor:
    """The rows that all ranks sent here, in rank order, for ``x`` whose rows go to the ranks in order; no gradient."""
    arrived = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(arrived, x.contiguous(), list(received), list(sent), group=group)
    return arrived


class Permute(torch.autograd.Function):
    """``x.index_select(0, order)`` for a permutation, whose gradient is a gather by ``inverse``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None
