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
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from tessera.config.errors import UserError
from tessera.contract.batch import Batch, Route, Shard
from tessera.contract.model import Geometry
from tessera.contract.plan import Plan
from tessera.contract.seams import Seams
from tessera.parallel import fsdp, tensor
from tessera.parallel.balance import Balancer, Cost, deliver
from tessera.parallel.context import GatherKeys, divide, shard, to_heads, to_rows
from tessera.parallel.mesh import Mesh


class RankSeams(Seams):
    """The seams of one rank among several; see :class:`~tessera.contract.seams.Seams`."""

    def __init__(self, mesh: Mesh, vocabulary: int, exchange_axis: str) -> None:
        layout = mesh.layout
        self._tensor: ProcessGroup | None = mesh.group("tp") if layout.tp > 1 else None
        self._context: ProcessGroup | None = mesh.group("cp") if layout.cp > 1 else None
        self._exchange = mesh.group(exchange_axis)
        if self._tensor is not None:
            self.vocabulary = tensor.SplitVocabulary(vocabulary, self._tensor)

    def gather(self, x: Tensor) -> Tensor:
        if self._tensor is None:
            return x
        out: Tensor = tensor.Gather.apply(x, self._tensor)
        return out

    def scatter(self, x: Tensor) -> Tensor:
        if self._tensor is None:
            return x
        out: Tensor = tensor.Scatter.apply(x, self._tensor)
        return out

    def before_attention(self, q: Tensor, k: Tensor, v: Tensor, shard: Shard) -> tuple[Tensor, Tensor, Tensor]:
        if self._context is None:
            return q, k, v
        assert shard.gathered is not None
        if shard.keys is not None:
            both = GatherKeys.apply(torch.cat([k, v], dim=1), shard.gathered, self._context)
            k, v = both.split([k.shape[1], v.shape[1]], dim=1)
            return q, k, v
        q, k, v = (to_heads(x, shard.gathered, self._context) for x in (q, k, v))
        return q, k, v

    def after_attention(self, out: Tensor, shard: Shard) -> Tensor:
        if self._context is None or shard.keys is not None:
            return out
        assert shard.inverse is not None
        return to_rows(out, shard.inverse, self._context)

    def exchange(self, features: Tensor, route: Route) -> Tensor:
        return deliver(features, route, self._exchange)


@dataclass(frozen=True, slots=True)
class Spread:
    """What the user asks of a layout beside its sizes: ``cp_comm`` is ``allgather`` or ``a2a``."""

    cp_comm: str = "allgather"
    vision_balance: bool = True


def check(model: Any, mesh: Mesh, spread: Spread) -> None:
    """UserError if the model's sizes do not go with the layout; before any weight is read."""
    layout, config = mesh.layout, model.decoder.config
    tp, cp = layout.tp, layout.cp
    for what, size in (("attention heads", config.heads), ("key/value heads", config.kv_heads)):
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


def apply(model: nn.Module, plan: Plan, mesh: Mesh, spread: Spread, *, compute_dtype: torch.dtype) -> None:
    """Spread ``model`` (plain or on the meta device) over the mesh in place; the identity on a single process."""
    if mesh.grid is None:
        return
    layout = mesh.layout
    if layout.tp * layout.cp > 1:
        decoder = getattr(model, "decoder", None)
        if decoder is None:
            raise UserError(
                "--tensor_model_parallel_size and --context_parallel_size need a model family of our own; "
                "models run whole take data parallelism only (--deepspeed zero3)",
                exit_code=2,
            )
        check(model, mesh, spread)
        decoder.seams = RankSeams(mesh, decoder.config.vocab, exchange_axis(mesh, spread))
        tensor.split(model, plan, mesh)
    elif balances(model, mesh, spread):
        model.decoder.seams = RankSeams(mesh, 0, "stage")
    fsdp.shard(model, plan, mesh, compute_dtype=compute_dtype)


def balances(model: Any, mesh: Mesh, spread: Spread) -> bool:
    """Whether images may be encoded by other ranks than those their batch is on."""
    layout = mesh.layout
    if getattr(model, "visual", None) is None or mesh.grid is None:
        return False
    return layout.cp * layout.tp > 1 or (spread.vision_balance and layout.shard > 1)


def exchange_axis(mesh: Mesh, spread: Spread) -> str:
    """The ranks that share images."""
    return "stage" if spread.vision_balance and mesh.layout.shard > 1 else "model"


@dataclass(slots=True)
class Sharder:
    """A step's microbatches to this rank's parts of them; the identity where batches stay whole.

    ``imbalance`` is the largest over mean tower load of the latest step's microbatches, and ``unbalanced`` what it would
    have been had every batch stayed with its own ranks (both 1.0 without images).
    """

    mesh: Mesh
    spread: Spread
    balancer: Balancer | None = None
    imbalance: float = 1.0

    @classmethod
    def of(cls, model: Any, mesh: Mesh, spread: Spread, geometry: Geometry) -> Sharder:
        """The sharder of a model whose images are described by ``geometry``."""
        if not balances(model, mesh, spread):
            return cls(mesh, spread)
        cost: Cost = model.visual.cost
        return cls(mesh, spread, Balancer(mesh, geometry, cost, exchange_axis(mesh, spread) == "stage"))

    def __call__(self, batches: Sequence[Batch]) -> list[Batch]:
        layout = self.mesh.layout
        if layout.cp * layout.tp == 1 and self.balancer is None:
            return list(batches)
        divisions = [divide(batch.segments.lengths, layout.cp, layout.tp) for batch in batches]
        routed: list[Any] = [batch.media for batch in batches]
        if self.balancer is not None:
            found = self.balancer.route(batches, divisions)
            routed = [media for media, _ in found]
            self.imbalance = max(uneven for _, uneven in found)
        if layout.cp * layout.tp == 1:
            return [replace(batch, media=media) for batch, media in zip(batches, routed, strict=True)]
        return [
            replace(shard(batch, division, self.mesh.at("cp"), comm=self.spread.cp_comm), media=media)
            for batch, division, media in zip(batches, divisions, routed, strict=True)
        ]
