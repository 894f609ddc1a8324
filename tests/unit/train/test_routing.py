"""The balance loss and the figures about routers do not depend on how a batch is laid out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tessera.contract.layout import layout_of
from tessera.models.moe import Routing
from tessera.parallel.mesh import Mesh, world_size
from tessera.train.routing import Routers
from tests.invariance.engine import Trajectory, assert_same, train
from tests.invariance.test_step import TOLERANCE, packed
from tests.parity.reference import batch_of, config_of, loss, ours
from tests.ranks import run_ranks

COEFFICIENT = 0.5  # large, so that a mistake shows


def trained(axes: dict[str, int], per_batch: int = 1) -> Trajectory:
    mesh = Mesh.from_env(layout_of(world_size(), **axes), timeout_s=60) if world_size() > 1 else Mesh.single()
    config = config_of("qwen3_moe")
    steps = [packed(config, per_batch, step)[mesh.data_rank :: mesh.layout.dp] for step in range(3)]
    return train(config, steps, mesh=mesh, moe_aux_loss_coeff=COEFFICIENT)


def assert_same_routers(got: Trajectory, want: Trajectory) -> None:
    assert_same(got, want, TOLERANCE)
    for mine, other in zip(got.results, want.results, strict=True):
        assert mine.routers == pytest.approx(dict(other.routers), rel=1e-4)


def test_accumulation_changes_nothing_and_the_loss_matters() -> None:
    want = trained({})
    assert_same_routers(trained({}, per_batch=4), want)
    config = config_of("qwen3_moe")
    without = train(config, [packed(config, 1, step) for step in range(3)])
    assert max((want.parameters[name] - without.parameters[name]).abs().max() for name in want.parameters) > 1e-4


@pytest.mark.parametrize("axes", [{"ep": 2}, {"tp": 2}, {"cp": 2}, {"pp": 2}, {}], ids=str)
def test_two_ranks_are_one(axes: dict[str, int]) -> None:
    want = trained({})
    for got in run_ranks(trained, 2, axes):
        assert_same_routers(got, want)


def test_the_gradient_is_that_of_the_loss_under_the_shares_of_the_step_before() -> None:
    config = config_of("qwen3_moe")
    model, batch = ours(config), batch_of(config, [(6,), (9,)])
    moe = model.decoder.config.moe
    assert moe is not None
    layers, tokens = sorted(moe.layers), float(batch.num_tokens)
    shares = torch.rand(len(layers), moe.experts) * 2
    routers = Routers(tuple(layers), moe.experts, moe.top_k, COEFFICIENT, shares)
    routers.begin(tokens)
    gradients = []
    for priced in (True, False):
        routing = routers.fresh(batch.num_tokens, torch.device("cpu")) if priced else Routing()
        total = model(batch, loss, routing).total
        if not priced:
            means = routing.probabilities() / tokens
            total = total + COEFFICIENT * moe.experts / moe.top_k * (shares * means).sum()
        model.zero_grad()
        total.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_even_use_has_the_smallest_loss_and_a_state_that_survives_json() -> None:
    import json

    routers = Routers((0, 2), experts=4, top_k=2, coefficient=0.1)
    assert torch.equal(routers.shares, torch.full((2, 4), 0.5))
    routers.begin(8.0)
    figures: dict[str, Any] = routers.end(Mesh.single())
    assert figures["balance_loss"] == 0.0  # nobody routed anything
    routers.shares = torch.rand(2, 4)
    again = Routers((0, 2), experts=4, top_k=2, coefficient=0.1)
    again.restore(json.loads(json.dumps(routers.state())))
    assert torch.equal(again.shares, routers.shares)
