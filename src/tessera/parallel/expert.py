"""Expert parallelism: each rank of a group holds some of the experts of every sparse layer.

Tokens stay where they are (sequence-sharded, under tensor parallelism too) until they are routed. Then each row travels
to the rank of its expert and its result travels back, two all-to-alls a layer and direction::

    rows by expert 0..E-1 --all-to-all--> rows of my experts, by source --sort--> by expert --experts--> and back

How many rows go where is data, so the host has to know it: one small exchange of counts per layer, the only place in a
forward pass where it waits. Nothing is dropped and nothing is padded.

Experts see the ranks of a stage as ``edp x ep``: stacks are cut over ``ep`` and then sharded (FSDP) over ``edp``. With
``ep`` 1 they are sharded over all ranks of the stage, because every one of them computes with tokens of its own.
Per step and rank a layer sends ``4 (ep-1)/ep n k H / tp`` numbers (dispatch and combine, forward and backward).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Shard

from tessera.contract.plan import Plan, matches
from tessera.contract.seams import Dispatched, Divisible, ExpertSeam
from tessera.parallel.collectives import Permute, Travel
from tessera.parallel.mesh import Mesh
from tessera.parallel.tensor import part


class ExpertExchange:
    """The seam of one rank among ``group``; ``inner`` sorts by expert as one device would."""

    def __init__(self, inner: ExpertSeam, group: ProcessGroup) -> None:
        self._inner, self._group = inner, group

    def dispatch(self, x: Tensor, chosen: Tensor, experts: int) -> Dispatched:
        """Every rank's rows for the experts held here, sorted by expert, then by source."""
        local = self._inner.dispatch(x, chosen, experts)
        counts = local.counts.view(self._group.size(), -1)
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts.contiguous(), group=self._group)
        sent, received = counts.sum(1).tolist(), arriving.sum(1).tolist()
        rows: Tensor = Travel.apply(local.rows, sent, received, self._group)
        expert = torch.arange(arriving.shape[1], device=x.device).repeat(arriving.shape[0])
        order = torch.repeat_interleave(expert, arriving.flatten(), output_size=sum(received)).argsort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0], device=order.device)
        rows = Permute.apply(rows, order, inverse)
        return Dispatched(rows, arriving.sum(0), (local, sent, received, order, inverse))

    def combine(self, rows: Tensor, weights: Tensor, dispatched: Dispatched) -> Tensor:
        """Results back to the ranks of their tokens, and there each token's weighted sum."""
        local, sent, received, order, inverse = dispatched.state
        back: Tensor = Permute.apply(rows, inverse, order)
        back = Travel.apply(back, received, sent, self._group)
        return self._inner.combine(back, weights, local)


def split(model: nn.Module, plan: Plan, mesh: Mesh) -> None:
    """Keep this rank's experts of every stack of ``model`` (plain or meta), in place; nothing to do with ``ep`` 1.

    Whether their number divides was found out before (:func:`tessera.parallel.apply.check`).
    """
    ep = mesh.layout.ep
    if ep == 1:
        return
    found = [name for name, _ in model.named_modules() if any(matches(pattern, name) for pattern in plan.experts)]
    assert mesh.experts is not None
    axis = mesh.experts["ep"]
    for name in found:
        for module in model.get_submodule(name).modules():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                module.register_parameter(leaf, _cut(parameter, axis))
            if isinstance(module, Divisible):
                module.part = part
        owner: Any = model.get_submodule(name.rpartition(".")[0])
        owner.seam = ExpertExchange(owner.seam, axis.get_group())


def _cut(parameter: nn.Parameter, axis: Any) -> nn.Parameter:
    """This rank's experts of a stack ``[E, ...]``."""
    local = parameter.detach().chunk(axis.size())[axis.get_local_rank()].clone()
    spread = DTensor.from_local(
        local, axis, [Shard(0)], run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return nn.Parameter(spread, requires_grad=parameter.requires_grad)
