"""Data parallelism with sharded state: FSDP2 applied from a plan, with sums instead of means.

``fully_shard`` turns the parameters of a module into DTensors split over the data axis; a unit's full parameters
exist only while it runs. Which modules are units is the family's plan; how long parameters stay gathered is the
DeepSpeed stage the user asked for:

    zero0  parameters replicated (a mesh of (world, 1)), gradients all-reduced: plain data parallelism
    zero1  optimizer state sharded; parameters stay gathered from forward to backward, gradients synced once a step
    zero2  as zero1, but gradients are reduced (hence sharded) after every microbatch
    zero3  parameters are gathered per unit in forward and again in backward

Gradients are *summed* over ranks, never averaged: the loss is already divided by the weight of the whole global
batch, so the sum over ranks is the gradient. Both switches below are needed: a divide factor other than the world
size would make FSDP use a pre-multiplied sum, which gloo does not have.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from tessera.contract.plan import Plan, matches
from tessera.parallel.mesh import Mesh

DEFAULT_STAGE = 2


def shard(model: nn.Module, plan: Plan, mesh: Mesh, *, stage: int, compute_dtype: torch.dtype) -> None:
    """Shard ``model`` in place over the mesh's data axis; the identity on a single process.

    With a 16-bit ``compute_dtype`` parameters are gathered in it and gradients reduced in float32.
    """
    if mesh.data is None:
        return
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    param_dtype = None if compute_dtype == torch.float32 else compute_dtype
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    units = [module for name, module in model.named_modules() if any(matches(p, name) for p in plan.fsdp_units)]
    for unit in units:
        fully_shard(unit, mesh=mesh.data, reshard_after_forward=stage == 3, mp_policy=policy)
    fully_shard(model, mesh=mesh.data, reshard_after_forward=False, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def set_gradient_sync(model: nn.Module, mesh: Mesh, enabled: bool) -> None:
    """Whether the next backward reduces gradients over ranks; nothing to do on a single process."""
    if mesh.data is None:
        return
    from torch.distributed.fsdp import FSDPModule

    cast(FSDPModule, model).set_requires_gradient_sync(enabled)


def full(tensor: Tensor, mesh: Mesh) -> Tensor:
    """The whole tensor, gathered if it is sharded; a collective, so every rank must call it in the same order."""
    if mesh.data is None:
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor, mesh: Mesh) -> Tensor:
    """This rank's piece of a tensor (the tensor itself if it is not sharded)."""
    if mesh.data is None:
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(piece: Tensor, tensor: Tensor, mesh: Mesh) -> Tensor:
    """This rank's ``piece``, on whatever device, as a tensor sharded the way ``tensor`` is. No copy, no exchange."""
    if mesh.data is None:
        return piece
    from torch.distributed.tensor import DTensor

    # from_local would move the piece to the mesh's device.
    return DTensor(piece, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else piece


def local_gradients(parameters: Iterable[nn.Parameter], mesh: Mesh) -> list[Tensor]:
    """This rank's piece of every gradient that exists."""
    return [local(p.grad, mesh) for p in parameters if p.grad is not None]


def norm(gradients: list[Tensor], mesh: Mesh) -> float:
    """L2 norm over all ranks of these local gradients, as one host number; shards add up, replicas count once."""
    norms = torch._foreach_norm(gradients, 2.0, dtype=torch.float32) if gradients else []
    total = float(torch.stack(list(norms)).double().square().sum()) if norms else 0.0
    if mesh.data is not None and mesh.data.ndim == 1:
        total = mesh.sum([total])[0]
    return float(total**0.5)
