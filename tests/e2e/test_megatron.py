"""The dense model of Megatron-SWIFT's multimodal page, word for word, on two processes and a tiny model.

What is different: the program's name, fewer and shorter rows, and ``vx-xxx`` is the run's directory.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from tessera.models.families import family_of
from tests.e2e.command import checkpoint, losses, rows_of, run_dir, script, shell, tessera, works
from tests.e2e.test_documents import latex
from tests.models import make_model_dir
from tests.resume.job import tensors
from tests.toys import chats, make_images, write_rows

TO_MCORE = """
CUDA_VISIBLE_DEVICES=0 \\
tessera export \\
    --model Qwen/Qwen2.5-VL-7B-Instruct \\
    --to_mcore true \\
    --torch_dtype bfloat16 \\
    --output_dir Qwen2.5-VL-7B-Instruct-mcore \\
    --test_convert_precision true"""
FULL = """
PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True' \\
NPROC_PER_NODE=2 \\
MAX_PIXELS=1003520 \\
CUDA_VISIBLE_DEVICES=0,1 \\
tessera megatron sft \\
    --load Qwen2.5-VL-7B-Instruct-mcore \\
    --dataset 'AI-ModelScope/LaTeX_OCR:human_handwrite#5000' \\
    {parallel} \\
    --sequence_parallel true \\
    --packing true \\
    --freeze_llm false \\
    --freeze_vit true \\
    --freeze_aligner true \\
    --split_dataset_ratio 0.01 \\
    --micro_batch_size 1 \\
    --global_batch_size 4 \\
    --recompute_granularity full \\
    --recompute_method uniform \\
    --recompute_num_layers 1 \\
    --finetune true \\
    --cross_entropy_loss_fusion true \\
    --lr 1e-5 \\
    --lr_warmup_fraction 0.05 \\
    --min_lr 1e-6 \\
    --max_epochs 1 \\
    --save megatron_output/Qwen2.5-VL-7B-Instruct \\
    --save_interval 200 \\
    --vit_gradient_checkpointing true \\
    --max_length 2048 \\
    --num_workers 4 \\
    --no_save_optim true \\
    --no_save_rng true \\
    --dataset_num_proc 8"""
TENSOR = "--tensor_model_parallel_size 2"
LORA = "--train_type lora --lora_rank 8 --lora_alpha 32 --target_modules all-linear --tensor_model_parallel_size 1 "
TO_HF = """
CUDA_VISIBLE_DEVICES=0 \\
tessera export \\
    --{source} megatron_output/Qwen2.5-VL-7B-Instruct/vx-xxx \\
    --to_hf true \\
    --torch_dtype bfloat16 \\
    --output_dir megatron_output/Qwen2.5-VL-7B-Instruct/vx-xxx-hf \\
    --test_convert_precision true"""
INFER = """
MAX_PIXELS=1003520 \\
CUDA_VISIBLE_DEVICES=0 \\
tessera infer \\
    --model megatron_output/Qwen2.5-VL-7B-Instruct/vx-xxx-hf \\
    --attn_impl flash_attn \\
    --stream true \\
    --load_data_args true \\
    --temperature 0 \\
    --max_new_tokens 4"""
SHORT = "--train_iters 3 --max_length 128 --log_interval 1"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_model_dir(tmp_path / "Qwen" / "Qwen2.5-VL-7B-Instruct", "qwen2_5_vl", dtype=torch.bfloat16)
    latex(tmp_path / "AI-ModelScope" / "LaTeX_OCR")
    monkeypatch.chdir(tmp_path)
    done = script(TO_MCORE)
    assert done.code == 0, done.err
    assert "precision  equal within 1e-05" in done.out
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_full_on_two_tensor_ranks_then_export_and_infer(here: Path) -> None:
    output = here / "megatron_output" / "Qwen2.5-VL-7B-Instruct"
    done = shell(f"{FULL.format(parallel=TENSOR)} {SHORT}", here, OMP_NUM_THREADS="1")
    assert done.code == 0, done.err
    assert "no such flag" not in done.err and "Traceback" not in done.err
    last = checkpoint(output)
    assert last.name == "checkpoint-3" and len(losses(output)) == 3
    args = json.loads((last / "args.json").read_text())
    assert (args["tensor_model_parallel_size"], args["global_batch_size"], args["train_type"]) == (2, 4, "full")
    assert not (last / "state").exists()  # --no_save_optim
    rates = [row["learning_rate"] for row in rows_of(run_dir(output) / "logging.jsonl") if "loss" in row]
    assert rates[1] == pytest.approx(1e-5 * 1.0, rel=0.2) and rates[-1] < rates[1]
    before, after = tensors(here / "Qwen" / "Qwen2.5-VL-7B-Instruct"), tensors(last)
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved and not any("visual" in name for name in moved)

    run_dir(output).rename(output / "vx-xxx")
    assert (output / "vx-xxx" / "latest_checkpointed_iteration.txt").read_text() == "3"
    done = script(TO_HF.format(source="mcore_model"))
    assert done.code == 0, done.err
    assert "precision  equal within 1e-05" in done.out
    exported = tensors(output / "vx-xxx-hf")
    assert exported.keys() == after.keys() and all(torch.equal(exported[name], after[name]) for name in after)
    done = script(INFER)
    assert done.code == 0, done.err
    assert done.out.count("[QUERY] Using LaTeX to perform OCR on the image.") == 1  # a hundredth of 40 rows


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_lora_then_merge(here: Path) -> None:
    output = here / "megatron_output" / "Qwen2.5-VL-7B-Instruct"
    text = FULL.format(parallel=LORA).replace("NPROC_PER_NODE=2", "NPROC_PER_NODE=1")
    done = script(text, *shlex.split(SHORT), "--torch_dtype", "float32")
    assert done.code == 0, done.err
    assert (checkpoint(output) / "adapter_config.json").is_file()
    run_dir(output).rename(output / "vx-xxx")
    done = script(TO_HF.format(source="mcore_adapters"))
    assert done.code == 0, done.err
    merged = output / "vx-xxx-hf"
    before, after = tensors(here / "Qwen" / "Qwen2.5-VL-7B-Instruct"), tensors(merged)
    assert before.keys() == after.keys()
    assert all(value.dtype == torch.bfloat16 for value in after.values())
    assert (merged / "args.json").is_file()


MOE = """
PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True' \\
NPROC_PER_NODE=2 \\
CUDA_VISIBLE_DEVICES=0,1 \\
tessera megatron sft \\
    --load InternVL3_5-30B-A3B-mcore \\
    --dataset 'AI-ModelScope/LaTeX_OCR:human_handwrite#5000' \\
    --train_type lora \\
    --lora_rank 8 \\
    --lora_alpha 32 \\
    --target_modules all-linear \\
    --sequence_parallel true \\
    --freeze_llm false \\
    --freeze_vit true \\
    --freeze_aligner true \\
    --packing true \\
    --split_dataset_ratio 0.01 \\
    --expert_model_parallel_size 2 \\
    --moe_permute_fusion true \\
    --moe_grouped_gemm true \\
    --moe_shared_expert_overlap true \\
    --moe_aux_loss_coeff 1e-3 \\
    --micro_batch_size 1 \\
    --global_batch_size 4 \\
    --recompute_granularity full \\
    --recompute_method uniform \\
    --recompute_num_layers 1 \\
    --finetune true \\
    --cross_entropy_loss_fusion true \\
    --lr 1e-4 \\
    --lr_warmup_fraction 0.05 \\
    --min_lr 1e-5 \\
    --max_epochs 1 \\
    --save megatron_output/InternVL3_5-30B-A3B \\
    --eval_interval 200 \\
    --save_interval 200 \\
    --vit_gradient_checkpointing true \\
    --max_length 2048 \\
    --num_workers 8 \\
    --dataset_num_proc 8 \\
    --no_save_optim true \\
    --no_save_rng true \\
    --attention_backend flash"""


@pytest.mark.slow
@pytest.mark.parallel
@pytest.mark.timeout(600)
def test_experts_on_two_ranks_then_infer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's mixture of experts: converted, adapted with its experts on two ranks, merged, asked."""
    monkeypatch.chdir(tmp_path)
    make_model_dir("OpenGVLab/InternVL3_5-30B-A3B", "internvl", dtype=torch.bfloat16, **sparse())
    latex(tmp_path / "AI-ModelScope" / "LaTeX_OCR")

    def renamed(text: str) -> str:
        return text.replace("Qwen/Qwen2.5", "OpenGVLab/Qwen2.5").replace(
            "Qwen2.5-VL-7B-Instruct", "InternVL3_5-30B-A3B"
        )

    done = script(renamed(TO_MCORE))
    assert done.code == 0, done.err
    assert "precision  equal within 1e-05" in done.out
    output = tmp_path / "megatron_output" / "InternVL3_5-30B-A3B"
    done = shell(f"{MOE} {SHORT} --torch_dtype float32", tmp_path, OMP_NUM_THREADS="1")
    assert done.code == 0, done.err
    assert "no such flag" not in done.err and "Traceback" not in done.err
    assert (checkpoint(output) / "adapter_config.json").is_file() and len(losses(output)) == 3
    run_dir(output).rename(output / "vx-xxx")
    done = script(renamed(TO_HF.format(source="mcore_adapters")))
    assert done.code == 0, done.err
    before, after = tensors(tmp_path / "OpenGVLab" / "InternVL3_5-30B-A3B"), tensors(output / "vx-xxx-hf")
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert before.keys() == after.keys() and any("experts" in name for name in moved)
    done = script(renamed(INFER))
    assert done.code == 0, done.err
    assert done.out.count("[QUERY] Using LaTeX to perform OCR on the image.") == 1


