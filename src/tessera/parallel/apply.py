"""The one order in which a model is spread over ranks, and the seams through which it then talks.

    tensor split -> (experts) -> FSDP over what remains -> seams

Everything here follows from the mesh and the family's plan; on a single process nothing happens at all. A step's
microbatches go through :class:`Sharder` first: each rank keeps its tokens of every batch and its share of the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tessera.config.errors import UserError
from tessera.contract.batch import Batch
from tessera.contract.layout import ParallelLayout
from tessera.contract.model import Geometry
from tessera.contract.plan import Plan
from tessera.parallel import fsdp
from tessera.parallel.balance import Balancer
from tessera.parallel.context import divide, shard
from tessera.parallel.mesh import Mesh


@dataclass(frozen=True, slots=True)
class Spread:
    """What the user asks of a layout beside its sizes: ``cp_comm`` is ``allgather`` or ``a2a``."""

    cp_comm: str = "allgather"
    vision_balance: bool = True


def supports(plan: Plan, layout: ParallelLayout) -> None:
    """UserError if a family has no rows for an axis of the layout: models run whole are only data parallel."""
    sizes = {
        "pipeline_model_parallel_size": layout.pp,
        "context_parallel_size": layout.cp,
        "tensor_model_parallel_size": layout.tp,
    }
    for name, size in sizes.items():
        if size > 1 and not plan.tensor:
            raise UserError(
                f"--{name} {size} needs a model family of our own; this model is run whole and takes data parallelism "
                "only: use 1 and --deepspeed zero3",
                exit_code=2,
            )
    if layout.ep > 1 and not plan.experts:
        raise no_experts(layout.ep)


def no_experts(ep: int) -> UserError:
    """The answer to expert parallelism without experts."""
    return UserError(f"--expert_model_parallel_size {ep}: this model has no experts; use 1", exit_code=2)


def check(config: Any, layout: ParallelLayout, spread: Spread) -> None:
    """UserError if the sizes of a decoder's ``config`` do not go with the layout; before any weight is read."""
    tp, cp, moe = layout.tp, layout.cp, config.moe
    sizes = {"attention heads": config.heads, "key/value heads": config.kv_heads}
    if moe is None or len(moe.layers) < config.layers:
        sizes["columns of the MLP"] = config.inner
    for what, size in {**sizes, "entries of the vocabulary": config.vocab}.items():
        if size % tp:
            raise UserError(
                f"--tensor_model_parallel_size {tp} does not divide the model's {size} {what}; "
                f"choose a divisor of {size}",
                exit_code=2,
            )
    heads, kv_heads = config.heads // tp, config.kv_heads // tp
    if cp > 1 and spread.cp_comm == "a2a" and (heads % cp or (kv_heads % cp and cp % kv_heads)):
        raise UserError(
            f"--cp_comm_type a2a divides heads, and --context_parallel_size {cp} does not divide the {heads} query and "
            f"{kv_heads} key heads of a tensor rank; use --cp_comm_type allgather",
            exit_code=2,
        )
    if layout.ep > 1 and moe is None:
        raise no_experts(layout.ep)
    if moe is not None and moe.experts % layout.ep:
        raise UserError(
            f"--expert_model_parallel_size {layout.ep} does not divide the model's {moe.experts} experts; "
            f"choose a divisor of {moe.experts}",
            exit_code=2,
        )


def apply(
    model: nn.Module,
    plan: Plan,
    mesh: Mesh,
    spread: Spread,
    *,
    compute_dtype: torch.dtype,
    stages: Sequence[nn.Module] = (),
) -> None:
    """Spread ``model`` (plain or on the meta device) over the mesh in place; the identity on a single process.

    With pipeline ``stages`` the model is what this rank has kept of it.
    """
    if mesh.grid is None:
        return
    from tessera.parallel import expert, tensor
    from tessera.parallel.seams import RankSeams

    layout = mesh.layout
    supports(plan, layout)
    decoder: Any = model.get_submodule(plan.groups.llm[0]) if plan.tensor else None
    if decoder is not None:
        check(decoder.config, layout, spread)
    if layout.tp * layout.cp > 1:
        decoder.seams = RankSeams(mesh, decoder.config.vocab, exchange_axis(mesh, spread))
        tensor.split(model, plan, mesh)
    elif balances(plan, mesh, spread):
        decoder.seams = RankSeams(mesh, 0, "stage")
    expert.split(model, plan, mesh)
    fsdp.shard(model, plan, mesh, compute_dtype=compute_dtype, roots=stages)


def balances(plan: Plan, mesh: Mesh, spread: Spread) -> bool:
    """Whether images may be encoded by other ranks than those their batch is on."""
    layout = mesh.layout
    if not plan.tensor or not plan.groups.vit or mesh.grid is None:
        return False
    return layout.cp * layout.tp > 1 or (spread.vision_balance and layout.shard > 1)


def exchange_axis(mesh: Mesh, spread: Spread) -> str:
    """The ranks that share images."""
    return "stage" if spread.vision_balance and mesh.layout.shard > 1 else "model"


@dataclass(slots=True)
class Sharder:
    """A step's microbatches to this rank's parts of them; the identity where batches stay whole.

    ``imbalance`` is the largest over mean tower load of the latest step's microbatches (1.0 without images), and
    ``unbalanced`` what it would have been had each batch's images stayed with its own ranks.
    """

    mesh: Mesh
    spread: Spread
    balancer: Balancer | None = None
    imbalance: float = 1.0
    unbalanced: float = 1.0

    @classmethod
    def of(cls, model: nn.Module, plan: Plan, mesh: Mesh, spread: Spread, geometry: Geometry) -> Sharder:
        """The sharder of a model whose images are described by ``geometry``."""
        if not balances(plan, mesh, spread) or mesh.at("pp") > 0:
            return cls(mesh, spread)
        tower: Any = model.get_submodule(plan.groups.vit[0])
        return cls(mesh, spread, Balancer(mesh, geometry, tower.cost, exchange_axis(mesh, spread) == "stage"))

    def __call__(self, batches: Sequence[Batch]) -> list[Batch]:
        layout = self.mesh.layout
        whole = layout.cp * layout.tp * layout.pp == 1
        if whole and self.balancer is None:
            return list(batches)
        divisions = [divide(batch.segments.lengths, layout.cp, layout.tp) for batch in batches]
        if layout.pp > 1:  # one size for all microbatches of a step
            least = max(division.rows for division in divisions)
            divisions = [divide(batch.segments.lengths, layout.cp, layout.tp, least) for batch in batches]
        first = self.mesh.at("pp") == 0
        routed: list[Any] = [batch.media if first else None for batch in batches]
        if self.balancer is not None:
            found = self.balancer.route(batches, divisions)
            routed = [media for media, _, _ in found]
            self.imbalance = max(uneven for _, uneven, _ in found)
            self.unbalanced = max(uneven for _, _, uneven in found)
        tensor = self.mesh.at("tp"), layout.tp
        if whole:
            return [replace(batch, media=media) for batch, media in zip(batches, routed, strict=True)]
        return [
            replace(shard(batch, division, self.mesh.at("cp"), comm=self.spread.cp_comm, tp=tensor), media=media)
            for batch, division, media in zip(batches, divisions, routed, strict=True)
        ]
