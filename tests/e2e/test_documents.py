"""Commands of other people's documents, word for word but for the program's name and what keeps them short.

The ids are directories relative to where the commands run: tiny models and a few rows lie where the documents name
``Qwen/...`` and ``AI-ModelScope/...``. Appended is ``--max_steps``; eight processes become two.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.e2e.command import checkpoint, losses, rows_of, run_dir, script, shell, works
from tests.models import make_model_dir
from tests.resume.job import tensors
from tests.stubhub import TOKEN, running
from tests.toys import chats, make_images, write_rows

LLM = """
    # 19GB
    CUDA_VISIBLE_DEVICES=0 \\
    tessera sft \\
       --model Qwen/Qwen2.5-7B-Instruct \\
       --dataset 'AI-ModelScope/alpaca-gpt4-data-zh' \\
       --train_type lora \\
       --lora_rank 8 \\
       --lora_alpha 32 \\
       --target_modules all-linear \\
       --torch_dtype bfloat16 \\
       --num_train_epochs 1 \\
       --per_device_train_batch_size 1 \\
       --gradient_accumulation_steps 16 \\
       --learning_rate 1e-4 \\
       --max_length 2048 \\
       --eval_steps 50 \\
       --save_steps 50 \\
       --save_total_limit 2 \\
       --logging_steps 5 \\
       --output_dir output \\
       --system 'You are a helpful assistant.' \\
       --warmup_ratio 0.05 \\
       --dataloader_num_workers 4 \\
        --attn_impl flash_attn"""
MLLM = """
   # 18GB
    CUDA_VISIBLE_DEVICES=0 \\
    MAX_PIXELS=602112 \\
    tessera sft \\
       --model Qwen/Qwen2.5-VL-7B-Instruct \\
       --dataset 'AI-ModelScope/LaTeX_OCR:human_handwrite' \\
       --train_type lora \\
       --torch_dtype bfloat16 \\
       --num_train_epochs 1 \\
       --per_device_train_batch_size 1 \\
       --gradient_accumulation_steps 16 \\
       --learning_rate 1e-4 \\
       --max_length 2048 \\
       --eval_steps 200 \\
       --save_steps 200 \\
       --save_total_limit 5 \\
       --logging_steps 5 \\
       --output_dir output \\
       --warmup_ratio 0.05 \\
       --dataloader_num_workers 4"""
LLM_8 = """
    # 18G*8
    CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 \\
    NPROC_PER_NODE=8 \\
    nohup tessera sft \\
        --model Qwen/Qwen2.5-7B-Instruct \\
        --dataset 'AI-ModelScope/alpaca-gpt4-data-zh' \\
        --train_type lora \\
        --lora_rank 8 \\
        --lora_alpha 32 \\
        --target_modules all-linear \\
        --torch_dtype bfloat16 \\
        --deepspeed zero2 \\
        --per_device_train_batch_size 1 \\
        --gradient_accumulation_steps 16 \\
        --learning_rate 1e-4 \\
        --max_length 2048 \\
        --num_train_epochs 1 \\
        --output_dir output \\
        --attn_impl flash_attn"""
MLLM_8 = """
    # 17G*8
    CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 \\
    NPROC_PER_NODE=8 \\
    MAX_PIXELS=602112 \\
    nohup tessera sft \\
       --model Qwen/Qwen2.5-VL-7B-Instruct \\
       --dataset 'AI-ModelScope/LaTeX_OCR:human_handwrite' \\
       --train_type lora \\
       --deepspeed zero2 \\
       --per_device_train_batch_size 1 \\
       --gradient_accumulation_steps 8 \\
       --learning_rate 2e-5 \\
       --max_length 4096 \\
       --num_train_epochs 2 \\
       --output_dir output \\
        --attn_impl flash_attn"""
STAGE = """
NNODES=$WORLD_SIZE \\
NODE_RANK=$RANK \\
NPROC_PER_NODE=8 \\
MAX_PIXELS=1003520 \\
CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 \\
tessera sft \\
    --model /path/to/{model} \\
    --model_type qwen2_5_vl \\
    --train_type full \\
    --dataset xxx \\
    --torch_dtype bfloat16 \\
    --attn_impl flash_attn \\
    --freeze_vit {freeze} \\
    --freeze_llm {freeze} \\
    --freeze_aligner false \\
    --num_train_epochs 3 \\
    --per_device_train_batch_size 2 \\
    --learning_rate 5e-6 \\
    --gradient_accumulation_steps 8 \\
    --eval_steps -1 \\
    --save_steps 1000 \\
    --save_total_limit 10 \\
    --logging_steps 5 \\
    --max_length 8192 \\
    --output_dir output \\
    --warmup_ratio 0.05 \\
    --dataloader_num_workers 4 \\
    --dataset_num_proc 8 \\
    --deepspeed zero2"""
INFER = """
tessera infer \\
    --model /path/to/stage2_checkpoint
