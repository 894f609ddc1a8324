"""Five sources, one Run: who wins, what is derived, what is refused, what the user is told."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from tessera.config.errors import UserError
from tessera.config.resolve import read_args_json, resolve, run_from_json, run_of
from tessera.config.run import Run


def run(line: str, **env: str) -> Run:
    return resolve(shlex.split(line), env)


def refusal(line: str, **env: str) -> str:
    with pytest.raises(UserError) as caught:
        run(line, **env)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


SFT = "sft --model org/name --dataset rows.jsonl"


def test_defaults_that_follow_from_other_values() -> None:
    lora = run(SFT)
    assert lora.train.learning_rate == 1e-4
    assert lora.train.gradient_accumulation_steps == 16
    assert lora.train.eval_steps == lora.save.save_steps == 500
    assert lora.train.eval_strategy == "steps"
    assert lora.data.data_seed == 42
    assert lora.save.output_dir == "output/name"
    assert lora.data.loss_scale == "default"
    assert lora.provenance["learning_rate"] == "default"
    full = run(
        f"{SFT} --train_type full --per_device_train_batch_size 3 --save_steps 0.5 --save_strategy epoch --seed 7"
    )
    assert full.train.learning_rate == 1e-5
    assert full.train.gradient_accumulation_steps == 6
    assert full.train.eval_steps == 0.5
    assert full.train.eval_strategy == "epoch"
    assert full.data.data_seed == 7
    assert run("pt --model a --dataset b").data.loss_scale == "all"
    assert run(f"{SFT} --gradient_checkpointing false").train.vit_gradient_checkpointing is False


def test_accumulation_counts_the_processes_before_and_after_the_launch() -> None:
    assert run(SFT, NPROC_PER_NODE="8").train.gradient_accumulation_steps == 2
    assert run(SFT, LOCAL_RANK="1", RANK="1", WORLD_SIZE="8").train.gradient_accumulation_steps == 2
    # A scheduler's RANK and WORLD_SIZE count machines and say nothing about this process.
    assert run(SFT, RANK="1", WORLD_SIZE="2").train.gradient_accumulation_steps == 16


def test_who_wins(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "ENV:\n  MAX_PIXELS: 1\n  FPS: 3\nmodel: org/name\ndataset: [a, b]\nmax_length: 7\nlearning_rate: 1e-3\n"
        "packing: true\nsystem: null\n"
    )
    found = run(f"sft {file} --max_length 9", MAX_PIXELS="2")
    assert found.data.max_length == 9
    assert found.provenance["max_length"] == "flag"
    assert found.data.dataset == ("a", "b")
    assert found.data.packing is True
    assert found.train.learning_rate == 1e-3
    assert found.provenance["learning_rate"] == "yaml"
    assert found.model.max_pixels == 2  # the shell before the file's ENV block
    assert found.model.fps == 3.0
    assert found.provenance["fps"] == "env"
    assert found.env == {"MAX_PIXELS": "2", "FPS": "3"}
    assert found.config_file == str(file)
    assert found.data.system is None


def test_config_files_are_checked_like_a_command_line(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"model": "a", "datset": ["b"]}))
    assert refusal(f"sft {file}").startswith(f"{file}: datset: tessera sft has no such flag; nearest: --dataset")
    file.write_text(json.dumps({"model": "a", "dataset": "b", "lora_rank": 0}))
    assert refusal(f"sft {file}") == f"{file}: lora_rank 0: expected a whole number >= 1"
    assert "no such file" in refusal("sft nowhere.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [")
    assert "not valid YAML" in refusal(f"sft {bad}")
    bad.write_text("- a")
    assert "expected a mapping" in refusal(f"sft {bad}")


def test_environment_names_itself_in_errors_and_yields_to_flags() -> None:
    assert refusal(SFT, MAX_PIXELS="big") == "MAX_PIXELS big: expected a whole number >= 1"
    found = run(f"{SFT} --max_pixels 5", MAX_PIXELS="6")
    assert found.model.max_pixels == 5
    assert "--max_pixels 5 holds, MAX_PIXELS=6 is dropped" in found.notes
    assert run(SFT, MAX_PIXELS=" ").model.max_pixels is None
    assert run(SFT, USE_HF="1").notes == ("USE_HF has no effect: ids are always looked up on the Hugging Face hub",)


def test_model_kwargs_are_the_vision_limits() -> None:
    found = run(f"""{SFT} --model_kwargs '{{"max_pixels": 9, "fps": 1}}'""")
    assert (found.model.max_pixels, found.model.fps) == (9, 1.0)
    assert "allowed are max_pixels" in refusal(f"""{SFT} --model_kwargs '{{"depth": 9}}'""")


def adapter_dir(root: Path, **stored: Any) -> Path:
    base, adapter = root / "base", root / "checkpoint-1"
    base.mkdir()
    adapter.mkdir()
    (adapter / "args.json").write_text(json.dumps({"model": str(base), "tuner_type": "lora", **stored}))
    return adapter


def test_infer_takes_over_what_the_adapter_was_trained_with(tmp_path: Path) -> None:
    adapter = adapter_dir(
        tmp_path, max_pixels=99, system="Be brief.", dataset=["a#5"], split_dataset_ratio=0.5, quant_bits=4,
        quant_method="bnb", max_length=3, seed=7, tessera_version="0",
    )  # fmt: skip
    found = run(f"infer --adapters {adapter}")
    assert found.model.model == str(tmp_path / "base")
    assert found.provenance["model"] == "args.json"
    assert found.adapt.train_type == "lora"
    assert (found.model.max_pixels, found.data.system, found.model.quant_bits) == (99, "Be brief.", 4)
    assert found.data.dataset == ()
    assert found.data.max_length is None
    assert found.notes == ()
    again = run(f"infer --adapters {adapter} --load_data_args true --system x", MAX_PIXELS="98")
    assert again.data.dataset == ("a#5",)
    assert again.data.split_dataset_ratio == 0.5
    assert again.data.system == "x"
    assert again.notes == (f"--max_pixels 98 differs from training's (99, {adapter / 'args.json'})",)


def test_load_data_args_needs_an_args_json(tmp_path: Path) -> None:
    assert refusal(f"infer --model {tmp_path} --load_data_args true") == (
        f"--load_data_args true: no args.json in {tmp_path}"
    )


def test_a_merged_model_is_not_quantised_again(tmp_path: Path) -> None:
    adapter = adapter_dir(tmp_path, quant_method="bnb", quant_bits=4, torch_dtype="bfloat16")
    found = run(f"infer --model {adapter}")
    assert found.model.model == str(adapter)
    assert found.model.quant_method is None
    assert found.model.torch_dtype == "bfloat16"


def test_training_takes_nothing_over_but_an_adapters_base(tmp_path: Path) -> None:
    adapter = adapter_dir(tmp_path, max_pixels=99)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "base")}))
    found = run(f"sft --adapters {adapter} --dataset a")
    assert found.model.model == str(tmp_path / "base")
    assert found.model.max_pixels is None
    (tmp_path / "base").rmdir()
    assert f"--adapters {adapter}: its base model {tmp_path / 'base'}: no such directory" in refusal(
        f"infer --adapters {adapter}"
    )


def test_local_paths_become_absolute_and_missing_ones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    found = run("sft --model model --dataset a")
    assert found.model.model == str(tmp_path / "model")
    assert found.save.output_dir == "output/model"
    for wrong in ("./nowhere", "/nowhere", "a/b/c"):
        assert refusal(f"sft --model {wrong} --dataset a") == f"--model {wrong}: no such directory"


def test_system_is_a_text_or_a_file(tmp_path: Path) -> None:
    assert run(f"{SFT} --system 'a\\nb'").data.system == "a\nb"
    file = tmp_path / "system.txt"
    file.write_text("from a file")
    assert run(f"{SFT} --system {file}").data.system == "from a file"
    assert refusal(f"{SFT} --system nowhere.txt") == "--system nowhere.txt: no such file"


@pytest.mark.parametrize(
    ("flags", "stage"),
    [
        ("", None),
        ("--deepspeed zero0", 0),
        ("--deepspeed zero3", 3),
        ("--fsdp fsdp2", 3),
        ("--fsdp shard_grad_op", 2),
        ("""--deepspeed '{"zero_optimization": {"stage": 1}}'""", 1),
    ],
)
def test_sharding(flags: str, stage: int | None) -> None:
    assert run(f"{SFT} {flags}").parallel.zero_stage == stage


def test_sharding_from_a_deepspeed_file(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}}))
    assert run(f"{SFT} --deepspeed {file}").parallel.zero_stage == 2
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}))
    parameters = run(f"{SFT} --deepspeed {file}")
    assert parameters.parallel.zero_stage == 3 and not parameters.memory.optimizer_cpu_offload
    assert "parameters are sharded but stay on the device" in parameters.notes[-1]
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}))
    optimizer = run(f"{SFT} --deepspeed {file}")
    assert optimizer.parallel.zero_stage == 2 and optimizer.memory.optimizer_cpu_offload


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("sft", "tessera sft: --model is required"),
        ("sft --model a", "tessera sft: --dataset is required"),
        ("sft --model a ' '", "tessera sft: --dataset is required (the command seems cut after --model)"),
        ("infer", "tessera infer: --model or --adapters is required"),
        ("report", "tessera report RUN: the directory of a run is required"),
        (f"{SFT} --deepspeed zero9", "--deepspeed zero9: allowed are zero0, zero1, zero2, zero3, zero2_offload"),
        (f"{SFT} --deepspeed zero3 --fsdp fsdp2", "--deepspeed zero3 and --fsdp fsdp2 mean the same; give one of them"),
        (f"{SFT} --train_type full --quant_method bnb", "--train_type full cannot train a quantised model"),
        (f"{SFT} --quant_bits 4", "--quant_bits 4 needs --quant_method bnb"),
        (f"{SFT} --truncation_strategy split", "--truncation_strategy split cuts documents for tessera pt"),
        (f"{SFT} --packing_length 5 --max_length 6", "--packing_length 5 cannot hold rows of --max_length 6"),
        ("export --model a --push_to_hub true", "--push_to_hub true needs --hub_model_id namespace/name"),
        ("export --model a --merge_lora true", "--merge_lora true needs --adapters DIR"),
        (
            "infer --model a --infer_backend vllm",
            "--infer_backend vllm: allowed are tessera, pt, transformers; tessera dep",
        ),
        ("megatron sft", "tessera megatron sft: --load is required"),
        ("megatron rlhf", "tessera megatron rlhf: not in this version; there are sft, pt, infer, export, run_mcore"),
        ("megatron data", "tessera megatron data: not in this version"),
        ("megatron run_mcore_gwen", "tessera megatron run_mcore_gwen: no such verb; nearest: run_mcore_qwen;"),
        ("rlhf", "tessera rlhf: not in this version"),
        ("stf", "tessera stf: no such verb; nearest: sft"),
        ("sft -model a", "tessera sft -model a: unexpected; a flag starts with two dashes"),
    ],
)
def test_refusals(line: str, sentence: str) -> None:
    assert refusal(line).startswith(sentence)


def test_several_machines_need_an_address() -> None:
    assert "NNODES=2 needs MASTER_ADDR" in refusal(SFT, NNODES="2")
    assert "NODE_RANK=2: expected less than NNODES=2" in refusal(SFT, NNODES="2", MASTER_ADDR="h", NODE_RANK="2")


def test_notes_tell_what_has_no_effect_and_what_cannot_happen() -> None:
    notes = run(f"{SFT} --dataset_num_proc 8 --eval_steps -1").notes
    assert notes == (
        "--dataset_num_proc has no effect: planning lengths needs no worker processes",
        "--eval_steps -1: nothing to evaluate on; add --split_dataset_ratio 0.01 or --val_dataset",
    )
    assert run(f"{SFT} --eval_steps 5 --split_dataset_ratio 0.1").notes == ()
    assert run(f"{SFT} --eval_steps 5 --val_dataset v").notes == ()


def test_args_json_is_flat_complete_and_holds_no_secret() -> None:
    found = resolve(
        shlex.split("export --adapters org/a --model org/b --merge_lora true --hub_token hf_secret"), {"USE_HF": "1"}
    )
    stored = found.to_json()
    assert found.export.hub_token == "hf_secret"
    assert "hf_secret" not in json.dumps(stored) + found.describe()
    assert stored["hub_token"] is None
    assert stored["tuner_type"] == stored["train_type"] == "lora"
    assert stored["env"] == {"USE_HF": "1"}
    assert stored["use_hf"] is True
    assert stored["verb"] == "export"
    assert found.save.output_dir == "org/a-merged"


def test_a_run_survives_args_json(tmp_path: Path) -> None:
    found = run(
        f"{SFT} --deepspeed zero2 --eval_steps 0.5 --report_to none --target_modules a b --dataset_num_proc 2",
        NPROC_PER_NODE="2", MAX_PIXELS="77",
    )  # fmt: skip
    (tmp_path / "args.json").write_text(json.dumps(found.to_json()))
    again = run_from_json(read_args_json(tmp_path))
    assert again.values() == found.values()
    assert again.env == found.env
    assert again.inert == found.inert
    with pytest.raises(UserError, match="is .* the directory of a run"):
        read_args_json(tmp_path / "nowhere")


def test_run_of_is_for_programs() -> None:
    found = run_of("sft", dataset=["a"], learning_rate=2e-5, target_modules=[], model=None)
    assert found.data.dataset == ("a",)
    assert found.train.learning_rate == 2e-5
    assert found.adapt.target_modules == ()
    assert found.env == {}
    with pytest.raises(UserError, match="lerning_rate: tessera sft has no such flag"):
        run_of("sft", lerning_rate=1)


def test_describe_shows_what_was_asked_for_and_where() -> None:
    text = run(f"{SFT} --lora_rank 4", MAX_PIXELS="77").describe()
    assert "model=org/name  max_pixels=77 (env)" in text
    assert "lora_rank=4" in text
    assert "learning_rate" not in text
