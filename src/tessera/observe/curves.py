"""A run's numbers as curves: ``logging.jsonl`` read back, smoothed for the eye.

Smoothing is an exponential moving average, ``s_t = 0.9 s_(t-1) + 0.1 x_t``, corrected for its start at zero by the
weight seen so far (``1 - 0.9^t``), so that the first points are not pulled down::

    smoothed_t = s_t / (1 - 0.9^t)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tessera.observe.metrics import EVENT_KEY, LOG_FILE, STEP_KEY

Points = list[tuple[int, float]]


@dataclass(slots=True)
class Curves:
    """What ``logging.jsonl`` holds: curves by key, events in order, and the last row if the run finished.

    Keys of training curves are as logged (``loss``); those of evaluations start with ``eval_``. ``torn`` counts lines
    that are not complete JSON objects.
    """

    curves: dict[str, Points] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    max_steps: int = 0
    elapsed: str = ""
    torn: int = 0


def read_jsonl(path: Path) -> Iterator[dict[str, Any] | None]:
    """The JSON objects of ``path``, line by line; None for a line that is not one. Nothing if there is no file."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            yield row if isinstance(row, dict) else None


def read_log(run_dir: Path) -> Curves:
    """Read ``logging.jsonl`` of ``run_dir``; empty curves if it is missing."""
    log = Curves()
    for row in read_jsonl(run_dir / LOG_FILE):
        if row is None:
            log.torn += 1
        elif STEP_KEY not in row:
            log.last = row
        elif EVENT_KEY in row:
            log.events.append(row)
        else:
            _add(log, row)
    return log


def _add(log: Curves, row: dict[str, Any]) -> None:
    done, _, of = str(row[STEP_KEY]).partition("/")
    step = int(done)
    log.steps, log.max_steps = max(log.steps, step), int(of or 0)
    log.elapsed = str(row.get("elapsed_time", log.elapsed))
    is_eval = any(key.startswith("eval_") for key in row)
    for key, value in row.items():
        if is_eval and not key.startswith("eval_"):
            continue
        number = as_number(value)
        if number is not None:
            log.curves.setdefault(key, []).append((step, number))


def as_number(value: Any) -> float | None:
    """``value`` if it is a number, also one written as ``"nan"`` or ``"inf"``; else None."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    return float(value) if value in ("nan", "inf", "-inf") else None


def finite(points: Sequence[tuple[int, float]]) -> Points:
    """The points whose value is finite."""
    return [(step, value) for step, value in points if math.isfinite(value)]


def ema(values: Sequence[float], decay: float = 0.9) -> list[float]:
    """The bias-corrected exponential moving average of ``values``."""
    out: list[float] = []
    sum_, weight = 0.0, 0.0
    for value in values:
        sum_ = decay * sum_ + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        out.append(sum_ / weight)
    return out


def thin(points: Points, most: int = 600) -> Points:
    """At most about ``most`` of ``points``: of each bucket the lowest and the highest, so that spikes stay."""
    if len(points) <= most:
        return points
    buckets = most // 2
    out: Points = [points[0]]
    for index in range(buckets):
        bucket = points[index * len(points) // buckets : (index + 1) * len(points) // buckets]
        ends = {min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])}
        out += sorted(ends - {out[-1]})
    return out if out[-1] == points[-1] else [*out, points[-1]]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten apart) that cover ``low`` to ``high``."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]
