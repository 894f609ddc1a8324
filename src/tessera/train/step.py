"""One optimiser step, the same for every objective.

    weight  = sum of loss weights over all microbatches and ranks      known before the first forward
    loss    = sum over microbatches of objective(...).total / weight   so the order of division cannot matter
    norm    = L2 norm of the gradient over all ranks
    update  = clip, optimiser step -- or nothing at all if loss or norm is not finite

Dividing once by the global weight makes ``n`` microbatches of one equal to one microbatch of ``n``, packed equal to
unpacked and two ranks equal to one. A step whose loss or gradient is not finite is skipped on all ranks alike (they
all see the same sums) and reported with the ids of its samples; parameters and optimiser state stay as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from tessera.contract.batch import Batch
from tessera.contract.model import LossSum, Objective
from tessera.models.moe import Routing
from tessera.parallel import fsdp
from tessera.parallel.mesh import Mesh
from tessera.parallel.watchdog import Heartbeat
from tessera.train.optim import Optimizers
from tessera.train.routing import Routers

if TYPE_CHECKING:
    from tessera.parallel.pipeline import Pipeline


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did; all figures are over the global batch. ``skipped`` names why no update was made, if so."""

    loss: float
    grad_norm: float
    weight: float
    tokens: int
    metrics: dict[str, float]
    skipped: str | None = None
    routers: Mapping[str, float] = field(default_factory=dict)

    @property
    def token_acc(self) -> float:
        """Share of supervised tokens whose most likely prediction was right."""
        return self.metrics["correct"] / max(1.0, self.metrics["count"])


@dataclass(frozen=True, slots=True)
class Engine:
    """What runs a forward and backward: the model, the objective, the ranks and the compute dtype."""

    model: nn.Module
    objective: Objective
    mesh: Mesh
    compute_dtype: torch.dtype
    sync_every_microbatch: bool = True
    sharder: Callable[[Sequence[Batch]], Sequence[Batch]] = list
    pipeline: Pipeline | None = None
    heart: Heartbeat = field(default_factory=Heartbeat)
    routers: Routers | None = None

    def watch(self, batch: Batch) -> Routing | None:
        """What collects the routing of one microbatch of a training step; None without sparse layers."""
        return None if self.routers is None else self.routers.fresh(batch.real_rows, self.mesh.device)

    def forward(self, batch: Batch, routing: Routing | None = None) -> LossSum:
        """The objective on one microbatch, under autocast if the compute dtype is a 16-bit one."""
        self.heart.enter("forward")
        enabled = self.compute_dtype != torch.float32
        with torch.autocast(self.mesh.device.type, dtype=self.compute_dtype, enabled=enabled):
            watched = {} if routing is None else {"routing": routing}
            loss: LossSum = self.model(batch.to(self.mesh.device), self.objective, **watched)
        return loss

    def accumulate(self, batches: Sequence[Batch], weight: float) -> LossSum:
        """Forward and backward over all microbatches; gradients of ``sum / weight``. Returns this rank's sums."""
        if self.pipeline is not None:
            placed = [batch.to(self.mesh.device) for batch in batches]
            return self.pipeline.run(placed, self.objective, weight, self.compute_dtype, self.watch)
        total = torch.zeros((), dtype=torch.float32, device=self.mesh.device)
        metrics: dict[str, torch.Tensor] = {}
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            fsdp.set_gradient_sync(self.model, self.mesh, last or self.sync_every_microbatch, last=last)
            loss = self.forward(batch, self.watch(batch))
            self.heart.enter("backward")
            (loss.total / weight).backward()
            total += loss.total.detach()
            for name, value in loss.metrics.items():
                metrics[name] = metrics[name] + value if name in metrics else value
        return LossSum(total, weight, metrics)

    def losses(self, batches: Sequence[Batch]) -> Iterable[LossSum]:
        """The objective on every microbatch; nothing on the earlier stages of a pipeline."""
        if self.pipeline is None:
            return map(self.forward, batches)
        return self.pipeline.evaluate(
            [batch.to(self.mesh.device) for batch in batches], self.objective, self.compute_dtype
        )


def train_step(engine: Engine, optimizers: Optimizers, batches: Sequence[Batch], *, max_grad_norm: float) -> StepResult:
    """One update from this rank's ``batches``; ``max_grad_norm`` 0 turns clipping off."""
    mesh = engine.mesh
    engine.heart.enter("step")
    local_tokens = sum(batch.real_rows for batch in batches) if mesh.counts_samples else 0
    batches = engine.sharder(batches)
    weight, tokens = mesh.sum([sum(batch.weight for batch in batches) if mesh.counts_tokens else 0.0, local_tokens])
    if weight == 0.0:
        return StepResult(0.0, 0.0, 0.0, int(tokens), {"correct": 0.0, "count": 0.0}, "no supervised token")
    if engine.routers is not None:
        engine.routers.begin(tokens)
    sums = engine.accumulate(batches, weight)
    engine.heart.enter("optimizer")
    names = sorted(engine.objective.metrics)
    mine = [float(sums.total), *(float(sums.metrics[name]) if name in sums.metrics else 0.0 for name in names)]
    total, *values = mesh.sum(mine if mesh.counts_tokens else [0.0] * len(mine))
    twin = None if engine.pipeline is None else engine.pipeline.twin
    norm = fsdp.norm((p.grad for p in optimizers.parameters if p.grad is not None and p is not twin), mesh)
    skipped = None
    if not math.isfinite(total):
        skipped = "loss is not finite"
    elif not math.isfinite(norm):
        skipped = "gradient is not finite"
    else:
        if 0.0 < max_grad_norm < norm:
            fsdp.scale(optimizers.parameters, mesh, max_grad_norm / (norm + 1e-6))
        optimizers.step()
    optimizers.zero_grad()
    routers = {} if engine.routers is None else engine.routers.end(mesh)
    metrics = dict(zip(names, values, strict=True))
    return StepResult(total / weight, norm, weight, int(tokens), metrics, skipped, routers)


@torch.no_grad()
def evaluate_loss(engine: Engine, batches: Sequence[Batch]) -> dict[str, float]:
    """This rank's summed loss, weight and metrics over ``batches``, without gradients (not yet reduced)."""
    sums: dict[str, float] = {"total": 0.0, "weight": 0.0}
    for loss in engine.losses(engine.sharder(batches)):
        sums["total"] += float(loss.total)
        sums["weight"] += loss.weight
        for name, value in loss.metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return sums if engine.mesh.counts_tokens else dict.fromkeys(sums, 0.0)
