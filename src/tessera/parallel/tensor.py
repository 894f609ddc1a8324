"""Tensor and sequence parallelism (Megatron-LM: Shoeybi et al., 2019, sec. 3; Korthikanti et al., 2022, sec. 4.2).

A block's first products are split by columns (each rank computes some heads, some of the MLP's inner width) and its
last one by rows, so that one block needs a single exchange at either end. Between blocks the *sequence* is split::

    [n/tp, H] --norm--> all-gather --> [n, H] --q,k,v (columns)--> heads --o (rows)--> reduce-scatter --> [n/tp, H]

Norms, residuals and activations between blocks thus exist once, not ``tp`` times, for the same bytes on the wire as an
all-reduce. The vocabulary is split too: the embedding is a masked lookup and a reduce-scatter, head and cross entropy
reduce three numbers per token.

Parameters become DTensors over the tensor axis (what is not split is declared replicated), and everything below this
file sees ordinary tensors. LoRA follows its base layer: beside a column-split layer B is split and A is whole, beside a
row-split one A is split and B is whole. Per step and rank a layer sends ``4 (tp-1)/tp n H`` numbers forward and as many
backward (an all-gather and a reduce-scatter around attention and around the MLP).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from tessera.config.errors import UserError
from tessera.contract.plan import Plan, matches, within
from tessera.contract.seams import Divisible, RowWise, Vocabulary
from tessera.parallel.mesh import Mesh


def part(parameter: Tensor) -> Tensor:
    """This rank's part of ``parameter`` as an ordinary tensor.

    A parameter that every tensor rank holds whole sees only the rows or heads of its own rank, so its gradient here is
    a summand; it is declared as such, and reduced together with the data-parallel sum.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    grads = [Partial() if placement.is_replicate() else placement for placement in parameter.placements]
    local = parameter.to_local(grad_placements=grads)
    assert isinstance(local, Tensor)
    return local


class SplitVocabulary(Vocabulary):
    """The rank's share of ``size`` entries, and reductions over the tensor ranks."""

    def __init__(self, size: int, group: ProcessGroup) -> None:
        self._group = group
        self.offset = group.rank() * (size // group.size())

    def part(self, weight: Tensor) -> Tensor:
        return part(weight)

    def max(self, x: Tensor) -> Tensor:
        return self._reduced(x, dist.ReduceOp.MAX)

    def min(self, x: Tensor) -> Tensor:
        return self._reduced(x, dist.ReduceOp.MIN)

    def sum(self, x: Tensor) -> Tensor:
        return self._reduced(x, dist.ReduceOp.SUM)

    def _reduced(self, x: Tensor, operation: Any) -> Tensor:
        out = x.clone()
        dist.all_reduce(out, operation, group=self._group)
        return out


def split(model: nn.Module, plan: Plan, mesh: Mesh) -> None:
    """Turn the decoder's parameters (plain or meta) into DTensors over the tensor axis, in place; the tower stays.

    UserError if the plan has no rows for it or a size does not divide.
    """
    tp = mesh.layout.tp
    if tp == 1:
        return
    assert mesh.grid is not None
    if not plan.tensor:
        raise UserError(
            f"--tensor_model_parallel_size {tp}: this model family has no rule for it; use 1 and --deepspeed zero3"
        )
    axis = mesh.grid["tp"]
    made: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            full = f"{name}.{leaf}"
            if not within(plan.groups.llm, full) or plan.in_experts(name):
                continue
            placement = _placement(plan, name, leaf)
            if id(parameter) not in made:
                made[id(parameter)] = _spread(parameter, placement, axis, full)
            module.register_parameter(leaf, made[id(parameter)])
        if isinstance(module, Divisible) and not plan.in_experts(name):
            module.part = part
            module.bias_share = 1.0 / tp if _style(plan, name) == "row" else 1.0
            if isinstance(module, RowWise) and _row_split(plan, name):
                module.across = SplitVocabulary(0, axis.get_group()).sum


def split_dim(plan: Plan, name: str, leaf: str) -> int | None:
    """The dimension along which tensor ranks split parameter ``leaf`` of module ``name``; None if each has it whole."""
    placement = _placement(plan, name, leaf)
    return placement.dim if isinstance(placement, Shard) else None


def _styles(plan: Plan, name: str) -> Iterator[tuple[str, str]]:
    """(style, rest of the name below the matching module) of the plan rows that fit a module or an ancestor."""
    parts = name.split(".")
    for pattern, style in plan.tensor:
        depth = pattern.count(".") + 1
        if matches(pattern, ".".join(parts[:depth])):
            yield style, ".".join(parts[depth:])


def _style(plan: Plan, name: str) -> str:
    """How the outputs of this module's products come about: ``row`` where several ranks' are summed."""
    for style, rest in _styles(plan, name):
        # A of a row-split layer has low-rank summands, which B (whole) turns into summands of the output.
        return style if rest.split(".")[0] in ("", "base_layer", "lora_B") else "column"
    return ""


def _row_split(plan: Plan, name: str) -> bool:
    """Whether a module belongs to a layer of which every tensor rank holds some columns."""
    return any(style == "row" for style, _ in _styles(plan, name))


def _placement(plan: Plan, name: str, leaf: str) -> Placement:
    for style, rest in _styles(plan, name):
        child = rest.split(".")[0]
        if child in ("", "base_layer"):
            if style == "row":
                return Shard(1) if leaf == "weight" else Replicate()
            return Shard(0)
        if child == "lora_A":
            return Shard(1) if style == "row" else Replicate()
        if child == "lora_B":
            return Replicate() if style == "row" else Shard(0)
        if child == "lora_magnitude_vector":
            return Replicate() if style == "row" else Shard(0)
        raise AssertionError(f"{name}.{leaf}: the plan does not say how tensor ranks share it")
    return Replicate()


def _spread(parameter: nn.Parameter, placement: Placement, axis: Any, name: str) -> nn.Parameter:
    """This rank's part of ``parameter`` as a DTensor; works on the meta device."""
    local = parameter.detach()
    if isinstance(placement, Shard):
        size = local.shape[placement.dim]
        if size % axis.size():
            what = f"{size} {'columns' if placement.dim else 'rows'} of {name}"
            raise UserError(f"--tensor_model_parallel_size {axis.size()} does not divide the {what}", exit_code=2)
        local = local.chunk(axis.size(), placement.dim)[axis.get_local_rank()].clone()
    spread = DTensor.from_local(
        local, axis, [placement], run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return nn.Parameter(spread, requires_grad=parameter.requires_grad)
