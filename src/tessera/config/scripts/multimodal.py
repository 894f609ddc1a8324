"""Megatron-LM's ``examples/multimodal``: converters, and the NVLM recipes of 34B and 72B as presets.

The way is: convert tower and language model, combine them, train the projector, spread over four pipeline stages, train
the language model as well, gather again, ask benchmarks. Every step between is an ``export`` from checkpoint to
checkpoint; they hold a file per rank (``--mcore_format torch``) in the names of that project (``--mcore_dialect lm``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tessera.config.parse import usage_error
from tessera.config.scripts.words import Setting, Translation, options, positional, preset, required, whole

TOWER = "OpenGVLab/InternViT-6B-448px-V1-5"
WRITES = ("--to_mcore", "true", "--mcore_format", "torch", "--mcore_dialect", "lm")
MEGATRON = ("mcore", "megatron", "legacy", "core", "llava")
LENGTHS = ("train_samples", "max_steps", "num_train_epochs")
DECAYS, WARMUPS = ("lr_decay_samples", "lr_decay_iters"), ("lr_warmup_samples", "warmup_steps", "lr_warmup_fraction")

SHARED: Mapping[str, str] = {
    "tensor_model_parallel_size": "8",
    "micro_batch_size": "1",
    "train_samples": "122880000",
    "lr_decay_samples": "25600000",
    "lr_warmup_samples": "83200",
    "lr_decay_style": "cosine",
    "clip_grad": "10.0",
    "weight_decay": "0.1",
    "adam_beta1": "0.9",
    "adam_beta2": "0.95",
    "bf16": "true",
    "log_interval": "5",
    "eval_interval": "500",
    "eval_iters": "10",
    "mcore_format": "torch",
    "mcore_dialect": "lm",
    "freeze_vit": "true",
    "freeze_aligner": "false",
}
PRETRAIN: Mapping[str, str] = {
    **SHARED,
    "freeze_llm": "true",
    "global_batch_size": "2048",
    "lr": "1e-4",
    "min_lr": "2.5e-5",
    "max_length": "512",
    "use_tiling": "false",
    "allow_missing_vision_projection_checkpoint": "true",
    "attention_dropout": "0.1",
    "hidden_dropout": "0.1",
}
SFT: Mapping[str, str] = {
    **SHARED,
    "freeze_llm": "false",
    "lr": "2e-6",
    "min_lr": "2.5e-7",
    "max_length": "3200",
    "use_tiling": "true",
    "max_num": "6",
}


def tower(words: Sequence[str], setting: Setting) -> Translation:
    """internvit_converter.py: the vision tower from Hugging Face to Megatron.

    --model-name              --model (OpenGVLab/InternViT-6B-448px-V1-5)
    --output-dir              --output_dir
    --tensor-parallel-size    --target_tensor_parallel_size; heads that it does not divide are padded, 25 to 32 for 8
    --use-te                  nothing
    """
    held, ours = options(
        words, ("model_name", "output_dir", "tensor_parallel_size", "use_te", "version"), "internvit_converter"
    )
    required(held, ("output_dir", "tensor_parallel_size"), "internvit_converter")
    flags = ["--model", held.get("model_name", TOWER), *WRITES]
    flags += ["--target_tensor_parallel_size", held["tensor_parallel_size"], "--output_dir", held["output_dir"]]
    return Translation(("export", *flags, *ours))


def language_model(words: Sequence[str], setting: Setting) -> Translation:
    """tools/checkpoint/convert.py: a language model between Hugging Face and Megatron, or for other ranks.

    --loader                               mcore, megatron, legacy, llava: --load-dir is --mcore_model; others:
                                           --model
    --saver                                mcore, megatron, legacy, llava: --to_mcore true; others: --to_hf true
    --load-dir, --save-dir                 see above; --output_dir
    --target-tensor-parallel-size, --target-pipeline-parallel-size, --target-expert-parallel-size
                                           --target_tensor_parallel_size ...
    --bf16, --fp16                         --torch_dtype
    --make-vocab-size-divisible-by         the same, times the tensor ranks
    --tokenizer-model                      --hf_dir, if the source is a Megatron checkpoint
    --model-type, --model-size, --checkpoint-type, --saver-transformer-impl, --megatron-path ...
                                           nothing: files say what they hold
    """
    sizes = ("target_tensor_parallel_size", "target_pipeline_parallel_size", "target_expert_parallel_size")
    silent = [
        "model_type",
        "checkpoint_type",
        "model_size",
        "saver_transformer_impl",
        "loader_transformer_impl",
        "megatron_path",
        "max_queue_size",
        "no_checking",
        "position_embedding_type",
        "use_te",
    ]
    known = (
        "loader",
        "saver",
        "load_dir",
        "save_dir",
        "bf16",
        "fp16",
        "tokenizer_model",
        "make_vocab_size_divisible_by",
    )
    held, ours = options(words, (*known, *sizes, *silent), "convert")
    required(held, ("loader", "saver", "load_dir", "save_dir"), "convert")
    theirs, back = held["loader"] in MEGATRON, held["saver"] not in MEGATRON
    if back and not theirs:
        raise usage_error(f"convert: --loader {held['loader']} --saver {held['saver']} converts nothing")
    flags = ["--mcore_model" if theirs else "--model", held["load_dir"]]
    flags += ["--to_hf", "true"] if back else [*WRITES]
    if held.get("bf16") == "true" or held.get("fp16") == "true":
        flags += ["--torch_dtype", "bfloat16" if held.get("bf16") == "true" else "float16"]
    for name in () if back else (*sizes, "make_vocab_size_divisible_by"):
        if name in held:
            flags += [f"--{name}", held[name]]
    if theirs and "tokenizer_model" in held:
        flags += ["--hf_dir", held["tokenizer_model"]]
    return Translation(("export", *flags, "--output_dir", held["save_dir"], *ours))


def combine(words: Sequence[str], setting: Setting) -> Translation:
    """combine_lm_vision_checkpoints.sh: a language model and a tower become one checkpoint, for the same ranks.

    LM      --mcore_model
    VISION  --mcore_vision_model
    OUT     --output_dir
    nvlm    (may be left out) nothing: how many ranks there are is seen
    """
    names = ("LM", "VISION", "OUT", "MODEL_TYPE")
    held, ours = positional(words, (names[:3], names), "combine_lm_vision_checkpoints")
    flags = ["--mcore_model", held["LM"], "--mcore_vision_model", held["VISION"], *WRITES, "--output_dir", held["OUT"]]
    return Translation(("export", *flags, *ours))


def stages(words: Sequence[str], setting: Setting) -> Translation:
    """pp_checkpoint_converter.py: a checkpoint for another number of pipeline stages.

    --input                       --mcore_model
    --output                      --output_dir
    --output-pipeline-parallel    --target_pipeline_parallel_size
    --tensor-parallel             --target_tensor_parallel_size, and compared with the input
    --input-pipeline-parallel     compared with the input
    """
    names = ("input", "input_pipeline_parallel", "output", "output_pipeline_parallel", "tensor_parallel")
    held, ours = options(words, names, "pp_checkpoint_converter")
    required(held, names, "pp_checkpoint_converter")
    found = _ranks(Path(held["input"]))
    for name, count in zip(("tensor_parallel", "input_pipeline_parallel"), found or (), strict=False):
        label = f"--{name.replace('_', '-')}"
        if whole(held[name], label) != count:
            raise usage_error(f"{label} {held[name]}: {held['input']} holds files of {count}")
    flags = ["--mcore_model", held["input"], *WRITES, "--target_tensor_parallel_size", held["tensor_parallel"]]
    flags += ["--target_pipeline_parallel_size", held["output_pipeline_parallel"], "--output_dir", held["output"]]
    return Translation(("export", *flags, *ours))


def pretrain_34b(words: Sequence[str], setting: Setting) -> Translation:
    """pretrain_yi_34b_internvit_6b.sh: the projector alone, on captions. Give --load, --dataset and --save.

    TP 8, batches of 2048, learning rate 1e-4 to 2.5e-5, 512 tokens, a checkpoint every 2000 steps. Dropout of 0.1 in
    the frozen language model is not reproduced. Any flag after the script's name overrides what it says.
    """
    return _recipe({**PRETRAIN, "save_interval": "2000"}, words, setting)


def pretrain_72b(words: Sequence[str], setting: Setting) -> Translation:
    """pretrain_qwen20_72b_internvit_6b.sh: the projector alone, on captions. Give --load, --dataset and --save.

    TP 8, batches of 2048, learning rate 1e-4 to 2.5e-5, 512 tokens, a checkpoint every 5000 steps. Dropout of 0.1 in
    the frozen language model is not reproduced. Any flag after the script's name overrides what it says.
    """
    return _recipe({**PRETRAIN, "save_interval": "5000"}, words, setting)


def sft_34b(words: Sequence[str], setting: Setting) -> Translation:
    """sft_34b_internvit.sh: projector and language model. Give --load, --dataset and --save.

    TP 8, batches of 128, learning rate 2e-6 to 2.5e-7, 3200 tokens, 30 million samples, a checkpoint every 5000 steps.
    Any flag after the script's name overrides what it says.
    """
    own = {"train_samples": "30000000", "global_batch_size": "128", "save_interval": "5000"}
    return _recipe({**SFT, **own}, words, setting)


def sft_72b(words: Sequence[str], setting: Setting) -> Translation:
    """sft_qwen20_72b_internvit_6b.sh: projector and language model. Give --load, --dataset and --save.

    TP 8, PP 4, batches of 256, learning rate 2e-6 to 2.5e-7, 3200 tokens, a checkpoint every 10000 steps. No conversion
    to four stages is needed before. Any flag after the script's name overrides what it says.
    """
    own = {"pipeline_model_parallel_size": "4", "global_batch_size": "256", "save_interval": "10000"}
    return _recipe({**SFT, **own}, words, setting)


def generation(words: Sequence[str], setting: Setting) -> Translation:
    """run_text_generation_*.sh of the 34B and 72B: a benchmark's questions, answered greedily in at most 16 tokens.

    --model-path                          --load, a Megatron or Hugging Face directory
    --task                                --task
    --input-image-path, --gt-path         --input_image_path, --gt_path
    --output-path                         --output_path
    --use-tiling                          --use_tiling true, at most 6 tiles; else false
    Flags of ours are taken as they are.
    """
    names = ("model_path", "task", "input_image_path", "gt_path", "output_path")
    held, ours = options(words, names, "run_text_generation")
    required(held, ("model_path", "task", "output_path"), "run_text_generation")
    flags = {
        "load": held["model_path"],
        "temperature": "0",
        "max_new_tokens": "16",
        "use_tiling": "false",
        "max_num": "6",
    }
    flags |= {name: held[name] for name in names[1:] if name in held}
    return Translation(("megatron", "infer", *preset(flags, ours)))


JUDGES: Mapping[str, str] = {
    "evaluate_coco": "captioning",
    "evaluate_textvqa": "TextVQA",
    "evaluate_vqav2": "VQAv2",
    "evaluate_chartqa": "ChartQA",
    "evaluate_infovqa": "InfoVQA",
    "evaluate_spdocvqa": "SPDocVQA",
    "evaluate_ai2d": "AI2D",
    "evaluate_ocrbench": "OCRBench",
    "evaluate_realworldqa": "RealworldQA",
    "evaluate_mathvista": "MathVista",
    "evaluate_mmmu": "MMMU",
}
"""Scripts that score answers, and the task whose answers they score."""


def judged(words: Sequence[str], setting: Setting) -> Translation:
    """evaluate_*.py: the score of answers that run_text_generation (or tessera infer --task) wrote.

    the script's name                     --task
    --input-path                          --input_path: a file, the beginning of its name, or its directory
    --groundtruth-path                    --gt_path (captions, MMMU), if the answers do not hold the truths
    Flags of ours are taken as they are.
    """
    name = re.sub(r"\.py$", "", setting.place.rsplit("/", 1)[-1])
    held, ours = options(words, ("input_path", "groundtruth_path"), name)
    required(held, ("input_path",), name)
    flags = {"input_path": held["input_path"], "task": JUDGES[name]}
    flags |= {"gt_path": held["groundtruth_path"]} if "groundtruth_path" in held else {}
    return Translation(("eval", *preset(flags, ours)))


def _recipe(flags: Mapping[str, str], words: Sequence[str], setting: Setting) -> Translation:
    processes = {} if "NPROC_PER_NODE" in setting.env else {"nproc_per_node": "8"}
    argv = preset({**flags, **processes}, words, (LENGTHS, DECAYS, WARMUPS))
    return Translation(("megatron", "sft", *argv))


def _ranks(directory: Path) -> tuple[int, int] | None:
    """(tensor ranks, pipeline stages) whose files ``directory`` holds; None if it holds no such files."""
    found = [re.fullmatch(r"mp_rank_(\d+)(?:_(\d+))?", place.name) for place in directory.glob("*/mp_rank_*")]
    names = [match for match in found if match]
    if not names:
        return None
    return len({match[1] for match in names}), len({match[2] for match in names})
