"""What one rank finds, all ranks act upon: a step that is not finite is skipped everywhere, or nowhere."""

from __future__ import annotations

import dataclasses

import pytest

from tessera.contract.batch import Batch
from tessera.contract.layout import layout_of
from tessera.parallel.mesh import Mesh, world_size
from tests.invariance.engine import Trajectory, assert_same, train
from tests.invariance.test_step import TOLERANCE, packed
from tests.parity.reference import config_of
from tests.ranks import run_ranks


def poisoned(batch: Batch) -> Batch:
    """One token of infinite weight, the last supervised one: under context parallelism it lies on one rank only."""
    weight = batch.loss_weight.clone()
    weight[batch.supervised[-1]] = float("inf")
    return dataclasses.replace(batch, loss_weight=weight)


def with_a_bad_step(axes: dict[str, int]) -> Trajectory:
    mesh = Mesh.from_env(layout_of(world_size(), **axes), timeout_s=60)
    config = config_of("qwen3_vl")
    good = [packed(config, 1, step)[mesh.data_rank :: mesh.layout.dp] for step in range(2)]
    bad = [poisoned(good[0][0]), *good[0][1:]] if mesh.data_rank == 0 else good[0]
    return train(config, [good[0], bad, good[1]], mesh=mesh)


@pytest.mark.parametrize("axes", [{}, {"tp": 2}, {"cp": 2}, {"pp": 2}], ids=str)
def test_a_step_that_is_not_finite_changes_nothing_on_any_rank(axes: dict[str, int]) -> None:
    config = config_of("qwen3_vl")
    want = train(config, [packed(config, 1, step) for step in range(2)])
    for got in run_ranks(with_a_bad_step, 2, axes):
        assert [result.skipped for result in got.results] == [None, "loss is not finite", None]
        kept = dataclasses.replace(got, losses=got.losses[::2], norms=got.norms[::2])
        assert_same(kept, want, TOLERANCE)
