"""Schedules are closed forms: warm-up, shape and end point."""

from __future__ import annotations

import math

import pytest

from tessera.train.schedule import SCHEDULES, Schedule, warmup_steps


@pytest.mark.parametrize("kind", SCHEDULES)
def test_warms_up_linearly_and_never_exceeds_one(kind: str) -> None:
    schedule = Schedule(kind, max_steps=100, warmup_steps=10, min_ratio=0.1)
    factors = [schedule.factor(step) for step in range(100)]
    assert factors[:11] == pytest.approx([step / 10 for step in range(11)])
    assert max(factors) == 1.0 and min(factors[10:]) >= 0.1 - 1e-9


@pytest.mark.parametrize("kind", ["cosine", "linear", "warmup_stable_decay"])
def test_ends_at_min_lr(kind: str) -> None:
    assert Schedule(kind, 100, 10, 0.25).factor(100) == pytest.approx(0.25)


def test_cosine_matches_transformers() -> None:
    torch = pytest.importorskip("torch")
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, 7, 50)
    ours = Schedule("cosine", 50, 7)
    for step in range(50):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(ours.factor(step), abs=1e-12)
        optimizer.step()
        theirs.step()


def test_wsd_is_flat_until_the_decay() -> None:
    schedule = Schedule("warmup_stable_decay", 100, 10, 0.0, decay_ratio=0.2)
    assert all(schedule.factor(step) == 1.0 for step in range(10, 81))
    assert schedule.factor(90) == pytest.approx(0.5)


def test_warmup_steps_win_over_ratio() -> None:
    assert warmup_steps(100, ratio=0.05, steps=0) == 5
    assert warmup_steps(101, ratio=0.05, steps=0) == math.ceil(5.05)
    assert warmup_steps(100, ratio=0.05, steps=17) == 17


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_schedules_in_samples_are_megatrons(kind: str) -> None:
    """Its rule, written down in samples: warm-up to the peak, decay to the minimum, which then stays."""
    batch, warm, decay, peak, low = 16, 83, 500, 2.0, 0.5
    schedule = Schedule(kind, decay / batch, warm / decay * (decay / batch), low / peak)
    for step in range(60):
        samples = step * batch
        if samples <= warm:
            expected = peak * samples / warm
        elif kind == "constant":
            expected = peak
        elif samples > decay:
            expected = low
        else:
            done = (samples - warm) / (decay - warm)
            shape = 0.5 * (math.cos(math.pi * done) + 1.0) if kind == "cosine" else 1.0 - done
            expected = low + shape * (peak - low)
        assert peak * schedule.factor(step) == pytest.approx(expected, rel=1e-9), step
