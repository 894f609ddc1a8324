"""Learning-rate schedules as closed forms of the step number.

A schedule is a pure function ``step -> factor in [0, 1]``; it has no state, so nothing of it needs to be saved and a
resumed run cannot drift from an uninterrupted one. All schedules warm up linearly from 0::

    cosine               half a cosine down to min_lr
    linear               a straight line down to min_lr
    constant             1 (no warm-up unless asked for)
    constant_with_warmup 1 after the warm-up
    warmup_stable_decay  1, then a line down to min_lr over the last ``decay`` share of the steps (WSD)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup", "warmup_stable_decay")


@dataclass(frozen=True, slots=True)
class Schedule:
    """``factor(step)`` of the base learning rate for 0-based optimiser ``step``.

    ``max_steps`` is where ``min_ratio`` is reached, and held if training goes on. It and ``warmup_steps`` may be
    fractions of a step, as schedules in samples are.
    """

    kind: str
    max_steps: float
    warmup_steps: float
    min_ratio: float = 0.0
    decay_ratio: float = 0.1

    def __post_init__(self) -> None:
        assert self.kind in SCHEDULES, self.kind

    def factor(self, step: int) -> float:
        """Multiplier of the base rate at this step."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if self.kind in ("constant", "constant_with_warmup"):
            return 1.0
        start = self.warmup_steps
        if self.kind == "warmup_stable_decay":
            start = max(start, self.max_steps - math.ceil(self.decay_ratio * self.max_steps))
        if step < start:
            return 1.0
        progress = min(1.0, (step - start) / max(1, self.max_steps - start))
        shape = 0.5 * (1.0 + math.cos(math.pi * progress)) if self.kind == "cosine" else 1.0 - progress
        return self.min_ratio + (1.0 - self.min_ratio) * shape


def warmup_steps(max_steps: int, *, ratio: float, steps: int) -> int:
    """Warm-up length: ``steps`` if given (> 0), else the ceiling of ``ratio * max_steps``."""
    return steps if steps > 0 else math.ceil(ratio * max_steps)
