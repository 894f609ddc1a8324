"""Commands that people already have, from the documents of ms-swift and of Qwen: they parse as written.

Only the program's name differs. Several spellings of one flag, flags of older versions and commands that a stray
space cuts in two are all here because they are all out there.
"""

from __future__ import annotations

import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tessera.config.errors import UserError
from tessera.config.resolve import resolve
from tessera.config.run import Run

LLM = (
    "sft --model Qwen/Qwen2.5-7B-Instruct --dataset 'AI-ModelScope/alpaca-gpt4-data-zh' --train_type lora"
    " --lora_rank 8 --lora_alpha 32 --target_modules all-linear --torch_dtype bfloat16 --num_train_epochs 1"
    " --per_device_train_batch_size 1 --gradient_accumulation_steps 16 --learning_rate 1e-4 --max_length 2048"
    " --eval_steps 50 --save_steps 50 --save_total_limit 2 --logging_steps 5 --output_dir output"
    " --system 'You are a helpful assistant.' --warmup_ratio 0.05 --dataloader_num_workers 4 --attn_impl flash_attn"
)
MLLM = (
    "sft --model Qwen/Qwen2.5-VL-7B-Instruct --dataset 'AI-ModelScope/LaTeX_OCR:human_handwrite' --train_type lora"
    " --torch_dtype bfloat16 --num_train_epochs 1 --per_device_train_batch_size 1 --gradient_accumulation_steps 16"
    " --learning_rate 1e-4 --max_length 2048 --eval_steps 200 --save_steps 200 --save_total_limit 5 --logging_steps 5"
    " --output_dir output --warmup_ratio 0.05 --dataloader_num_workers 4"
)
LLM_8 = (
    "sft --model Qwen/Qwen2.5-7B-Instruct --dataset 'AI-ModelScope/alpaca-gpt4-data-zh' --train_type lora"
    " --lora_rank 8 --lora_alpha 32 --target_modules all-linear --torch_dtype bfloat16 --deepspeed zero2"
    " --per_device_train_batch_size 1 --gradient_accumulation_steps 16 --learning_rate 1e-4 --max_length 2048"
    " --num_train_epochs 1 --output_dir output --attn_impl flash_attn"
)
MLLM_8 = (
    "sft --model Qwen/Qwen2.5-VL-7B-Instruct --dataset 'AI-ModelScope/LaTeX_OCR:human_handwrite' --train_type lora"
    " --deepspeed zero2 --per_device_train_batch_size 1 --gradient_accumulation_steps 8 --learning_rate 2e-5"
    " --max_length 4096 --num_train_epochs 2 --output_dir output --attn_impl flash_attn"
)
STAGE = (
    "sft --model /path/to/new_vl_model --model_type qwen2_5_vl --train_type full --dataset xxx --torch_dtype bfloat16"
    " --attn_impl flash_attn --freeze_vit {frozen} --freeze_llm {frozen} --freeze_aligner false --num_train_epochs 3"
    " --per_device_train_batch_size 2 --learning_rate 5e-6 --gradient_accumulation_steps 8 --eval_steps -1"
    " --save_steps 1000 --save_total_limit 10 --logging_steps 5 --max_length 8192 --output_dir output"
    " --warmup_ratio 0.05 --dataloader_num_workers 4 --dataset_num_proc 8 --deepspeed zero2"
)
USE = [
    "export --adapters output/checkpoint-xxx --merge_lora true",
    "export --adapters output/checkpoint-xxx --push_to_hub true --hub_model_id 'me/name' --hub_token 'token'",
    "infer --model /path/to/stage2_checkpoint",
    "infer --model megatron_output/vx-xxx-hf --attn_impl flash_attn --stream true --load_data_args true"
    " --temperature 0 --max_new_tokens 512",
]
EIGHT = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7", "NPROC_PER_NODE": "8"}


