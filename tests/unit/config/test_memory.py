"""One rule for the memory flags of three dialects, and one sentence for each way to contradict it."""

from __future__ import annotations

import pytest

from tessera.config.errors import UserError
from tessera.config.resolve import resolve, run_from_json
from tessera.config.run import Run

SFT = "sft --model org/name --dataset rows.jsonl"


def run(flags: str) -> Run:
    return resolve([*SFT.split(), *flags.split()], {})


@pytest.mark.parametrize(
    ("flags", "expected", "tower"),
    [
        ("", ("full", "uniform", 1, ()), True),
        ("--gradient_checkpointing true", ("full", "uniform", 1, ()), True),
        ("--gradient_checkpointing false", ("none", "uniform", 1, ()), False),
        ("--gradient_checkpointing false --vit_gradient_checkpointing true", ("none", "uniform", 1, ()), True),
        ("--recompute_granularity none", ("none", "uniform", 1, ()), False),
        ("--recompute_granularity selective", ("selective", "uniform", 1, ("core_attn",)), True),
        (
            "--recompute_granularity selective --recompute_modules mlp layernorm",
            ("selective", "uniform", 1, ("mlp", "layernorm")),
            True,
        ),
        (
            "--recompute_granularity full --recompute_method uniform --recompute_num_layers 1",
            ("full", "uniform", 1, ()),
            True,
        ),
        ("--recompute_method block --recompute_num_layers 3", ("full", "block", 3, ()), True),
        ("--gradient_checkpointing true --recompute_granularity none", ("none", "uniform", 1, ()), False),
        (
            "--gradient_checkpointing false --recompute_granularity selective",
            ("selective", "uniform", 1, ("core_attn",)),
            True,
        ),
    ],
)
def test_what_is_recomputed(flags: str, expected: tuple[object, ...], tower: bool) -> None:
    for made in (run(flags), run_from_json(run(flags).to_json())):
        memory = made.memory
        found = (
            memory.recompute_granularity,
            memory.recompute_method,
            memory.recompute_num_layers,
            memory.recompute_modules,
        )
        assert found == expected
        assert made.train.vit_gradient_checkpointing is tower


def test_megatrons_spelling_of_offloading() -> None:
    memory = run("--cpu_offloading true --cpu_offloading_num_layers 4").memory
    assert memory.activation_cpu_offload and memory.activation_offload_num_layers == 4
    assert run("--optimizer_cpu_offload true --optimizer_offload_fraction 0.5").memory.optimizer_share == 0.5
    assert run("--optimizer_cpu_offload true").memory.optimizer_share == 1.0
    assert run("").memory.optimizer_share == 0.0
    memory = run("--fp8_format e4m3 --train_type full").memory
    assert memory.fp8 and memory.fp8_format == "e4m3"
    assert run("--fp8 true --train_type full").memory.fp8_format == "hybrid"


@pytest.mark.parametrize(("stage", "number"), [("zero2_offload", 2), ("zero3_offload", 3)])
def test_deepspeeds_offload_is_a_stage_and_an_optimizer_on_the_host(stage: str, number: int) -> None:
    made = run(f"--deepspeed {stage}")
    for each in (made, run_from_json(made.to_json())):
        assert each.parallel.zero_stage == number
        assert each.memory.optimizer_share == 1.0
    assert any("stay on the device" in note for note in made.notes) == (number == 3)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            "--gradient_checkpointing false --recompute_granularity full",
            "--gradient_checkpointing false contradicts --recompute_granularity full; drop one",
        ),
        (
            "--recompute_granularity selective --recompute_num_layers 2",
            "--recompute_num_layers 2 needs --recompute_granularity full, not --recompute_granularity selective",
        ),
        (
            "--gradient_checkpointing false --recompute_method block",
            "--recompute_method block needs --recompute_granularity full, not --gradient_checkpointing false",
        ),
        (
            "--recompute_modules mlp",
            "--recompute_modules mlp needs --recompute_granularity selective, not --gradient_checkpointing true",
        ),
        ("--recompute_num_layers 0", "--recompute_num_layers 0"),
        ("--recompute_granularity half", "allowed are none, selective, full"),
        (
            "--activation_cpu_offload true --recompute_granularity selective --recompute_modules layernorm",
            "--recompute_modules layernorm does not go with --activation_cpu_offload true",
        ),
        ("--cpu_offloading_num_layers 2", "needs --activation_cpu_offload true"),
        ("--optimizer_offload_fraction 0.5", "--optimizer_offload_fraction 0.5 needs --optimizer_cpu_offload true"),
        ("--optimizer_cpu_offload true --optim muon", "not with Muon; use --optim adamw_torch_fused"),
        ("--deepspeed zero2_offload --optimizer_cpu_offload false", "contradicts --optimizer_cpu_offload false"),
        ("--deepspeed zero1_offload", "--deepspeed zero1_offload: allowed are"),
        ("--fp8 true", "needs --train_type full, not lora"),
    ],
)
def test_contradictions(flags: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        run(flags)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
