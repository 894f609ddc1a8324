"""Commands of Megatron-SWIFT, Pai-Megatron-Patch and Megatron-LM's multimodal examples: they parse as written.

Only the program differs: ``megatron`` is ``tessera megatron``, and a shell script is a word after it.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from tessera.config import scripts
from tessera.config.errors import UserError
from tessera.config.resolve import resolve
from tessera.config.run import Run

TWO = {"NPROC_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": "0,1", "MAX_PIXELS": "1003520"}
SHARED = (
    " --dataset 'AI-ModelScope/LaTeX_OCR:human_handwrite#5000' --sequence_parallel true --packing true"
    " --freeze_llm false --freeze_vit true --freeze_aligner true --split_dataset_ratio 0.01 --micro_batch_size 1"
    " --global_batch_size 4"
    " --recompute_granularity full --recompute_method uniform --recompute_num_layers 1 --finetune true"
    " --cross_entropy_loss_fusion true --lr_warmup_fraction 0.05 --max_epochs 1 --save_interval 200"
    " --vit_gradient_checkpointing true --max_length 2048 --no_save_optim true --no_save_rng true --dataset_num_proc 8"
)
LORA = " --train_type lora --lora_rank 8 --lora_alpha 32 --target_modules all-linear --lr 1e-4 --min_lr 1e-5"
FULL = (
    "megatron sft --load Qwen2.5-VL-7B-Instruct-mcore --tensor_model_parallel_size 2 --lr 1e-5 --min_lr 1e-6"
    f" --save megatron_output/Qwen2.5-VL-7B-Instruct --num_workers 4 {SHARED}"
)
DENSE_LORA = (
    "megatron sft --load Qwen2.5-VL-7B-Instruct-mcore --tensor_model_parallel_size 1"
    f" --save megatron_output/Qwen2.5-VL-7B-Instruct --num_workers 4 {SHARED} {LORA}"
)
MOE_LORA = (
    "megatron sft --load InternVL3_5-30B-A3B-mcore --expert_model_parallel_size 2 --moe_permute_fusion true"
    " --moe_grouped_gemm true --moe_shared_expert_overlap true --moe_aux_loss_coeff 1e-3 --eval_interval 200"
    f" --save megatron_output/InternVL3_5-30B-A3B --num_workers 8 --attention_backend flash {SHARED} {LORA}"
)
NEWER = {
    "--load": "--model",
    "--save_interval": "--save_steps",
    "--save ": "--output_dir ",
    "--eval_interval": "--eval_steps",
    "--num_workers": "--dataloader_num_workers",
    "--max_epochs": "--num_train_epochs",
    "--train_type": "--tuner_type",
}
"""Spellings of Megatron-SWIFT 3 -> those of version 4."""


def parse(line: str, root: Path, **env: str) -> Run:
    return resolve(shlex.split(line.replace("/mnt", str(root))), env)


def newer(line: str) -> str:
    for old, new in NEWER.items():
        line = line.replace(old, new)
    return line


EVERY: dict[str, Any] = {
    "dialect": "megatron",
    "per_device_train_batch_size": 1,
    "global_batch_size": 4,
    "save_only_model": True,
    "lr_warmup_fraction": 0.05,
    "num_train_epochs": 1.0,
    "recompute_granularity": "full",
    "packing": True,
    "dataloader_drop_last": True,
    "save_steps": 200,
    "eval_steps": 200,
    "max_length": 2048,
    "save_format": "hf",
}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (FULL, {"train_type": "full", "gradient_accumulation_steps": 4, "tensor_model_parallel_size": 2,
                "learning_rate": 1e-5, "min_lr": 1e-6, "max_pixels": 1003520, "dataloader_num_workers": 4}),
        (DENSE_LORA, {"train_type": "lora", "gradient_accumulation_steps": 2, "learning_rate": 1e-4}),
        (MOE_LORA, {"train_type": "lora", "gradient_accumulation_steps": 2, "expert_model_parallel_size": 2,
                    "moe_aux_loss_coeff": 1e-3, "output_dir": "megatron_output/InternVL3_5-30B-A3B"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("spelling", [str, newer], ids=["old", "new"])
@pytest.mark.parametrize("dashes", [False, True])
def test_training_with_megatron_swift(
    line: str, expected: dict[str, Any], spelling: Any, dashes: bool, tmp_path: Path
) -> None:
    words = shlex.split(spelling(line))
    if dashes:
        words = [word.replace("_", "-") if word.startswith("--") else word for word in words]
    run = resolve(words, TWO)
    values = {**run.values(), "dialect": run.dialect}
    wanted = {**EVERY, **expected}
    assert {name: values[name] for name in wanted} == wanted
    assert run.data.dataset == ("AI-ModelScope/LaTeX_OCR:human_handwrite#5000",)


def test_defaults_of_the_dialect(tmp_path: Path) -> None:
    run = parse("megatron sft --load org/name --dataset x --train_iters 5", tmp_path)
    found = (run.adapt.train_type, run.train.global_batch_size, run.memory.recompute_granularity, run.train.max_steps)
    assert found == ("full", 16, "selective", 5)
    assert run.save.output_dir == "megatron_output/name"
    assert (run.train.learning_rate, run.data.dataloader_drop_last, run.save.save_format) == (1e-5, True, "hf")
    other = parse("sft --model org/name --dataset x", tmp_path)
    assert (other.adapt.train_type, other.data.dataloader_drop_last, other.dialect) == ("lora", False, "swift")
    assert parse("megatron pt --load a --dataset b --max_epochs 2", tmp_path).data.loss_scale == "all"


@pytest.mark.parametrize(
    "more",
    [
        "--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --tp-comm-overlap",
        "--fp16 true --optimizer adam --adam_eps 1e-6 --clip_grad 0.5 --log_interval 1 --seq_length 64",
        "--num-layers 28 --hidden-size 3584 --swiglu --normalization RMSNorm --mrope-section 16 24 24",
        "--tensorboard_dir tb --wandb_project p --wandb_exp_name n --no_load_optim true --no_load_rng true",
        "--recompute-activations --ckpt-format torch --save_safetensors true --padding_free true",
    ],
)
def test_flags_of_other_scripts(more: str, tmp_path: Path) -> None:
    run = parse(f"megatron sft --load org/name --dataset x --train_iters 5 {more}", tmp_path)
    values = run.values()
    wanted: dict[str, Any] = {
        "--bf16": ("torch_dtype", "bfloat16"),
        "--fp16": ("torch_dtype", "float16"),
        "--clip_grad": ("max_grad_norm", 0.5),
        "--seq_length": ("max_length", 64),
        "--tensorboard_dir": ("tensorboard_dir", "tb"),
        "--wandb_project": ("report_to", ("tensorboard", "wandb")),
        "--recompute-activations": ("recompute_granularity", "selective"),
        "--ckpt-format": ("mcore_format", "torch"),
    }
    for flag, (name, value) in wanted.items():
        if flag in more.split():
            assert values[name] == value, flag
    assert all("no such flag" not in note for note in run.notes)


def mcore(path: Path) -> Path:
    """A directory that looks like a Megatron checkpoint."""
    (path / "iter_0000010").mkdir(parents=True)
    (path / "iter_0000010" / "metadata.json").write_text("{}")
    (path / "latest_checkpointed_iteration.txt").write_text("10")
    return path


def test_conversion_with_swift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    there = parse(
        "export --model Qwen/Qwen2.5-VL-7B-Instruct --to_mcore true --torch_dtype bfloat16"
        " --output_dir Qwen2.5-VL-7B-Instruct-mcore --test_convert_precision true",
        tmp_path,
    )
    assert there.convert.to_mcore and there.convert.test_convert_precision
    assert there.save.output_dir == "Qwen2.5-VL-7B-Instruct-mcore"
    run_dir = mcore(tmp_path / "megatron_output" / "Qwen2.5-VL-7B-Instruct" / "vx-xxx")
    tail = " --to_hf true --torch_dtype bfloat16 --output_dir megatron_output/x-hf --test_convert_precision true"
    back = parse(f"export --mcore_model megatron_output/Qwen2.5-VL-7B-Instruct/vx-xxx {tail}", tmp_path)
    assert back.convert.mcore_model == str(run_dir) and back.convert.to_hf and back.model.model is None
    (run_dir / "args.json").write_text('{"load": "base-mcore", "model": "Qwen/Qwen2.5-VL-7B-Instruct"}')
    base = mcore(tmp_path / "base-mcore")
    for flag in ("--mcore_adapters", "--mcore_adapter"):
        merged = parse(f"export {flag} megatron_output/Qwen2.5-VL-7B-Instruct/vx-xxx {tail}", tmp_path)
        assert merged.convert.mcore_adapters == (str(run_dir),)
        assert (merged.convert.mcore_model, merged.model.hf_dir) == (str(base), "Qwen/Qwen2.5-VL-7B-Instruct")
    loaded = parse(f"megatron sft --load {base} --dataset x --max_epochs 1", tmp_path)
    assert (loaded.model.model, loaded.save.save_format) == (str(base), "mcore")
    both = parse(f"megatron sft --load {base} --model org/name --dataset x --max_epochs 1", tmp_path)
    assert (both.model.model, both.model.hf_dir) == (str(base), "org/name")


PAI = (
    "megatron examples/qwen3_vl/run_mcore_qwen.sh dsw A3B 1 128 1e-5 1e-6 16384 16384 bf16 4 4 1 1 4 true true true"
    " false false 100000 /mnt/wds /mnt/wds Qwen3-VL-30B-A3B-Instruct-to-mcore 500 50 /mnt/sft_output_mcore"
)


def test_training_with_pai(tmp_path: Path) -> None:
    (tmp_path / "wds" / ".nv-meta").mkdir(parents=True)
    run = parse(PAI, tmp_path, CUDA_VISIBLE_DEVICES="")
    values, place = run.values(), run.parallel
    assert (place.tensor_model_parallel_size, place.pipeline_model_parallel_size) == (4, 4)
    assert (place.expert_model_parallel_size, place.context_parallel_size, place.nproc_per_node) == (4, 1, 16)
    wanted = {
        "global_batch_size": 128, "gradient_accumulation_steps": 128, "learning_rate": 1e-5, "min_lr": 1e-6,
        "max_length": 16384, "max_steps": 500, "warmup_steps": 50, "lr_decay_iters": 450.0, "eval_iters": 10,
        "recompute_granularity": "none", "freeze_vit": False, "train_type": "full", "save_only_model": True,
        "moe_aux_loss_coeff": 1e-3, "weight_decay": 0.01, "add_version": False, "packing": False,
        "output_dir": f"{tmp_path}/sft_output_mcore", "torch_dtype": "bfloat16", "save_steps": 100000,
        "dataset": (f"{tmp_path}/wds",), "val_dataset": (f"{tmp_path}/wds:val",),
    }  # fmt: skip
    assert {name: values[name] for name in wanted} == wanted
    assert run.notes == ()
    again = parse(PAI.replace("examples/qwen3_vl/run_mcore_qwen.sh", "pai 3"), tmp_path, CUDA_VISIBLE_DEVICES="")
    assert again == run
    shorter = parse(PAI.replace(" 1 1 4 true", " 1 true").replace("dsw A3B", "dsw 4B"), tmp_path, NPROC_PER_NODE="16")
    assert shorter.parallel.expert_model_parallel_size == 1


def test_eight_gpus_are_not_sixteen(tmp_path: Path) -> None:
    """The documents' own example asks one machine of eight GPUs for TP 4 x PP 4."""
    with pytest.raises(UserError, match="does not divide the 8 processes; set NPROC_PER_NODE"):
        parse(PAI, tmp_path, CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7")


def test_a_cluster_of_pai(tmp_path: Path) -> None:
    line = (
        "megatron examples/qwen2_5_vl/run_mcore_qwen.sh dlc 7B 1 64 1e-5 1e-6 4096 2048 bf16 2 2 1 true true true {} {}"
        " 100 /mnt/a /mnt/b org/name 500 50 /mnt/out --dry_run true"
    )
    cluster = {"WORLD_SIZE": "2", "RANK": "1", "KUBERNETES_CONTAINER_RESOURCE_GPU": "8", "MASTER_ADDR": "h"}
    run = parse(line.format("full", "0.5"), tmp_path, **cluster, MP_AC_LAYERS="2", MP_VP="7", MP_SFT_PACKING="true")
    place, memory = run.parallel, run.memory
    assert (place.nnodes, place.node_rank, place.nproc_per_node) == (2, 1, 8)
    assert place.virtual_pipeline_model_parallel_size == 2  # 28 layers, two stages, seven layers a part
    assert (memory.recompute_granularity, memory.recompute_num_layers) == ("full", 2)
    assert (memory.optimizer_cpu_offload, memory.optimizer_offload_fraction) == (True, 0.5)
    assert run.data.packing and run.dry_run
    assert any("PAD_LEN 2048 has no effect" in note for note in run.notes)
    run = parse(line.format("offload", "false"), tmp_path, **cluster, MP_PP0_LAYERS="12")
    assert (run.memory.recompute_granularity, run.memory.activation_cpu_offload) == ("none", True)
    assert run.parallel.decoder_first_pipeline_num_layers == 12
    assert parse(line.format("sel", "false"), tmp_path, **cluster).memory.recompute_granularity == "selective"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("dsw A3B", "dsw 5B"), "MODEL_SIZE 5B: allowed are 2B, 4B, 8B, 32B, A3B, A22B"),
        (("dsw", "here"), "ENV here: allowed are dsw, dlc"),
        (("bf16", "int8"), "PR int8: allowed are fp16, bf16, fp8"),
        ((" /mnt/sft_output_mcore", ""), "run_mcore_qwen takes 26 or 24 arguments and got 25: ENV MODEL_SIZE"),
        ((" 4 4 1 1 4 ", " 4 x 1 1 4 "), "PP x: expected a whole number >= 1"),
        (("Qwen3-VL-30B-A3B-Instruct-to-mcore", "none"), "PRETRAIN_CHECKPOINT_PATH none: training starts"),
        (("1 128 1e-5", "1 126 1e-5 --dry_run true"), "run_mcore_qwen takes 26 or 24 arguments and got 5"),
        (("dsw", "dlc"), "ENV dlc needs WORLD_SIZE (or NNODES)"),
    ],
)
def test_mistakes_in_positions(change: tuple[str, str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        parse(PAI.replace(*change), tmp_path)
    assert str(caught.value).startswith(sentence)


def test_converting_with_pai(tmp_path: Path) -> None:
    hf, trained = tmp_path / "hf", mcore(tmp_path / "trained")
    hf.mkdir()
    (hf / "config.json").write_text('{"text_config": {"num_hidden_layers": 48, "hidden_size": 2048}}')
    run = parse("megatron scripts/qwen3_vl/run_8xH20.sh A3B /mnt/hf /mnt/out-mcore false true bf16", tmp_path)
    assert (run.verb, run.model.model, run.model.torch_dtype) == ("export", str(hf), "bfloat16")
    assert run.convert.to_mcore and run.convert.mcore_dialect == "pai" and run.notes == ()
    run = parse("megatron scripts/qwen3_vl/run_8xH20.sh 4B /mnt/trained /mnt/out-hf true true bf16 /mnt/hf", tmp_path)
    assert run.convert.to_hf and run.convert.mcore_model == str(trained)
    assert (run.model.hf_dir, run.save.output_dir) == (str(hf), f"{tmp_path}/out-hf")
    [note] = run.notes
    assert note.startswith("MODEL_SIZE 4B is 36 layers of width 2560, and config.json in")
    with pytest.raises(UserError, match="MG2HF true needs HF_DIR"):
        parse("megatron run_8xH20 A3B /mnt/trained /mnt/x true true bf16", tmp_path)


TOWER = (
    "megatron examples/multimodal/model_converter/internvit_converter.py --output-dir OUT --use-te"
    " --tensor-parallel-size 8"
)
CONVERT = (
    "megatron tools/checkpoint/convert.py --bf16 --model-type GPT --loader llama_mistral --saver mcore"
    " --target-tensor-parallel-size 8 --checkpoint-type hf --load-dir org/lm --save-dir OUT --tokenizer-model org/lm"
    " --saver-transformer-impl transformer_engine --model-size {}"
)
STAGES = (
    "megatron examples/multimodal/nvlm/pp_checkpoint_converter.py --input {} --input-pipeline-parallel {}"
    " --output OUT --output-pipeline-parallel {} --tensor-parallel 2"
)


def by_rank(path: Path, tp: int, pp: int) -> Path:
    """A directory that looks like an older Megatron checkpoint, one file per rank."""
    for rank in range(tp):
        for stage in range(pp):
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")
            (path / "iter_0000001" / name).mkdir(parents=True)
    (path / "latest_checkpointed_iteration.txt").write_text("1")
    return path


def test_converters_of_megatron_lm(tmp_path: Path) -> None:
    run = parse(TOWER, tmp_path)
    assert (run.model.model, run.convert.target_tensor_parallel_size) == ("OpenGVLab/InternViT-6B-448px-V1-5", 8)
    assert (run.convert.mcore_format, run.convert.mcore_dialect, run.save.output_dir) == ("torch", "lm", "OUT")
    run = parse(CONVERT.format("yi-34B --make-vocab-size-divisible-by 1"), tmp_path)
    assert (run.model.model, run.model.torch_dtype) == ("org/lm", "bfloat16")
    assert (run.convert.to_mcore, run.convert.make_vocab_size_divisible_by) == (True, 1)
    assert parse(CONVERT.format("qwen2.5-72Bf"), tmp_path).convert.make_vocab_size_divisible_by is None
    lm, vision = by_rank(tmp_path / "lm", 2, 1), by_rank(tmp_path / "vision", 2, 1)
    run = parse("megatron examples/multimodal/combine_lm_vision_checkpoints.sh /mnt/lm /mnt/vision OUT nvlm", tmp_path)
    assert (run.convert.mcore_model, run.convert.mcore_vision_model) == (str(lm), str(vision))
    run = parse(STAGES.format(lm, 1, 4), tmp_path)
    assert (run.convert.target_pipeline_parallel_size, run.convert.target_tensor_parallel_size) == (4, 2)
    run = parse(STAGES.format(by_rank(tmp_path / "four", 2, 4), 4, 1), tmp_path)
    assert run.convert.target_pipeline_parallel_size == 1
    with pytest.raises(UserError, match="--input-pipeline-parallel 2: .*lm holds files of 1"):
        parse(STAGES.format(lm, 2, 4), tmp_path)
    with pytest.raises(UserError, match="--loder: convert has no such flag; nearest: --loader"):
        parse("megatron convert --loder x", tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pretrain_yi_34b_internvit_6b", {"max_steps": 60000, "lr_decay_iters": 12500.0, "freeze_llm": True,
                                          "save_steps": 2000, "max_length": 512, "learning_rate": 1e-4}),
        ("pretrain_qwen20_72b_internvit_6b", {"global_batch_size": 2048, "save_steps": 5000, "min_lr": 2.5e-5}),
        ("sft_34b_internvit", {"max_steps": 234375, "global_batch_size": 128, "freeze_llm": False,
                               "learning_rate": 2e-6, "max_length": 3200, "pipeline_model_parallel_size": 1}),
        ("sft_qwen20_72b_internvit_6b", {"global_batch_size": 256, "pipeline_model_parallel_size": 4,
                                         "lr_decay_iters": 100000.0, "save_steps": 10000}),
    ],
)  # fmt: skip
def test_recipes_of_megatron_lm(name: str, expected: dict[str, Any], tmp_path: Path) -> None:
    line = f"megatron examples/multimodal/nvlm/{name}.sh --load org/name --dataset blend.yaml --save OUT"
    run = parse(line, tmp_path, NPROC_PER_NODE="8", NNODES="4", MASTER_ADDR="h")
    values = run.values()
    wanted = {
        "tensor_model_parallel_size": 8, "max_grad_norm": 10.0, "weight_decay": 0.1, "freeze_vit": True,
        "freeze_aligner": False, "eval_iters": 10, "torch_dtype": "bfloat16", **expected,
    }  # fmt: skip
    assert {key: values[key] for key in wanted} == wanted
    assert run.train.lr_warmup_fraction == pytest.approx(83200 / 25.6e6)
    assert any("dropout of activations" in note for note in run.notes) == name.startswith("pretrain")
    small = parse(f"{line} --train_iters 2 --tensor-model-parallel-size 1 --pipeline_model_parallel_size 1"
                  " --global_batch_size 8 --freeze-LM false", tmp_path, NPROC_PER_NODE="2")  # fmt: skip
    assert (small.train.max_steps, small.train.gradient_accumulation_steps, small.adapt.freeze_llm) == (2, 4, False)
    assert not any("twice" in note for note in small.notes)


def test_text_generation_of_megatron_lm(tmp_path: Path) -> None:
    run = parse(
        "megatron examples/multimodal/nvlm/run_text_generation_yi_34b_internvit_6b.sh --input-image-path /mnt/images"
        " --output-path /mnt/out --model-path org/name --gt-path /mnt/gt.json --task TextVQA",
        tmp_path,
    )
    found = (run.verb, run.model.model, run.infer.task, run.infer.temperature, run.infer.max_new_tokens)
    assert found == ("infer", "org/name", "TextVQA", 0.0, 16)
    assert (run.infer.gt_path, run.infer.output_path) == (f"{tmp_path}/gt.json", f"{tmp_path}/out")


@pytest.mark.parametrize("name", scripts.NAMES)
def test_scripts_explain_themselves(name: str) -> None:
    text = scripts.described(["megatron", f"some/where/{name}.sh"])
    assert len(text) > 100
    assert max(map(len, text.splitlines())) <= 116