"""
INFER_VALIDATION = """
MAX_PIXELS=1003520 \\
CUDA_VISIBLE_DEVICES=0 \\
tessera infer \\
    --model megatron_output/Qwen2.5-VL-7B-Instruct/vx-xxx-hf \\
    --attn_impl flash_attn \\
    --stream true \\
    --load_data_args true \\
    --temperature 0 \\
    --max_new_tokens 512"""
MERGE = """
    tessera export \\
       --adapters output/checkpoint-xxx \\
       --merge_lora true"""
PUSH = """
    tessera export \\
       --adapters output/checkpoint-xxx \\
       --push_to_hub true \\
       --hub_model_id '<your-namespace>/<model-name>' \\
       --hub_token '<your-access-token>'"""
SHORT = ("--max_steps", "1", "--report_to", "none")
QUESTION = "Using LaTeX to perform OCR on the image."


def latex(folder: Path) -> None:
    """A clone of the OCR dataset: one directory per subset, parquet files with an ``image`` and a ``text``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    subset = folder / "human_handwrite"
    subset.mkdir(parents=True)
    for split, count in (("train", 30), ("validation", 6), ("test", 4)):
        images = []
        for index in range(count):
            file = io.BytesIO()
            Image.new("RGB", (90 + index, 40), (index * 8, 120, 40)).save(file, "PNG")
            images.append({"bytes": file.getvalue(), "path": f"{index}.png"})
        table = pa.table({"image": images, "text": [f"\\int x ^ {{ {index} }} d x" for index in range(count)]})
        pq.write_table(table, subset / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run: models and datasets under the names that the documents use."""
    root = tmp_path_factory.mktemp("documents")
    make_model_dir(root / "Qwen" / "Qwen2.5-7B-Instruct", "qwen2")
    make_model_dir(root / "Qwen" / "Qwen2.5-VL-7B-Instruct", "qwen2_5_vl", dtype=torch.bfloat16)
    shutil.copytree(root / "Qwen" / "Qwen2.5-VL-7B-Instruct", root / "new_vl_model")
    latex(root / "AI-ModelScope" / "LaTeX_OCR")
    alpaca = [{"instruction": f"Add {n} and 1.", "input": "", "output": str(n + 1)} for n in range(40)]
    write_rows(root / "AI-ModelScope" / "alpaca-gpt4-data-zh" / "train.jsonl", alpaca)
    write_rows(root / "xxx" / "rows.jsonl", chats(40, make_images(root / "images", [(64, 48), (100, 60)])))
    return root


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory in which the names of :func:`place` exist."""
    for entry in place.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def args_of(run: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / "args.json").read_text())
    return values


def test_llm(here: Path) -> None:
    done = script(LLM, *SHORT)
    assert done.code == 0, done.err
    assert "--attn_impl has no effect" in done.err and "nothing to evaluate on" in done.err
    last = checkpoint(here / "output")
    assert {"adapter_config.json", "adapter_model.safetensors", "args.json"} <= {path.name for path in last.iterdir()}
    assert all(".self_attn." in name or ".mlp." in name for name in tensors(last))
    assert "You are a helpful assistant." in done.out  # [INPUT]


