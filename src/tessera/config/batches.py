"""How many rows make a step, and how long the schedule is: three ways to say each, one arithmetic.

A step is ``global_batch_size = per_device_train_batch_size x data-parallel ranks x gradient_accumulation_steps`` rows
(packs, if rows are packed). Either of the outer two decides, and the other follows::

    --gradient_accumulation_steps 4                      the batch grows with the processes
    --global_batch_size 128 (in tessera megatron: 16)    the batch stays, accumulation follows; refused if it is no
                                                         whole number
    neither                                              accumulation fills 16 rows

Schedules in samples are those in steps times the batch, as Megatron has them: ``--train_samples`` is rounded down to
whole steps, decay and warm-up are not, so the learning rate of every step is the same number as there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tessera.config.parallel import CP, PP, TP, accumulation
from tessera.config.parse import usage_error

ACCUMULATION, GLOBAL, ROWS = "gradient_accumulation_steps", "global_batch_size", "per_device_train_batch_size"


def settle(
    values: dict[str, Any], given: Callable[[str], bool], label: Callable[[str], str], world: int, *, pads: bool
) -> None:
    """Decide batch and schedule in ``values``, in place, for ``world`` processes; UserError for contradictions.

    ``given`` says whether the user set a flag and ``label`` how it was spelled; ``pads`` is whether the evaluation
    batch follows the training batch.
    """
    _batch(values, given, label, world)
    _samples(values, given, label)
    _schedule(values, given, label)
    if pads and not given("per_device_eval_batch_size"):
        values["per_device_eval_batch_size"] = values[ROWS]
    if values["eval_iters"] == 0:
        values["eval_strategy"] = "no"


def _batch(values: dict[str, Any], given: Callable[[str], bool], label: Callable[[str], str], world: int) -> None:
    rows, model = values[ROWS], values[PP] * values[TP] * values[CP]
    data, fits = max(1, world // model), world % model == 0  # what does not fit is refused by parallel.fits
    wanted, count = values[GLOBAL], values[ACCUMULATION]
    each = f"{label(ROWS)} {rows} x {data} data-parallel rank{'s' if data > 1 else ''}"
    if count is not None:
        if given(GLOBAL) and given(ACCUMULATION) and fits and wanted != rows * data * count:
            raise usage_error(
                f"{label(GLOBAL)} {wanted} contradicts {each} x {label(ACCUMULATION)} {count} = {rows * data * count}; "
                "drop one of them"
            )
    elif wanted is not None:
        whole = rows * data
        if fits and wanted % whole:
            near = [number for number in (wanted // whole * whole, (wanted // whole + 1) * whole) if number]
            raise usage_error(
                f"{label(GLOBAL)} {wanted} is no multiple of {each} = {whole}; use {' or '.join(map(str, near))}"
            )
        count = max(1, wanted // whole)
    else:
        count = accumulation(values, world)
    values[ACCUMULATION], values[GLOBAL] = count, rows * data * count


def _samples(values: dict[str, Any], given: Callable[[str], bool], label: Callable[[str], str]) -> None:
    train, decay, warm = (values.get(name) for name in ("train_samples", "lr_decay_samples", "lr_warmup_samples"))
    for name, other in (
        ("train_samples", "max_steps"),
        ("lr_decay_samples", "lr_decay_iters"),
        ("lr_warmup_samples", "warmup_steps"),
        ("lr_warmup_samples", "lr_warmup_fraction"),
    ):
        if values.get(name) is not None and given(other):
            raise usage_error(f"{label(name)} and {label(other)} say the same in two units; drop one of them")
    if train is not None:
        if train < values[GLOBAL]:
            raise usage_error(
                f"{label('train_samples')} {train} is less than one step ({label(GLOBAL)} {values[GLOBAL]})"
            )
        values["max_steps"] = train // values[GLOBAL]
    if decay is not None:
        values["lr_decay_iters"] = decay / values[GLOBAL]
    if warm is not None:
        whole = decay if decay is not None else train
        if whole is None:
            raise usage_error(f"{label('lr_warmup_samples')} {warm} needs --lr_decay_samples or --train_samples")
        values["lr_warmup_fraction"] = warm / whole


def _schedule(values: dict[str, Any], given: Callable[[str], bool], label: Callable[[str], str]) -> None:
    for other in ("warmup_steps", "warmup_ratio"):
        if given("lr_warmup_fraction") and given(other):
            raise usage_error(
                f"{label('lr_warmup_fraction')} and {label(other)} contradict each other; drop one of them"
            )
    end = values["lr_decay_iters"]
    if end is not None and values["warmup_steps"] >= end:
        raise usage_error(
            f"{label('warmup_steps')} {values['warmup_steps']} leaves nothing of {label('lr_decay_iters')} {end:g}"
        )
