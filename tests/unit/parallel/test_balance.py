"""Who encodes which image: even on mixtures that are not, and how uneven it would have been."""

from __future__ import annotations

import numpy as np
import pytest

from bench.context import LIMIT, MIXTURES, RANKS, packed, pairs, uneven
from bench.tower import grids, loads
from tessera.parallel.balance import assign, at_home, imbalance


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


def test_equal_images_are_perfectly_even() -> None:
    assert imbalance([2.0] * 8, assign([2.0] * 8, 4), 4) == 1.0
    assert np.bincount(assign([2.0] * 8, 4)).tolist() == [2, 2, 2, 2]
