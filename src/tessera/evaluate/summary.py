"""The figures of a benchmark: its own, each with the interval that another sample of questions might have given.

    MMMU          mmmu@official   accuracy   51.20   [48.1, 54.4]     900   unread 12, cut 3

``summary.json`` holds no times, so two evaluations with the same answers have the same
one, however often they were interrupted and on however many ranks they ran.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from tessera.evaluate.bootstrap import Interval, mean_interval, metric_interval
from tessera.evaluate.item import Judged
from tessera.evaluate.runner import TROUBLES, Outcome

FIELDS = ("split", "l2-category", "category", "question_type")
"""Facts of an item that a benchmark's figures are broken down by, where there are between 2 and ``MOST_PARTS``."""
MOST_PARTS = 60
WIDTH = 110


@dataclass(frozen=True, slots=True)
class Part:
    """One value of one fact: how many items have it, their mean score and its interval."""

    field: str
    name: str
    n: int
    score: float
    interval: Interval | None


@dataclass(frozen=True, slots=True)
class Summary:
    """One benchmark: ``value`` is its ``metric`` (unscaled), ``metrics`` all of them, ``is_mean`` whether the metric is
    the mean of the items' scores (of groups of items, where these stand or fall together)."""

    name: str
    path: str
    benchmark: str
    metric: str
    scale: float
    n: int
    total: int
    value: float
    interval: Interval | None
    is_mean: bool
    metrics: Mapping[str, float]
    parts: Sequence[Part] = ()
    troubles: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The object in ``summary.json``."""
        return asdict(self)

    def shown(self, value: float) -> str:
        """A score as it is published."""
        return f"{value * self.scale:.2f}"

    def range(self, interval: Interval | None) -> str:
        """An interval as it is published; empty if there is none."""
        return f"[{interval.low * self.scale:.1f}, {interval.high * self.scale:.1f}]" if interval else ""


def summarise(outcome: Outcome) -> Summary:
    """The figures of ``outcome``."""
    benchmark, judged, together = outcome.job.benchmark, outcome.judged, outcome.together
    value = outcome.metrics[benchmark.metric]
    units = unit_scores(judged, together)
    is_mean = abs(value - float(units.mean())) < 1e-9

    def metric(places: np.ndarray) -> float:
        return benchmark.aggregate([judged[place] for place in places])[benchmark.metric]

    interval = mean_interval(units) if is_mean else metric_interval(len(judged), metric)
    parts = []
    for name in FIELDS:
        found: dict[str, list[int]] = {}
        for place, (item, _) in enumerate(judged):
            if item.meta.get(name) not in (None, ""):
                found.setdefault(str(item.meta[name]), []).append(place)
        if 2 <= len(found) <= MOST_PARTS:
            for part, places in sorted(found.items()):
                inside = unit_scores([judged[at] for at in places], [together[at] for at in places])
                parts.append(Part(name, part, len(places), float(inside.mean()), mean_interval(inside)))
    return Summary(
        outcome.job.name,
        str(outcome.job.path),
        benchmark.name,
        benchmark.metric,
        benchmark.scale,
        len(judged),
        outcome.total,
        value,
        interval,
        is_mean,
        dict(outcome.metrics),
        parts,
        outcome.troubles,
    )


def unit_scores(judged: Judged, together: Sequence[str]) -> np.ndarray:
    """``[units] float64``: the mean score of the items of each group that stands or falls together."""
    found: dict[str, list[float]] = {}
    for (_, scored), group in zip(judged, together, strict=True):
        found.setdefault(group, []).append(scored.score or 0.0)
    return np.array([sum(scores) / len(scores) for scores in found.values()])


def screen(model: str, summaries: Sequence[Summary], directory: str) -> str:
    """One screen: a line per benchmark, then what was wrong with items."""
    rows = [("benchmark", "scored as", "metric", "score", "95 %", "items")]
    for found in summaries:
        items = f"{found.n:,}" if found.n == found.total else f"{found.n:,} of {found.total:,}"
        rows.append(
            (found.name, found.benchmark, found.metric, found.shown(found.value), found.range(found.interval), items)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    lines = [f"tessera eval  {model} ".ljust(WIDTH, "─")]
    for row in rows:
        cells = [
            cell.rjust(width) if at >= 3 else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    for found in summaries:
        if found.troubles:
            told = ", ".join(f"{count:,} {TROUBLES[kind]}" for kind, count in found.troubles.items())
            lines.append(f"{found.name}: {told}")
    lines += [f"{directory}/report.html", "─" * WIDTH]
    return "\n".join(lines)
