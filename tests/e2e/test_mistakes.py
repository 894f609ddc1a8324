"""A wrong command line: one line that names the flag and the way out, exit code 2, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.command import shell, tessera

BASE = ("sft", "--model", "org/model", "--dataset", "rows.jsonl")


@pytest.mark.parametrize(
    ("words", "pieces"),
    [
        ((*BASE, "--learning_rte", "1e-4"), ["--learning_rte", "--learning_rate"]),
        ((*BASE, "--lora_rnk", "8"), ["--lora_rnk", "--lora_rank"]),
        ((*BASE, "--learning_rate", "fast"), ["--learning_rate fast"]),
        ((*BASE, "--lr_scheduler_type", "cosin"), ["--lr_scheduler_type cosin", "cosine"]),
        ((*BASE, "--per_device_train_batch_size", "0"), ["--per_device_train_batch_size 0"]),
        ((*BASE, "--deepspeed", "zero4"), ["--deepspeed zero4", "zero3"]),
        ((*BASE, "--train_type", "full", "--quant_method", "bnb"), ["--train_type full", "--train_type lora"]),
        (("sft", "--dataset", "rows.jsonl"), ["--model", "required"]),
        (("sft", "--model", "org/model"), ["--dataset", "required"]),
        (("sft", "--model", "./nowhere", "--dataset", "rows.jsonl"), ["--model ./nowhere", "no such directory"]),
        (("sfft", "--model", "org/model"), ["sfft", "sft"]),
        (("rlhf", "--model", "org/model"), ["rlhf", "not in this version"]),
        (("export", "--model", "org/model", "--merge_lora", "true"), ["--merge_lora", "--adapters"]),
        ((*BASE, "--MAX_PIXELS", "many"), ["--MAX_PIXELS"]),
    ],
)
def test_one_line_and_exit_code_2(words: tuple[str, ...], pieces: list[str]) -> None:
    done = tessera(*words)
    assert done.code == 2
    assert not [piece for piece in pieces if piece not in done.error]
    assert done.out == "" and done.err.count("\n") == 1


def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = shell("tessera sft --modle a --dataset b", tmp_path)
    assert (done.code, done.out) == (2, "")
    assert "--model" in done.error
    done = shell("tessera sft --model org/model --dataset b --max_pixel 5", tmp_path, NPROC_PER_NODE="2")
    assert done.code == 2 and "--max_pixels" in done.error