def test_mllm_train_infer_merge_and_push(here: Path) -> None:
    done = script(MLLM, "--split_dataset_ratio", "0.1", *SHORT)
    assert done.code == 0, done.err
    assert QUESTION in done.out  # the question that a bare image and text is asked
    last = checkpoint(here / "output")
    assert args_of(run_dir(here / "output"))["max_pixels"] == 602112

    shutil.copytree(last, here / "output" / "checkpoint-xxx")
    done = script(MERGE)
    assert done.code == 0, done.err
    merged = here / "output" / "checkpoint-xxx-merged"
    processor = json.loads((merged / "preprocessor_config.json").read_text())
    assert processor["size"]["longest_edge"] // 28**2 == 602112 // 28**2

    target = here / "megatron_output" / "Qwen2.5-VL-7B-Instruct" / "vx-xxx-hf"
    shutil.copytree(merged, target)
    done = script(INFER_VALIDATION.replace("512", "4"))
    assert done.code == 0, done.err
    assert done.out.count(f"[QUERY] {QUESTION}\n[LABELS] \\int x") == 4
    assert "MAX_PIXELS" in done.err or "--max_pixels 1003520 differs" in done.err
    [results] = (target / "infer_result").glob("*.jsonl")
    assert len(rows_of(results)) == 4

    with running() as hub:
        text = PUSH.replace("<your-namespace>/<model-name>", "me/ocr").replace("<your-access-token>", TOKEN)
        done = shell(text, here, HF_ENDPOINT=hub.url)
        assert done.code == 0, done.err
        assert {"adapter_model.safetensors", "adapter_config.json", "args.json"} <= set(hub.files)
        assert not any(name.startswith("state") for name in hub.files)
        assert TOKEN not in done.out + done.err
        assert TOKEN.encode() not in b"".join(hub.files.values())


def test_a_subset_and_a_number_of_rows(here: Path) -> None:
    """``id:subset#N`` of document 000: 5000 of 40 rows repeat them, and validation rows are taken out first."""
    spec = "AI-ModelScope/LaTeX_OCR:human_handwrite#5000"
    done = works(
        *("sft", "--model", "Qwen/Qwen2.5-VL-7B-Instruct", "--dataset", spec, "--split_dataset_ratio", "0.1"),
        *("--packing", "true", "--max_length", "256", "--dry_run", "true"),
    )
    assert "4,996" in done.out or "4996" in done.out
    assert not (here / "output").exists()


@pytest.mark.parametrize("text", [LLM_8, MLLM_8], ids=["llm", "mllm"])
def test_eight_processes_are_two_here(here: Path, text: str) -> None:
    text = text.replace("NPROC_PER_NODE=8", "NPROC_PER_NODE=2")
    done = shell(f"{text} {' '.join(SHORT)}", here)
    assert done.code == 0, done.err
    last = checkpoint(here / "output")
    values = args_of(last)
    assert (values["nproc_per_node"], values["deepspeed"]) == (2, "zero2")
    assert {path.name for path in (last / "state").iterdir()} >= {"rng-0.pt", "rng-1.pt"}
    assert all(torch.isfinite(value).all() for value in tensors(last).values())
    assert len(losses(here / "output")) == 1


def test_two_stages(here: Path) -> None:
    """Document 003: the aligner alone, then everything, from the checkpoint of the first stage; then a conversation."""
    first = STAGE.format(model="new_vl_model", freeze="true").replace("/path/to", str(here))
    first = first.replace("NPROC_PER_NODE=8", "NPROC_PER_NODE=2")
    done = shell(f"{first} {' '.join(SHORT)}", here, WORLD_SIZE="1", RANK="0")
    assert done.code == 0, done.err
    aligner = checkpoint(here / "output")
    before, after = tensors(here / "new_vl_model"), tensors(aligner)
    assert before.keys() == after.keys()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert all("merger" in name for name in moved)

    (here / "stage1_checkpoint").symlink_to(aligner)
    second = STAGE.format(model="stage1_checkpoint", freeze="false").replace("/path/to", str(here))
    second = second.replace("output_dir output", "output_dir output2").replace("NPROC_PER_NODE=8", "NPROC_PER_NODE=1")
    text = second.replace("$WORLD_SIZE", "1").replace("$RANK", "0")
    done = script(text, *SHORT)
    assert done.code == 0, done.err
    last = checkpoint(here / "output2")
    assert {path.name for path in (here / "new_vl_model").iterdir()} <= {path.name for path in last.iterdir()}

    (here / "stage2_checkpoint").symlink_to(last)
    limit = f"{INFER.strip().replace('/path/to', os.fspath(here))} --max_new_tokens 4"
    done = shell(f"printf 'What is written here?\\nexit\\n' | {limit}", here)
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
