"""Packing: whole rows, every row once, full packs, and nothing but the seed decides."""

from __future__ import annotations

import numpy as np
import pytest

from tessera.data.pack import best_fit, plan_epoch


def lengths_of(count: int, top: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, top + 1, count)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("packing", [True, False])
def test_every_row_exactly_once_and_no_pack_too_long(seed: int, packing: bool) -> None:
    rng = np.random.default_rng(seed)
    lengths = lengths_of(int(rng.integers(0, 2500)), int(rng.integers(1, 300)), seed)
    units = plan_epoch(lengths, seed, 1, packing=packing, capacity=300)
    assert sorted(index for unit in units for index in unit) == list(range(len(lengths)))
    assert all(unit and lengths[list(unit)].sum() <= 300 for unit in units)


def test_pure_function_of_seed_and_epoch() -> None:
    lengths = lengths_of(1500, 200)
    plans = [
        plan_epoch(lengths, seed, epoch, packing=True, capacity=512) for seed, epoch in ((1, 0), (1, 0), (1, 1), (2, 0))
    ]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]
    assert plans[0] != plans[3]


def test_unshuffled_keeps_the_order() -> None:
    assert plan_epoch(lengths_of(5, 9), 1, 0, shuffle=False) == [(0,), (1,), (2,), (3,), (4,)]
    units = plan_epoch(np.full(6, 4), 1, 0, packing=True, capacity=8, shuffle=False)
    assert units == [(0, 1), (2, 3), (4, 5)]


def test_packs_are_full_and_not_sorted_by_length() -> None:
    lengths = lengths_of(5000, 400)
    units = plan_epoch(lengths, 3, 0, packing=True, capacity=1024)
    filled = lengths.sum() / (len(units) * 1024)
    assert filled > 0.98
    longest = np.array([lengths[list(unit)].max() for unit in units])
    assert abs(np.corrcoef(longest, np.arange(len(units)))[0, 1]) < 0.1
    sizes = [lengths[list(unit)].tolist() for unit in units]
    assert any(size != sorted(size, reverse=True) for size in sizes)


def test_short_rows_still_fill_long_packs() -> None:
    lengths = lengths_of(20000, 40)
    units = plan_epoch(lengths, 3, 0, packing=True, capacity=8192)
    assert lengths.sum() / (len(units) * 8192) > 0.95


def test_best_fit_prefers_the_fullest_pack() -> None:
    lengths = np.array([6, 5, 4, 3, 2])
    assert best_fit([0, 1, 2, 3, 4], lengths, 10) == [(0, 2), (1, 3, 4)]
