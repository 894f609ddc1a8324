"""Pai-Megatron-Patch: training a vision-language model with one positional script, and converting its weights.

Both scripts describe the model by a size name, because Megatron has to be told the architecture. Here config.json
says it, so the size is only compared, and a note tells if it is another one's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tessera.config.parse import usage_error
from tessera.config.scripts.words import Setting, Translation, one_of, positional, shape_of, whole

SIZES: Mapping[str, Mapping[str, tuple[int, int]]] = {
    "3": {
        "2B": (28, 2048),
        "4B": (36, 2560),
        "8B": (36, 4096),
        "32B": (64, 5120),
        "A3B": (48, 2048),
        "A22B": (94, 4096),
    },
    "2_5": {"3B": (36, 2048), "7B": (28, 3584), "32B": (64, 5120), "72B": (80, 8192)},
}
"""Generation -> size name -> (layers, hidden size)."""
SPARSE = ("A3B", "A22B")
LONG = [
    "ENV",
    "MODEL_SIZE",
    "BATCH_SIZE",
    "GLOBAL_BATCH_SIZE",
    "LR",
    "MIN_LR",
    "SEQ_LEN",
    "PAD_LEN",
    "PR",
    "TP",
    "PP",
    "CP",
    "ETP",
    "EP",
    "SP",
    "DO",
    "FL",
    "AC",
    "OPTIMIZER_OFFLOAD",
    "SAVE_INTERVAL",
    "DATASET_PATH",
    "VALID_DATASET_PATH",
    "PRETRAIN_CHECKPOINT_PATH",
    "TRAIN_ITERS",
    "LR_WARMUP_ITERS",
    "OUTPUT_BASEPATH",
]
SHORT = [name for name in LONG if name not in ("ETP", "EP")]
CONVERSION = ["MODEL_SIZE", "LOAD_DIR", "SAVE_DIR", "MG2HF", "USE_CUDA", "PR", "HF_DIR"]
SWITCH = ("true", "false")
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp8": "bfloat16", "fp32": "float32"}


def train(words: Sequence[str], setting: Setting) -> Translation:
    """run_mcore_qwen.sh, also as `tessera megatron pai [3|2_5]`: 26 arguments, or 24 without ETP and EP.

    ENV                        dsw: this machine, a process per GPU (without GPUs: as many as the layout needs);
                               dlc: NNODES=$WORLD_SIZE NODE_RANK=$RANK, $KUBERNETES_CONTAINER_RESOURCE_GPU each.
                               NPROC_PER_NODE and NNODES, where set, hold
    MODEL_SIZE                 compared with config.json, a note if it is another one
    BATCH_SIZE                 --micro_batch_size
    GLOBAL_BATCH_SIZE          --global_batch_size
    LR, MIN_LR                 --lr, --min_lr
    SEQ_LEN, PAD_LEN           --max_length, nothing: rows are never padded
    PR                         bf16, fp16: --torch_dtype; fp8: bfloat16 and --fp8_format hybrid
    TP, PP, CP, ETP, EP        --tensor_model_parallel_size ... ; experts are never cut (ETP)
    SP, FL                     nothing: the sequence is always divided over tensor ranks, attention always fast
    DO                         --use_distributed_optimizer
    AC                         full: --recompute_granularity full, uniform over MP_AC_LAYERS (1) layers; sel: selective;
                               offload: --activation_cpu_offload of MP_AC_LAYERS layers; none, false: no recomputation
    OPTIMIZER_OFFLOAD          false, or the share F: --optimizer_cpu_offload true --optimizer_offload_fraction F
    SAVE_INTERVAL              --save_interval
    DATASET_PATH               --dataset
    VALID_DATASET_PATH         --val_dataset; of an Energon folder its val part
    PRETRAIN_CHECKPOINT_PATH   --load, a Megatron or Hugging Face directory
    TRAIN_ITERS                --train_iters, and --lr_decay_iters less the warm-up
    LR_WARMUP_ITERS            --lr_warmup_iters
    OUTPUT_BASEPATH            --save, without a directory per run

    Environment: MP_VP, layers of a part of a stage, is --virtual_pipeline_model_parallel_size by the number of layers;
    MP_PP0_LAYERS is --decoder_first_pipeline_num_layers; MP_SFT_PACKING is --packing.
    Fixed, as there: everything is trained, weight decay 0.01, evaluation every 1000 steps on 10 batches, the balance
    loss of sparse models 1e-3, no optimizer state in checkpoints.
    """
    return _training(words, setting)


def _training(words: Sequence[str], setting: Setting) -> Translation:
    generation, rest = _generation(words, setting.place)
    held, more = positional(rest, (LONG, SHORT), "run_mcore_qwen")
    held = {"ETP": "1", "EP": "1", **held}
    _checked(held)
    if held["PRETRAIN_CHECKPOINT_PATH"] == "none":
        raise usage_error("PRETRAIN_CHECKPOINT_PATH none: training starts from a model directory")
    notes = _size_notes(held["MODEL_SIZE"], generation, held["PRETRAIN_CHECKPOINT_PATH"])
    if held["PAD_LEN"] != held["SEQ_LEN"]:
        notes.append(
            f"PAD_LEN {held['PAD_LEN']} has no effect: rows are never padded, SEQ_LEN is the most they may have"
        )
    flags = {
        "load": held["PRETRAIN_CHECKPOINT_PATH"],
        "dataset": held["DATASET_PATH"],
        "val_dataset": _validation(held["VALID_DATASET_PATH"]),
        "save": held["OUTPUT_BASEPATH"],
        "add_version": "false",
        "torch_dtype": DTYPES[held["PR"]],
        "freeze_llm": "false",
        "freeze_vit": "false",
        "freeze_aligner": "false",
        "micro_batch_size": held["BATCH_SIZE"],
        "global_batch_size": held["GLOBAL_BATCH_SIZE"],
        "max_length": held["SEQ_LEN"],
        "packing": one_of(setting.env.get("MP_SFT_PACKING", "false"), SWITCH, "MP_SFT_PACKING"),
        "lr": held["LR"],
        "min_lr": held["MIN_LR"],
        "weight_decay": "0.01",
        "train_iters": held["TRAIN_ITERS"],
        "lr_warmup_iters": held["LR_WARMUP_ITERS"],
        "lr_decay_iters": str(whole(held["TRAIN_ITERS"], "TRAIN_ITERS") - int(held["LR_WARMUP_ITERS"])),
        "log_interval": "1",
        "eval_interval": "1000",
        "eval_iters": "10",
        "save_interval": held["SAVE_INTERVAL"],
        "no_save_optim": "true",
        **_layout(held, generation, setting),
        **_memory(held, setting.env),
        **_processes(held, setting),
    }
    return Translation(("megatron", "sft", *_words(flags), *more), tuple(notes))


def convert(words: Sequence[str], setting: Setting) -> Translation:
    """run_8xH20.sh, run_A22B_16xH20.sh, hf2mcore_convertor: six arguments, or seven.

    MODEL_SIZE   compared with config.json, a note if it is another one
    LOAD_DIR     --model, or --mcore_model if MG2HF
    SAVE_DIR     --output_dir
    MG2HF        false: --to_mcore true in the names of this project (--mcore_dialect pai); true: --to_hf true
    USE_CUDA     nothing: tensors are copied from file to file
    PR           bf16, fp16, fp32: --torch_dtype
    HF_DIR       --hf_dir, where config and tokenizer come from; required if MG2HF
    """
    held, more = positional(words, (CONVERSION[:-1], CONVERSION), "run_8xH20")
    back = one_of(held["MG2HF"], SWITCH, "MG2HF") == "true"
    one_of(held["USE_CUDA"], SWITCH, "USE_CUDA")
    dtype = DTYPES[one_of(held["PR"], ("fp32", "bf16", "fp16"), "PR")]
    source = held.get("HF_DIR") if back else held["LOAD_DIR"]
    if source is None:
        raise usage_error("MG2HF true needs HF_DIR, the seventh argument: the model's Hugging Face directory")
    notes = _size_notes(held["MODEL_SIZE"], _generation((), setting.place)[0], source)
    if back:
        flags = {"mcore_model": held["LOAD_DIR"], "to_hf": "true", "hf_dir": source}
    else:
        flags = {"model": source, "to_mcore": "true", "mcore_dialect": "pai"}
    flags |= {"torch_dtype": dtype, "output_dir": held["SAVE_DIR"]}
    return Translation(("export", *_words(flags), *more), tuple(notes))


def _words(flags: Mapping[str, str]) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


def _generation(words: Sequence[str], place: str) -> tuple[str | None, list[str]]:
    """(generation of the model, the other words): from a leading word, else from the script's directory."""
    if words and words[0] in SIZES:
        return words[0], list(words[1:])
    found = next((name for name in SIZES if f"qwen{name}_vl/" in place), None)
    return found, list(words)


