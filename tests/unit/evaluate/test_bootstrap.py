"""Intervals and paired tests against what can be computed in another way."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from tessera.evaluate.bootstrap import MOST_WORK, Interval, mcnemar, mean_interval, metric_interval, paired


def test_interval_is_that_of_the_normal_distribution_for_many_items() -> None:
    scores = np.array([1.0] * 700 + [0.0] * 300)
    found = mean_interval(scores)
    assert found is not None
    half = 1.96 * math.sqrt(0.7 * 0.3 / 1000)
    assert found.low == pytest.approx(0.7 - half, abs=0.003)
    assert found.high == pytest.approx(0.7 + half, abs=0.003)


def test_interval_is_the_same_every_time_and_needs_two_items() -> None:
    scores = np.random.default_rng(1).random(301)
    assert mean_interval(scores) == mean_interval(list(scores))
    assert mean_interval([0.5]) is None
    assert mean_interval([0.25, 0.25, 0.25]) == Interval(0.25, 0.25)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng, hits = np.random.default_rng(7), 0
    for _ in range(200):
        found = mean_interval((rng.random(80) < 0.3).astype(float))
        assert found is not None
        hits += found.low <= 0.3 <= found.high
    assert 176 <= hits <= 200


def test_drawing_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(2).random(40)
    whole = mean_interval(scores)
    monkeypatch.setattr("tessera.evaluate.bootstrap._CELLS", 1000)
    assert mean_interval(scores) == whole


def test_a_metric_that_is_a_mean_has_about_the_interval_of_the_mean() -> None:
    scores = np.random.default_rng(3).random(200)
    drawn, exact = metric_interval(200, lambda places: float(scores[places].mean())), mean_interval(scores)
    assert drawn is not None
    assert exact is not None
    assert drawn.low == pytest.approx(exact.low, abs=0.01)
    assert drawn.high == pytest.approx(exact.high, abs=0.01)


def test_with_many_items_the_jackknife_computes_the_metric_twenty_times() -> None:
    n = MOST_WORK // 20
    scores, calls = np.random.default_rng(4).random(n), []

    def metric(places: np.ndarray) -> float:
        calls.append(len(places))
        return float(scores[places].mean())

    found, exact = metric_interval(n, metric), mean_interval(scores)
    assert len(calls) == 21
    assert set(calls) == {n, n - n // 20}
    assert found is not None
    assert exact is not None
    assert found.high - found.low == pytest.approx(exact.high - exact.low, rel=0.5)
    assert (found.high + found.low) / 2 == pytest.approx(scores.mean())
    assert metric_interval(1, metric) is None


def test_mcnemar_is_the_binomial_test() -> None:
    def exact(better: int, worse: int) -> float:
        n, k = better + worse, min(better, worse)
        tail = sum(Fraction(math.comb(n, i), 2**n) for i in range(k + 1))
        return float(min(Fraction(1), 2 * tail))

    for better, worse in ((0, 0), (1, 0), (5, 5), (10, 2), (0, 12), (30, 51), (600, 700)):
        assert mcnemar(better, worse) == pytest.approx(exact(better, worse), rel=1e-9)
        assert mcnemar(worse, better) == mcnemar(better, worse)
    assert 0 < mcnemar(9000, 11000) < 1e-40


def test_paired_difference_of_right_and_wrong_answers() -> None:
    first, second = [1, 1, 0, 0, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1, 0, 0]
    found = paired(first, second)
    assert (found.n, found.difference, found.better, found.worse) == (8, 0.25, 3, 1)
    assert found.exact
    assert found.p == mcnemar(3, 1) == pytest.approx(0.625)
    assert found.interval.low < 0.25 < found.interval.high


def test_paired_difference_of_shares() -> None:
    rng = np.random.default_rng(5)
    first = rng.random(400)
    second = np.clip(first + 0.02 + 0.05 * rng.standard_normal(400), 0, 1)
    found = paired(list(first), list(second))
    assert not found.exact
    assert found.interval.low > 0
    assert found.p < 0.01
    alone = mean_interval(first)
    assert alone is not None
    assert found.interval.high - found.interval.low < 0.3 * (alone.high - alone.low)
    assert paired(list(first), list(first)).p == 1.0
    assert paired([0.25], [0.5]).difference == 0.25
