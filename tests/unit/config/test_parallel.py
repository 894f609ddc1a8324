"""Which numbers of processes an arrangement is for, and the microbatches of a step that nobody chose."""

from __future__ import annotations

from typing import Any

import pytest

from tessera.config.parallel import divided
from tessera.config.resolve import resolve, run_of


@pytest.mark.parametrize(
    ("world", "sizes", "expected"),
    [
        (1, {}, (1, 1)),
        (8, {"tp": 2}, (1, 4)),
        (8, {"tp": 2, "replicate": 2}, (2, 2)),
        (8, {"pp": 2, "zero": 0}, (4, 1)),
        (8, {"ep": 8}, (1, 8)),
        (8, {"pp": 2, "cp": 2, "tp": 2, "ep": 4}, (1, 1)),
    ],
)
def test_what_is_left_for_data(world: int, sizes: dict[str, int], expected: tuple[int, int]) -> None:
    assert divided(world, **{"pp": 1, "cp": 1, "tp": 1, "ep": 1, "replicate": 1, "zero": 2, **sizes}) == expected


@pytest.mark.parametrize(
    ("processes", "flags", "expected"),
    [
        (1, {}, 16),
        (8, {}, 2),
        (8, {"tensor_model_parallel_size": 4}, 8),
        (8, {"pipeline_model_parallel_size": 8, "per_device_train_batch_size": 8}, 8),
        (32, {"pipeline_model_parallel_size": 2}, 2),
        (8, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 4}, 8),
        (6, {"pipeline_model_parallel_size": 3}, 8),
        (6, {"pipeline_model_parallel_size": 3, "pipeline_schedule": "zero_bubble"}, 9),
    ],
)
def test_a_step_has_sixteen_rows_or_fills_the_pipeline(processes: int, flags: dict[str, Any], expected: int) -> None:
    run = run_of("sft", model="org/model", dataset=("rows.jsonl",), nproc_per_node=processes, **flags)
    assert run.train.gradient_accumulation_steps == expected


def test_a_launcher_knows_better_than_the_flags() -> None:
    words = ["sft", "--model", "org/model", "--dataset", "rows.jsonl", "--tensor_model_parallel_size", "4"]
    run = resolve(words, {"LOCAL_RANK": "0", "WORLD_SIZE": "8"})
    assert run.train.gradient_accumulation_steps == 8