def _checked(held: Mapping[str, str]) -> None:
    one_of(held["ENV"], ("dsw", "dlc"), "ENV")
    one_of(held["PR"], ("fp16", "bf16", "fp8"), "PR")
    one_of(held["AC"], ("full", "sel", "offload", "none", "false"), "AC")
    for name in ("SP", "DO", "FL"):
        one_of(held[name], SWITCH, name)
    for name in ("TP", "PP", "CP", "ETP", "EP"):
        whole(held[name], name)
    if held["LR_WARMUP_ITERS"] != "0":
        whole(held["LR_WARMUP_ITERS"], "LR_WARMUP_ITERS")


def _size_notes(size: str, generation: str | None, directory: str) -> list[str]:
    """A note if the checkpoint's config.json is of another size; UserError for a size nobody knows."""
    known = {name: shape for key in ([generation] if generation else SIZES) for name, shape in SIZES[key].items()}
    one_of(size, tuple(known), "MODEL_SIZE")
    held = shape_of(directory)
    if held is None or held in {table[size] for table in SIZES.values() if size in table}:
        return []
    layers, hidden = held
    return [
        f"MODEL_SIZE {size} is {known[size][0]} layers of width {known[size][1]}, and config.json in {directory} says "
        f"{layers} of {hidden}; config.json holds"
    ]


