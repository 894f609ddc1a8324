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
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from tessera.contract.batch import Batch
from tessera.contract.model import LossSum, Objective
from tessera.parallel import fsdp
from tessera.parallel.mesh import Mesh
from tessera.parallel.watchdog import Heartbeat
from tessera.train.optim import Optimizers


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did; all figures are over the global batch. ``skipped`` names why no update was made, if so."""

    loss: float
    grad_norm: float
    weight: float
    tokens: int
    metrics: dict[str, float]
    skipped: str | None = None

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
    heart: Heartbeat = field(default_factory=Heartbeat)

    def forward(self, batch: Batch) -> LossSum:
        """The objective on one microbatch, under autocast if the compute dtype is a 16-bit one."""
        self.heart.enter("forward")
        enabled = self.compute_dtype != torch.float32
        with torch.autocast(self.mesh.device.type, dtype=self.compute_dtype, enabled=enabled):
            loss: LossSum = self.model(batch.to(self.mesh.device), self.objective)
        return loss

    def accumulate(self, batches: Sequence[Batch], weight: float) -> LossSum:
        """Forward and backward over all microbatches; gradients of ``sum / weight``. Returns this rank's sums."""
        total = torch.zeros((), dtype=torch.float32, device=self.mesh.device)
        metrics: dict[str, torch.Tensor] = {}
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            fsdp.set_gradient_sync(self.model, self.mesh, last or self.sync_every_microbatch)
            loss = self.forward(batch)
            self.heart.enter("backward")
            (loss.total / weight).backward()
            total += loss.total.detach()
            for name, value in loss.metrics.items():
                metrics[name] = metrics[name] + value if name in metrics else value
        return LossSum(total, weight, metrics)


def train_step(engine: Engine, optimizers: Optimizers, batches: Sequence[Batch], *, max_grad_norm: float) -> StepResult:
    """One update from this rank's ``batches``; ``max_grad_norm`` 0 turns clipping off."""
    mesh = engine.mesh
    engine.heart.enter("step")
    local_tokens = sum(batch.num_tokens for batch in batches)
    weight, tokens = mesh.sum([sum(batch.weight for batch in batches), local_tokens])
    if weight == 0.0:
        return StepResult(0.0, 0.0, 0.0, int(tokens), {"correct": 0.0, "count": 0.0}, "no supervised token")
    sums = engine.accumulate(batches, weight)
    engine.heart.enter("optimizer")
    names = sorted(sums.metrics)
    total, *values = mesh.sum([float(sums.total), *(float(sums.metrics[name]) for name in names)])
    gradients = fsdp.local_gradients(optimizers.parameters, mesh)
    norm = fsdp.norm(gradients, mesh)
    skipped = None
    if not math.isfinite(total):
        skipped = "loss is not finite"
    elif not math.isfinite(norm):
        skipped = "gradient is not finite"
    else:
        if 0.0 < max_grad_norm < norm:
            torch._foreach_mul_(gradients, max_grad_norm / (norm + 1e-6))
        optimizers.step()
    optimizers.zero_grad()
    return StepResult(total / weight, norm, weight, int(tokens), dict(zip(names, values, strict=True)), skipped)


@torch.no_grad()
def evaluate_loss(engine: Engine, batches: Sequence[Batch]) -> dict[str, float]:
    """This rank's summed loss, weight and metrics over ``batches``, without gradients (not yet reduced)."""
    sums: dict[str, float] = {"total": 0.0, "weight": 0.0}
    for batch in batches:
        loss = engine.forward(batch)
        sums["total"] += float(loss.total)
        sums["weight"] += batch.weight
        for name, value in loss.metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return sums