def parse(line: str, root: Path, env: dict[str, str]) -> Run:
    words = shlex.split(line.replace("/path/to", str(root)))
    for flag, value in pairwise(words):
        if flag == "--adapters" or (flag == "--model" and "Qwen" not in value):
            (root / value).mkdir(parents=True)
            (root / value / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
            (root / value / "args.json").write_text('{"dataset": ["org/rows#5000"], "split_dataset_ratio": 0.01}')
    return resolve(words, env)


@pytest.mark.parametrize(
    ("line", "env", "expected"),
    [
        (LLM, {}, {"learning_rate": 1e-4, "eval_steps": 50, "system": "You are a helpful assistant."}),
        (MLLM, {"MAX_PIXELS": "602112"}, {"max_pixels": 602112, "save_total_limit": 5, "warmup_ratio": 0.05}),
        (LLM_8, EIGHT, {"gradient_accumulation_steps": 16, "nproc_per_node": 8}),
        (MLLM_8, {**EIGHT, "MAX_PIXELS": "602112"}, {"deepspeed": "zero2", "eval_steps": 500}),
        (STAGE.format(frozen="true"), EIGHT, {"freeze_llm": True, "freeze_aligner": False, "train_type": "full"}),
        (STAGE.format(frozen="false"), EIGHT, {"freeze_vit": False, "eval_steps": -1, "max_length": 8192}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("spelling", ["--train_type", "--tuner_type"])
def test_training(line: str, env: dict[str, str], expected: dict[str, Any], spelling: str, tmp_path: Path) -> None:
    values = parse(line.replace("--train_type", spelling), tmp_path, env).values()
    assert {name: values[name] for name in expected} == expected
    assert values["output_dir"] == "output"


@pytest.mark.parametrize("line", USE)
def test_afterwards(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = parse(line, tmp_path, {})
    assert run.data.dataset == (("org/rows#5000",) if "--load_data_args" in line else ())


def test_a_scheduler_that_counts_machines(tmp_path: Path) -> None:
    """``NNODES=$WORLD_SIZE NODE_RANK=$RANK`` under a scheduler that sets RANK and WORLD_SIZE per machine."""
    env = {**EIGHT, "NNODES": "2", "NODE_RANK": "1", "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node0"}
    line = STAGE.format(frozen="true").replace("--gradient_accumulation_steps 8", "")
    run = parse(line, tmp_path, env)
    assert (run.parallel.nnodes, run.parallel.node_rank) == (2, 1)
    assert run.train.gradient_accumulation_steps == 1


DEPLOY = (
    "deploy --model /path/to/stage2_checkpoint --infer_backend vllm --gpu_memory_utilization 0.9 --max_model_len 8192"
    ' --max_new_tokens 2048 --limit_mm_per_prompt \'{"image": 5, "video": 2}\' --served_model_name Qwen3-VL'
)
VARIABLES = {"MAX_PIXELS": "1003520", "VIDEO_MAX_PIXELS": "50176", "FPS_MAX_FRAMES": "12", "CUDA_VISIBLE_DEVICES": "0"}


@pytest.mark.parametrize("prefix", ["", "vllm_"])
def test_deploying(prefix: str, tmp_path: Path) -> None:
    line = DEPLOY
    for name in ("gpu_memory_utilization", "max_model_len", "limit_mm_per_prompt"):
        line = line.replace(f"--{name}", f"--{prefix}{name}")
    run = parse(line, tmp_path, VARIABLES)
    assert (run.deploy.infer_backend, run.deploy.served_model_name) == ("vllm", "Qwen3-VL")
    assert run.deploy.limit_mm_per_prompt == {"image": 5, "video": 2}
    assert (run.deploy.gpu_memory_utilization, run.deploy.max_model_len, run.infer.max_new_tokens) == (0.9, 8192, 2048)
    assert (run.model.max_pixels, run.model.video_max_pixels) == (1003520, 50176)


def test_what_comes_later_says_so() -> None:
    for line in ("rlhf --rlhf_type grpo", "megatron rlhf --load x"):
        with pytest.raises(UserError, match="not in this version"):
            resolve(line.split(), {})
