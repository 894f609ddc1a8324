"""How far a score may be trusted: intervals and paired tests, from nothing but the scores of the items.

A benchmark is a sample of questions; another sample would have given another score. Drawing the items again and again
from those at hand, with replacement, shows by how much (the *bootstrap*, Efron 1979); many draws make one matrix::

    places [B, n]  ~  uniform(0 .. n-1)        means [B] = scores[places].mean(1)        interval = percentiles

Two models that answered the same questions are compared question by question: the interval is that of the mean
*difference*, which is much narrower than the two intervals suggest, because easy questions are easy for both. For right
or wrong answers McNemar's test is exact: of the questions that only one of them got right, each is a fair coin if the
two are equally good.

All draws come from a fixed seed: the same answers give the same interval, digit by digit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
LEVEL = 0.95
SEED = 20240229
_CELLS = 4_000_000
"""Entries of the matrix of places that are held at a time."""

MOST_WORK, FEWEST = 40_000, 100
"""Items times draws that a metric which is no mean may cost, and the fewest draws that percentiles are taken of."""
GROUPS, T_QUANTILE = 20, 2.093
"""Groups of the jackknife that takes over then, and Student's 97.5 % quantile for one less."""


@dataclass(frozen=True, slots=True)
class Interval:
    """The middle 95 % of what another sample of questions might have given."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Paired:
    """Two models on the same ``n`` questions: mean difference (second minus first), its interval and probability.

    ``p`` is the two-sided probability of a difference as large if there were none. ``better`` and ``worse`` count the
    questions that the second scored higher or lower; ``exact`` says whether ``p`` is McNemar's.
    """

    n: int
    difference: float
    interval: Interval
    p: float
    better: int
    worse: int
    exact: bool


def mean_interval(scores: Sequence[float] | np.ndarray) -> Interval | None:
    """The interval of the mean of ``scores [n]``; None for fewer than two."""
    values = np.asarray(scores, dtype=np.float64)
    return None if len(values) < 2 else _percentiles(_means(values))


def metric_interval(n: int, metric: Callable[[np.ndarray], float]) -> Interval | None:
    """The interval of a metric that is no mean; ``metric(places)`` computes it over the items at these places of ``n``.

    With many items, where drawing them often costs too much, it is the jackknife's: the metric without each of 20
    groups, and Student's quantile (Quenouille 1956, Tukey 1958). None for fewer than two items.
    """
    if n < 2:
        return None
    rng, draws = np.random.default_rng(SEED), min(DRAWS, MOST_WORK // n)
    if draws >= FEWEST:
        return _percentiles(np.array([metric(rng.integers(0, n, n)) for _ in range(draws)]))
    places = rng.permutation(n)
    without = np.array([metric(np.delete(places, np.s_[group::GROUPS])) for group in range(GROUPS)])
    error = math.sqrt((GROUPS - 1) / GROUPS * float(np.square(without - without.mean()).sum()))
    whole = metric(np.arange(n))
    return Interval(whole - T_QUANTILE * error, whole + T_QUANTILE * error)


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Compare ``first [n]`` and ``second [n]``, scores of the same questions in the same order; n > 0."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    assert len(a) == len(b) > 0
    differences = b - a
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    binary = bool(np.isin(a, (0.0, 1.0)).all() and np.isin(b, (0.0, 1.0)).all())
    means = _means(differences) if len(a) > 1 else differences
    p = mcnemar(better, worse) if binary else _two_sided(means, float(differences.mean()))
    return Paired(len(a), float(differences.mean()), _percentiles(means), p, better, worse, binary)


def mcnemar(better: int, worse: int) -> float:
    """Exact two-sided McNemar: the chance that a fair coin splits ``better + worse`` throws at least this unevenly."""
    n, k = better + worse, min(better, worse)
    if n == 0:
        return 1.0
    # Sums of logarithms: the binomial coefficients of thousands of throws exceed floating point.
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(k + 1)]
    top = max(logs)
    tail = math.exp(top - n * math.log(2)) * math.fsum(math.exp(value - top) for value in logs)
    return min(1.0, 2 * tail)


def _means(values: np.ndarray) -> np.ndarray:
    """Means ``[DRAWS]`` of samples drawn from ``values [n]`` with replacement."""
    rng, n = np.random.default_rng(SEED), len(values)
    rows = max(1, _CELLS // n)
    parts = []
    for start in range(0, DRAWS, rows):
        places = rng.integers(0, n, (min(rows, DRAWS - start), n))
        parts.append(values[places].mean(axis=1))
    return np.concatenate(parts)


def _percentiles(draws: np.ndarray) -> Interval:
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    return Interval(float(low), float(high))


def _two_sided(means: np.ndarray, observed: float) -> float:
    """How often a mean drawn around zero is as far from it as the observed one; never less than one in all draws."""
    if observed == 0.0:
        return 1.0
    extreme = int((np.abs(means - observed) >= abs(observed)).sum())
    return min(1.0, (extreme + 1) / (len(means) + 1))
