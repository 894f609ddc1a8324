"""Who encodes which image: even on mixtures that are not, and how uneven it would have been."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bench.context import LIMIT, MIXTURES, RANKS, packed, pairs, uneven
from bench.tower import grids, loads
from tessera.parallel.balance import assign, at_home, imbalance
from tests.ranks import run_ranks


def test_longest_first_to_the_least_loaded() -> None:
    assert assign([1.0, 4.0, 2.0, 3.0], 2) == [0, 0, 1, 1]


def test_what_stays_at_home_is_shared_by_the_ranks_of_its_batch() -> None:
    costs, batches = [3.0, 1.0, 1.0, 1.0, 4.0], [0, 1, 1, 1, 0]
    assert at_home(costs, batches, 1) == [0, 1, 1, 1, 0]
    assert imbalance(costs, at_home(costs, batches, 1), 2) == pytest.approx(7 / 5)
    assert at_home(costs, batches, 2) == [1, 2, 3, 2, 0]
    assert imbalance([], [], 4) == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_few_pages_among_many_thumbnails_are_even_over_four_ranks(seed: int) -> None:
    balanced, without = loads(grids(4, seed), 4)
    assert balanced <= 1.1 < without


@pytest.mark.parametrize("mixture", sorted(MIXTURES))
@pytest.mark.parametrize("cp", RANKS)
def test_attention_of_packed_documents_is_even_over_context_ranks(mixture: str, cp: int) -> None:
    for seed in range(5):
        lengths = packed(mixture, 16384, seed)
        found = pairs(lengths, cp)
        assert sum(found) == sum(n * (n + 1) // 2 for n in lengths)
        assert uneven(found) <= LIMIT


def on_rank() -> tuple[float, float]:
    from tessera.contract.layout import layout_of
    from tessera.models.families import family_of
    from tessera.parallel.apply import Sharder, Spread
    from tessera.parallel.mesh import Mesh, world_size
    from tests.invariance.test_step import packed as rows_of
    from tests.parity.reference import ours

    mesh = Mesh.from_env(layout_of(world_size()), timeout_s=60)
    config: dict[str, Any] = family_of({"model_type": "qwen3_vl"}).tiny()
    family = family_of(config)
    sharder = Sharder.of(ours(config), family.plan(config), mesh, Spread(), family.geometry(config, {}))
    mine = rows_of(config, 2, 0)[mesh.data_rank :: 2]  # one image, and three
    sharder(mine)
    return sharder.imbalance, sharder.unbalanced


def test_a_sharder_knows_what_balance_is_worth() -> None:
    first, second = run_ranks(on_rank, 2)
    assert first == second
    assert first[0] < first[1] <= 2.0


def test_equal_images_are_perfectly_even() -> None:
    assert imbalance([2.0] * 8, assign([2.0] * 8, 4), 4) == 1.0
    assert np.bincount(assign([2.0] * 8, 4)).tolist() == [2, 2, 2, 2]
