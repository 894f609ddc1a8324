"""A few optimiser steps of the real engine on hand-made batches; what the invariance tests compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tessera import adapt
from tessera.config.resolve import run_of
from tessera.contract.batch import Batch
from tessera.contract.memory import Recompute
from tessera.models.families import family_of
from tessera.objectives.lm import NextToken
from tessera.parallel import apply, fsdp
from tessera.parallel.apply import Sharder, Spread
from tessera.parallel.mesh import Mesh
from tessera.recipes import placement
from tessera.train.offload import HostStore
from tessera.train.optim import Optimizers
from tessera.train.schedule import Schedule
from tessera.train.step import Engine, StepResult, train_step
from tests.parity.reference import ours


@dataclass
class Trajectory:
    """Losses, gradient norms and the final value of every parameter."""

    losses: list[float]
    norms: list[float]
    parameters: dict[str, Tensor]
    results: list[StepResult]


def train(
    config: dict[str, Any],
    steps: Sequence[Sequence[Batch]],
    *,
    mesh: Mesh | None = None,
    spread: Spread | None = None,
    schedule: str = "1f1b",
    chunks: int = 1,
    recompute: tuple[Recompute | bool, bool] = (False, False),
    compute_dtype: torch.dtype = torch.float32,
    **flags: Any,
) -> Trajectory:
    """Train a tiny random model on ``steps`` (microbatches of this rank) and say what happened."""
    mesh = mesh or Mesh.single()
    flags = {"train_type": "full", "freeze_vit": False, "freeze_aligner": False, "learning_rate": 1e-2} | flags
    # Adam divides by the gradient's own size: with its usual epsilon an element whose gradient is all rounding error
    # would move as far as any other, and the comparison would measure noise.
    flags = {"lora_dropout": 0.0, "adam_epsilon": 1e-2} | flags
    run = run_of(
        "sft", model=".", dataset=("unused",), max_steps=len(steps), warmup_steps=1, max_grad_norm=0.5, **flags
    )
    family = family_of(config)
    model = ours(config)
    adaptation = adapt.apply(model, run.adapt, family.plan(config), seed=1)
    model.set_recompute(family.plan(config), decoder=recompute[0], tower=recompute[1])
    model.train()
    if run.memory.activation_cpu_offload:
        model.decoder.store = HostStore(run.memory.activation_offload_num_layers, smallest=1)
    spread = spread or Spread()
    stages = placement.stages_of(model, mesh, chunks)
    apply.apply(model, family.plan(config), mesh, spread, compute_dtype=compute_dtype, stages=stages)
    pipeline = placement.pipeline_of(model, stages, mesh, schedule)
    groups = adapt.param_groups(model, run.train, adaptation)
    rates = Schedule("constant", len(steps), 0)
    optimizers = Optimizers(model, groups, run.train, rates, mesh, host_share=run.memory.optimizer_share)
    sharder = Sharder.of(model, family.plan(config), mesh, spread, family.geometry(config, {}))
    engine = Engine(
        model,
        NextToken(7, repeatable=schedule == "zero_bubble"),
        mesh,
        compute_dtype,
        mesh.layout.zero >= 2,
        sharder,
        pipeline,
        routers=placement.routers_of(run, model),
    )
    results = []
    for index, batches in enumerate(steps):
        optimizers.set_step(index)
        results.append(train_step(engine, optimizers, batches, max_grad_norm=run.train.max_grad_norm))
    held = {name: fsdp.full(p.detach(), mesh).clone() for name, p in model.named_parameters()}
    parameters: dict[str, Tensor] = {}
    for part in mesh.gather(held, "pp"):
        for name, value in part.items():
            assert torch.equal(parameters.setdefault(name, value), value), f"the copies of {name} differ"
    return Trajectory([r.loss for r in results], [r.grad_norm for r in results], parameters, results)


def assert_same(got: Trajectory, want: Trajectory, tolerance: float) -> None:
    """Losses, norms and every parameter agree; parameters relative to the tensor's largest entry."""
    assert got.parameters.keys() == want.parameters.keys()
    for figures, expected in ((got.losses, want.losses), (got.norms, want.norms)):
        torch.testing.assert_close(torch.tensor(figures), torch.tensor(expected), rtol=tolerance, atol=tolerance)
    for name, mine in got.parameters.items():
        value = want.parameters[name]
        difference = (mine - value).abs().max() / value.abs().max().clamp_min(1e-3)
        assert difference <= tolerance, f"{name} differs by {difference:.2e}"
