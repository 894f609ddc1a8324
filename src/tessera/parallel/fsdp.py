"""Data parallelism with sharded state: FSDP2 applied from a plan, with sums instead of means.

``fully_shard`` turns the parameters of a module into DTensors split over the ranks that hold the same ones; a unit's
full parameters exist only while it runs. Which modules are units is the family's plan; how long parameters stay
gathered is the DeepSpeed stage the user asked for:

    zero0  parameters replicated (shards of one), gradients all-reduced: plain data parallelism
    zero1  optimizer state sharded; parameters are gathered once a step, and gradients reduced once
    zero2  as zero1, but gradients are reduced (hence sharded) after every microbatch
    zero3  parameters are gathered per unit in forward and again in backward

The decoder is sharded over data and context ranks (each tensor rank has parts of its own), the tower over tensor ranks
as well. With replicas of the whole arrangement (HSDP) gradients are also summed over those.

Gradients are *summed* over ranks, never averaged: the loss is already divided by the weight of the whole global
batch, so the sum over ranks is the gradient. Both switches below are needed: a divide factor other than the world
size would make FSDP use a pre-multiplied sum, which gloo does not have.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from tessera.contract.layout import ParallelLayout
from tessera.contract.plan import Plan, matches, within
from tessera.parallel.mesh import Mesh


def shard(
    model: nn.Module, plan: Plan, mesh: Mesh, *, compute_dtype: torch.dtype, roots: Sequence[nn.Module] = ()
) -> None:
    """Shard ``model`` in place over the mesh's data axes; the identity on a single process.

    ``roots`` are the modules whose forward is called, if not the model's: the stages of a pipeline. With a 16-bit
    ``compute_dtype`` parameters are gathered in it and gradients reduced in float32.
    """
    if mesh.grid is None:
        return
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    param_dtype = None if compute_dtype == torch.float32 else compute_dtype
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # A pipeline's split backward reads parameters between the passes: they have to stay.
    reshard = mesh.layout.zero == 3 and mesh.layout.pp == 1
    found = units(model, plan, mesh.layout)
    for name in sorted(found, key=lambda name: -name.count(".")):  # the inner ones first
        fully_shard(
            model.get_submodule(name),
            mesh=mesh.sharded(found[name]),
            reshard_after_forward=reshard,
            mp_policy=policy,
        )
    for root in roots or (model,):
        fully_shard(root, mesh=mesh.sharded("fsdp"), reshard_after_forward=False, mp_policy=policy)
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
    for name in passed_by(model, plan, found):
        # Backward would fetch them ahead of time, for nobody.
        cast(FSDPModule, model.get_submodule(name)).set_unshard_in_backward(False)


def units(model: nn.Module, plan: Plan, layout: ParallelLayout) -> dict[str, str]:
    """The modules of ``model`` that are gathered as one, below the root, and the axis their parameters lie over."""
    vision = (*plan.groups.vit, *plan.groups.aligner)
    held = [name for name, _ in model.named_modules()]
    found = {name for name in held if any(matches(pattern, name) for pattern in plan.fsdp_units)}
    # The tower as a whole is a unit of its own where its ranks are others than the decoder's.
    apart = layout.tp > 1
    outside = [name for name in plan.groups.aligner if not within(plan.groups.vit, name)]
    found |= {name for name in (*plan.groups.vit, *outside) if apart and name in held}
    # So are experts: ranks of a tensor group send them tokens of their own, and expert ranks hold different ones.
    stacks = {name for name in held if any(matches(pattern, name) for pattern in plan.experts)}
    found |= stacks if apart or layout.ep > 1 else set()
    experts = "edp" if layout.ep > 1 else "stage"
    axes = {name: experts if name in stacks else "stage" if within(vision, name) else "fsdp" for name in found}
    return {name: axes[name] for name in held if name in axes}


def passed_by(model: nn.Module, plan: Plan, names: Iterable[str]) -> list[str]:
    """Those of the units ``names`` that no backward pass runs through: nothing in or before them is trained.

    What sees comes before what reads, and parameters are listed in the order in which they are used.
    """
    vision = (*plan.groups.vit, *plan.groups.aligner)
    ordered = sorted(model.named_parameters(), key=lambda item: not within(vision, item[0]))
    first = next((index for index, (_, p) in enumerate(ordered) if p.requires_grad), len(ordered))
    before = [name for name, _ in ordered[:first]]
    after = [name for name, _ in ordered[first:]]
    return [
        unit for unit in names if any(within([unit], n) for n in before) and not any(within([unit], n) for n in after)
    ]


def set_gradient_sync(model: nn.Module, mesh: Mesh, enabled: bool, *, last: bool) -> None:
    """Whether the next backward reduces gradients over ranks, and whether it is the ``last`` of the step.

    Parameters change between steps only: what stays gathered from forward to backward (below ``zero3``) stays so until
    the last backward, and replicas add up their gradients once. Nothing to do on a single process.
    """
    if mesh.grid is None:
        return
    from torch.distributed.fsdp import FSDPModule

    root = cast(FSDPModule, model)
    root.set_requires_gradient_sync(enabled)
    root.set_requires_all_reduce(last)
    root.set_reshard_after_backward(last or mesh.layout.zero == 3)


def full(tensor: Tensor, mesh: Mesh) -> Tensor:
    """The whole tensor, gathered if it is sharded; a collective, so every rank must call it in the same order."""
    if mesh.grid is None:
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor, mesh: Mesh) -> Tensor:
    """This rank's piece of a tensor (the tensor itself if it is not sharded)."""
    if mesh.grid is None:
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def scale(parameters: Iterable[nn.Parameter], mesh: Mesh, factor: float) -> None:
    """Multiply every gradient that exists, in place."""
    pieces = [local(p.grad, mesh) for p in parameters if p.grad is not None]
    if pieces:  # a pipeline stage may have nothing to train
        torch._foreach_mul_(pieces, factor)


def like(piece: Tensor, tensor: Tensor, mesh: Mesh) -> Tensor:
    """This rank's ``piece``, on whatever device, as a tensor sharded the way ``tensor`` is. No copy, no exchange."""
    if mesh.grid is None:
        return piece
    from torch.distributed.tensor import DTensor

    # from_local would move the piece to the mesh's device.
    return DTensor(piece, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else piece


def norm(gradients: Iterable[Tensor], mesh: Mesh) -> float:
    """L2 norm over all ranks of these gradients, as one host number; shards add up, replicas count once."""
    grads = list(gradients)
    pieces = [local(grad, mesh) for grad in grads]
    norms = torch._foreach_norm(pieces, 2.0, dtype=torch.float32) if pieces else []
    squares = torch.stack(list(norms)).double().square() if norms else torch.zeros(0, dtype=torch.float64)
    if mesh.grid is None:
        return float(squares.sum()) ** 0.5
    copies = torch.tensor([_copies(grad, mesh) for grad in grads], dtype=torch.float64, device=squares.device)
    return mesh.sum([float((squares / copies).sum())])[0] ** 0.5


def _copies(grad: Tensor, mesh: Mesh) -> int:
    """On how many ranks of its stage the same piece of a gradient lies."""
    from torch.distributed.tensor import DTensor

    ranks = mesh.world // mesh.layout.pp
    if not isinstance(grad, DTensor):
        return ranks
    pieces = 1
    for size, placement in zip(grad.device_mesh.shape, grad.placements, strict=True):
        pieces *= size if not placement.is_replicate() else 1
    return ranks // pieces