def sparse() -> dict[str, Any]:
    """What makes the decoder of a toy InternVL a mixture of experts."""
    text = family_of({"model_type": "qwen3_moe"}).tiny()
    return {key: value for key, value in text.items() if key not in ("architectures", "vocab_size", "dtype")}


def test_a_script_is_printed_as_the_command_it_is(tmp_path: Path) -> None:
    model = make_model_dir(tmp_path / "model", "qwen3_vl_moe")
    data = write_rows(tmp_path / "rows.jsonl", chats(8, make_images(tmp_path / "images", [(64, 48)])))
    words = f"dsw A3B 1 8 1e-5 1e-6 256 256 bf16 2 1 1 1 2 true true true false false 100 {data} {data} {model} 4 1"
    done = works(
        "megatron", "examples/qwen3_vl/run_mcore_qwen.sh", *words.split(), tmp_path / "out", "--dry_run", "true",
        CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    first, *_ = done.out.splitlines()
    assert first.startswith(f"runs: tessera megatron sft --load {model} --dataset {data}")
    assert "note: MODEL_SIZE A3B is 48 layers of width 2048, and config.json in" in done.err
    assert "tp2" in done.out and not (tmp_path / "out").exists()
    again = works(*shlex.split(first.removeprefix("runs: tessera ")), CUDA_VISIBLE_DEVICES="")
    assert again.out == done.out.split("\n", 1)[1]


def test_help(tmp_path: Path) -> None:
    assert "MODEL_SIZE" in works("megatron", "run_mcore_qwen.sh", "--help").out
    assert "tessera megatron sft" in works("megatron", "sft", "--help").out
    assert "run_8xH20" in works("megatron", "--help").out
    assert tessera("megatron").code == 2


def test_a_checkpoint_without_its_config_says_so(tmp_path: Path) -> None:
    model = make_model_dir(tmp_path / "model", "qwen2")
    mcore = tmp_path / "mcore"
    works("export", "--model", model, "--to_mcore", "true", "--output_dir", mcore, "--torch_dtype", "float32")
    (mcore / "config.json").unlink()
    data = write_rows(tmp_path / "rows.jsonl", chats(4))
    words = ("--load", mcore, "--dataset", data, "--train_iters", "1", "--save", tmp_path / "out")
    done = tessera("megatron", "sft", *words)
    assert done.code != 0 and "a Megatron checkpoint without config.json; add --hf_dir DIR" in done.error
    assert not (tmp_path / "out").exists()
    again = tessera(
        "megatron", "sft", *words, "--hf_dir", model, "--global_batch_size", "2", "--torch_dtype", "float32"
    )
    assert again.code == 0, again.err
    assert (run_dir(tmp_path / "out") / "iter_0000001" / "metadata.json").is_file()


@pytest.mark.slow
@pytest.mark.parallel
@pytest.mark.timeout(900)
def test_sixteen_ranks_of_pai(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pai's page at toy size: data and weights converted, TP 4 x PP 4 with EP 4, and back; MODEL_SIZE as written."""
    monkeypatch.chdir(tmp_path)
    make_model_dir("Qwen3-VL-30B-A3B-Instruct", "qwen3_vl_moe", num_hidden_layers=8, num_key_value_heads=4)
    images = make_images("LLaVA-Pretrain", [(64, 48), (90, 60)] * 12)
    llava = [
        {"id": f"{at:05d}", "image": Path(image).name, "conversations": [
            {"from": "human", "value": "Describe it.\n<image>"}, {"from": "gpt", "value": f"picture {at}"}]}
        for at, image in enumerate(images)
    ]  # fmt: skip
    Path("LLaVA-Pretrain/blip_laion_cc_sbu_558k.json").write_text(json.dumps(llava))
    works("data", "convert", "llava", "LLaVA-Pretrain", "--max_samples_per_tar", "8")
    fields = '{"image":"jpg","context":"json[0][value]","answers":"json[1][value]"}'
    works(
        "data", "prepare", "LLaVA-Pretrain/wds", "--split", "9,1,0", "--sample_type", "VQASample", "--field_map", fields
    )
    source, mcore = "Qwen3-VL-30B-A3B-Instruct", "Qwen3-VL-30B-A3B-Instruct-to-mcore"
    run_8 = ("megatron", "scripts/qwen3_vl/run_8xH20.sh")
    works(*run_8, "A3B", source, mcore, "false", "true", "fp32")
    assert Path(mcore, "release", "metadata.json").is_file()
    out, wds = "sft_output_mcore_Qwen3-VL-30B-A3B", "LLaVA-Pretrain/wds"
    words = (
        f"dsw A3B 1 8 1e-5 1e-6 256 256 bf16 4 4 1 1 4 true true true false false 100000 {wds} {wds} {mcore} 3 1 {out}"
    )
    text = f"tessera megatron examples/qwen3_vl/run_mcore_qwen.sh {words}"
    done = shell(text, tmp_path, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    assert done.code == 0, done.err[-3000:]
    assert "--nproc_per_node 16" in done.out
    assert {"iter_0000003", "checkpoint-3", "images", "logging.jsonl"} <= {path.name for path in Path(out).iterdir()}
    assert len([row for row in rows_of(Path(out, "logging.jsonl")) if "loss" in row]) == 3
    assert Path(out, "images", "train_loss.png").is_file()
    works(*run_8, "4B", out, "sft_output_hf", "true", "true", "fp32", source)
    before, after = tensors(Path(source)), tensors(Path("sft_output_hf"))
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    for model in (source, "sft_output_hf"):
        words = ("--dataset", "LLaVA-Pretrain/wds:val", "--max_new_tokens", "4", "--temperature", "0")
        assert "[RESPONSE]" in works("infer", "--model", model, *words).out