def _validation(path: str) -> str:
    """An Energon folder holds several parts; training reads ``train``, which is the default."""
    from pathlib import Path

    prepared = any((Path(path) / name).is_dir() for name in (".nv-meta", "wds/.nv-meta"))
    return f"{path}:val" if prepared else path


def _layout(held: Mapping[str, str], generation: str | None, setting: Setting) -> dict[str, str]:
    flags = {
        "tensor_model_parallel_size": held["TP"],
        "pipeline_model_parallel_size": held["PP"],
        "context_parallel_size": held["CP"],
        "expert_model_parallel_size": held["EP"],
        "use_distributed_optimizer": held["DO"],
    }
    if held["ETP"] != "1":
        flags["expert_tensor_parallel_size"] = held["ETP"]
    if held["MODEL_SIZE"] in SPARSE:
        flags["moe_aux_loss_coeff"] = "1e-3"
    stages = int(held["PP"])
    first, part = setting.env.get("MP_PP0_LAYERS"), setting.env.get("MP_VP")
    if first:
        if stages == 1:
            raise usage_error(f"MP_PP0_LAYERS={first} needs PP 2 or more")
        flags["decoder_first_pipeline_num_layers"] = str(whole(first, "MP_PP0_LAYERS"))
    if part:
        tables = [SIZES[generation]] if generation else [*SIZES.values()]
        known = next(table[held["MODEL_SIZE"]] for table in tables if held["MODEL_SIZE"] in table)
        layers = (shape_of(held["PRETRAIN_CHECKPOINT_PATH"]) or known)[0]
        size = whole(part, "MP_VP")
        if layers % (stages * size):
            raise usage_error(f"MP_VP={size}: {layers} layers are no whole number of PP {stages} x {size}")
        flags["virtual_pipeline_model_parallel_size"] = str(layers // (stages * size))
    return flags


def _memory(held: Mapping[str, str], env: Mapping[str, str]) -> dict[str, str]:
    layers = str(whole(env.get("MP_AC_LAYERS") or "1", "MP_AC_LAYERS"))
    flags = {
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": layers},
        "sel": {"recompute_granularity": "selective"},
        "offload": {
            "recompute_granularity": "none",
            "activation_cpu_offload": "true",
            "activation_offload_num_layers": layers,
        },
    }.get(held["AC"], {"recompute_granularity": "none"})
    if held["OPTIMIZER_OFFLOAD"] != "false":
        flags |= {"optimizer_cpu_offload": "true", "optimizer_offload_fraction": held["OPTIMIZER_OFFLOAD"]}
    if held["PR"] == "fp8":
        flags["fp8_format"] = "hybrid"
    return flags


def _processes(held: Mapping[str, str], setting: Setting) -> dict[str, str]:
    """How many processes, where the environment does not say it in our words."""
    env, flags = setting.env, {}
    if held["ENV"] == "dlc":
        theirs = {"nnodes": "WORLD_SIZE", "node_rank": "RANK", "nproc_per_node": "KUBERNETES_CONTAINER_RESOURCE_GPU"}
        for flag, variable in theirs.items():
            if flag.upper() not in env:
                if not env.get(variable):
                    raise usage_error(f"ENV dlc needs {variable} (or {flag.upper()}) in the environment")
                flags[flag] = env[variable]
    elif "NPROC_PER_NODE" not in env:
        needed = int(held["TP"]) * int(held["PP"]) * int(held["CP"])
        flags["nproc_per_node"] = str(setting.gpus or needed)
    return flags
