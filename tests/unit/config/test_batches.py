"""Batch and schedule: several ways to say them, contradictions, and the numbers Megatron would have."""

from __future__ import annotations

import shlex

import pytest

from tessera.config.errors import UserError
from tessera.config.resolve import resolve, run_from_json
from tessera.config.run import Run

SFT = "megatron sft --load org/name --dataset rows.jsonl --max_epochs 1"


def run(line: str, **env: str) -> Run:
    return resolve(shlex.split(line), env)


@pytest.mark.parametrize(
    ("more", "ranks", "accumulation", "rows"),
    [
        ("", 1, 16, 16),
        ("", 4, 4, 16),
        ("--micro_batch_size 2 --global_batch_size 12", 3, 2, 12),
        ("--global_batch_size 8 --tensor_model_parallel_size 2", 4, 4, 8),
        ("--gradient_accumulation_steps 3", 2, 3, 6),
        ("--global_batch_size 6 --gradient_accumulation_steps 3", 2, 3, 6),
    ],
)
def test_accumulation_follows_the_batch(more: str, ranks: int, accumulation: int, rows: int) -> None:
    found = run(f"{SFT} {more}", NPROC_PER_NODE=str(ranks)).train
    assert (found.gradient_accumulation_steps, found.global_batch_size) == (accumulation, rows)


def test_the_batch_is_known_in_the_other_dialect_too() -> None:
    found = run("sft --model a --dataset b --global_batch_size 8", NPROC_PER_NODE="2").train
    assert (found.gradient_accumulation_steps, found.global_batch_size) == (4, 8)
    assert run("sft --model a --dataset b", NPROC_PER_NODE="3").train.global_batch_size == 18


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("--global_batch_size 5", "--global_batch_size 5 is no multiple of --per_device_train_batch_size 1 x 2 "
         "data-parallel ranks = 2; use 4 or 6"),
        ("--micro-batch-size 16 --global-batch-size 16", "--global-batch-size 16 is no multiple of --micro-batch-size "
         "16 x 2 data-parallel ranks = 32; use 32"),
        ("--global_batch_size 6 --gradient_accumulation_steps 2", "--global_batch_size 6 contradicts "
         "--per_device_train_batch_size 1 x 2 data-parallel ranks x --gradient_accumulation_steps 2 = 4; drop one"),
        ("--pipeline_model_parallel_size 2 --global_batch_size 1", "--global_batch_size 1 (1 microbatches): a pipeline "
         "of 2 ranks is filled by 2 microbatches or more; use 2"),
        ("--train_samples 64 --train_iters 2", "--train_samples and --train_iters say the same in two units"),
        ("--train_samples 15", "--train_samples 15 is less than one step (--global_batch_size 16)"),
        ("--lr_warmup_samples 15", "--lr_warmup_samples 15 needs --lr_decay_samples or --train_samples"),
        ("--lr_warmup_fraction 0.1 --lr_warmup_iters 5", "--lr_warmup_fraction and --lr_warmup_iters contradict"),
        ("--lr_warmup_iters 5 --lr_decay_iters 5", "--lr_warmup_iters 5 leaves nothing of --lr_decay_iters 5"),
        ("--lr fast", "--lr fast: expected a number"),
    ],
)  # fmt: skip
def test_contradictions(more: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        run(f"{SFT} {more}", NPROC_PER_NODE="2")
    assert str(caught.value).startswith(sentence)
    assert caught.value.exit_code == 2


def test_samples_are_steps_times_the_batch() -> None:
    line = f"{SFT} --train_samples 1000 --lr_decay_samples 500 --lr_warmup_samples 83 --global_batch_size 16"
    found = run(line).train
    assert found.max_steps == 62  # rounded down
    assert found.lr_decay_iters == 500 / 16  # not rounded
    assert found.lr_warmup_fraction is not None
    assert found.lr_warmup_fraction * found.lr_decay_iters * 16 == pytest.approx(83)
    assert run(f"{SFT} --train_samples 160 --lr_warmup_samples 16").train.lr_warmup_fraction == 0.1


def test_no_evaluation() -> None:
    assert run(f"{SFT} --eval_iters 0").train.eval_strategy == "no"
    assert run(f"{SFT} --eval_iters 3 --micro_batch_size 4").train.per_device_eval_batch_size == 4


def test_names_of_the_other_dialect_say_where_they_hold() -> None:
    for line, sentence in (
        ("sft --model a --lr 1", "--lr: tessera sft calls it --learning_rate; tessera megatron sft takes both names"),
        ("sft --model a --load b", "--load: tessera sft has no such flag; tessera megatron sft takes it"),
        ("megatron sft --lod b", "--lod: tessera megatron sft has no such flag; nearest: --load"),
        ("megatron sft --load b --dataset c", "tessera megatron sft: --max_epochs, --train_iters or --train_samples"),
    ):
        with pytest.raises(UserError) as caught:
            run(line)
        assert str(caught.value).startswith(sentence)


def test_short_flags_yield_to_what_they_are_short_for() -> None:
    found = run(f"{SFT} --bf16 --torch_dtype float32 --use_distributed_optimizer false --optimizer muon")
    assert (found.model.torch_dtype, found.parallel.deepspeed, found.train.optim) == ("float32", "zero0", "muon")
    assert "--torch_dtype float32 holds, --bf16 true is dropped" in found.notes


def test_args_json_holds_the_names_of_its_dialect() -> None:
    found = run(f"{SFT} --lr 1e-3 --global_batch_size 8")
    stored = found.to_json()
    assert (stored["lr"], stored["learning_rate"], stored["dialect"]) == (1e-3, 1e-3, "megatron")
    assert stored["micro_batch_size"] == 1
    again = run_from_json(stored)
    assert (again.values(), again.dialect) == (found.values(), "megatron")
    assert "lr" not in run("sft --model a --dataset b").to_json()
