"""The one table of flags.

Every flag that a command line, a YAML file or an ``args.json`` may hold is one row here: its name, older spellings of
the same thing (``aliases``), the room of the :class:`~tessera.config.run.Run` it belongs to, how its text is read
(``kind``), its default, the values it allows, the environment variable that may also set it, and one line of help.
Parsing, ``--help``, ``docs/flags.md``, ``args.json`` and the typed rooms are all derived from these rows, so a flag is
added by adding a row here and the field of the same name in ``run.py``.

``default`` holds for every verb; ``defaults`` lists the exceptions by verb. A second dialect of names and defaults for
the same concepts is further entries of ``aliases`` and ``defaults``, never a second table.

A row with ``inert`` is a flag of other tools that needs no counterpart here. It is accepted so that their commands run
as written, and the sentence says once, on the console, why it does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["str", "int", "float", "bool", "list", "json", "steps", "size"]
"""How text becomes a value. ``steps`` is a count, a share of the run below 1, or -1 (only at the end); ``size`` is a
number of bytes such as ``5GB``; ``json`` is a JSON object or the path of a file that holds one."""

TRAIN, USE = ("pt", "sft"), ("infer", "export")
VERBS: Mapping[str, str] = {
    "pt": "continue pre-training a model: loss on every token",
    "sft": "fine-tune a model on conversations, with or without images",
    "infer": "run a model or adapter over a dataset, or talk to it",
    "export": "merge an adapter, change the dtype, push to a hub",
    "compose": "make a new model from the tower of one and the language model of another",
    "data": "show what a dataset becomes: tokens, labels, lengths, skipped rows",
    "report": "tessera report RUN: one self-contained HTML page about a run",
    "demo": "tessera demo [DIR]: compose, train, export and score a small model on handwriting",
}
ROOMS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "model": ("which model, at which resolution", (*TRAIN, *USE, "data")),
    "data": ("which rows, and how they become batches", (*TRAIN, "infer", "data")),
    "adapt": ("what is trainable", TRAIN),
    "train": ("in what order, how fast", TRAIN),
    "memory": ("what stays on the device", TRAIN),
    "save": ("what is kept", TRAIN),
    "log": ("what is shown", TRAIN),
    "parallel": ("on how many processes", TRAIN),
    "infer": ("how answers are generated", ("infer",)),
    "export": ("what leaves the house", ("export",)),
    "compose": ("what a new model is made of", ("compose",)),
    "run": ("the command itself", tuple(VERBS)),
    "inert": ("accepted from other tools, without effect", (*TRAIN, *USE, "data")),
}


@dataclass(frozen=True, slots=True)
class Flag:
    """One row of the table; see the module docstring.

    ``low`` and ``high`` are inclusive bounds of a number. ``verbs`` overrides the verbs of the flag's room.
    ``carry`` says when infer and export take the flag from an ``args.json`` unless it is given: ``always``, from that
    of an ``adapter`` only, the ``data`` they were made with under ``--load_data_args true``, or ``never``.
    """

    name: str
    room: str
    kind: Kind
    default: Any = None
    help: str = ""
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    env: str = ""
    carry: Literal["never", "always", "adapter", "data"] = "never"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    verbs: tuple[str, ...] = ()
    inert: str = ""

    def default_for(self, verb: str) -> Any:
        """The flag's default under ``verb``."""
        return self.defaults.get(verb, self.default)

    def belongs_to(self, verb: str) -> bool:
        """Whether ``verb`` takes this flag."""
        return verb in (self.verbs or ROOMS[self.room][1])


F = Flag

MODEL = (
    F("model", "model", "str", None, "directory or hub id of the model", carry="adapter"),
    F("adapters", "model", "list", (), "adapters; infer and export find the base model in their args.json"),
    F("torch_dtype", "model", "str", None, "dtype of the weights; config.json's if not given", carry="always",
      choices=("bfloat16", "float16", "float32"), verbs=(*TRAIN, *USE, "data", "compose")),
    F("max_pixels", "model", "int", None, "most pixels of an image after resizing", env="MAX_PIXELS", low=1,
      carry="always"),
    F("min_pixels", "model", "int", None, "fewest pixels of an image after resizing", env="MIN_PIXELS", low=1,
      carry="always"),
    F("video_max_pixels", "model", "int", None, "most pixels of a video frame after resizing", low=1,
      env="VIDEO_MAX_PIXELS", carry="always"),
    F("fps", "model", "float", None, "frames per second of a video given as frames", env="FPS", low=0,
      carry="always"),
    F("model_kwargs", "model", "json", None, "the limits above as one JSON object"),
    F("quant_method", "model", "str", None, "quantise the frozen base model (QLoRA)", carry="adapter",
      choices=("bnb",)),
    F("quant_bits", "model", "int", None, "bits of the quantised base model; 4 is NF4, 8 LLM.int8", carry="adapter",
      choices=("4", "8")),
)  # fmt: skip

DATA = (
    F("dataset", "data", "list", (), "files, directories or ids, each as path[:subset][#N]", carry="data"),
    F("val_dataset", "data", "list", (), "validation data, same syntax", carry="data"),
    F("split_dataset_ratio", "data", "float", 0.0, "share of --dataset set aside for validation", low=0, high=1,
      carry="data"),
    F("data_seed", "data", "int", None, "seed of sampling, splitting and order; --seed if not given", carry="data"),
    F("dataset_shuffle", "data", "bool", True, "sample and split in random order", carry="data"),
    F("train_dataloader_shuffle", "data", "bool", True, "shuffle the training rows in every epoch"),
    F("val_dataset_shuffle", "data", "bool", False, "shuffle the validation rows", carry="data"),
    F("max_length", "data", "int", None, "most tokens of a row; the model's maximum if not given", low=1),
    F("truncation_strategy", "data", "str", "delete", "what happens to longer rows", carry="always",
      choices=("delete", "left", "right", "split")),
    F("packing", "data", "bool", False, "pack whole rows into units of --packing_length tokens"),
    F("packing_length", "data", "int", None, "tokens of a pack; --max_length if not given", low=1),
    F("system", "data", "str", None, "system prompt, or a .txt file that holds it", carry="always"),
    F("loss_scale", "data", "str", "default", "which turns count: assistant turns, the last of them, or every token",
      choices=("default", "last_round", "all"), defaults={"pt": "all"}),
    F("columns", "data", "json", None, "column names of the dataset mapped to ours, e.g. '{\"question\": \"query\"}'",
      carry="data"),
    F("strict", "data", "bool", False, "stop at the first bad row instead of skipping it", carry="data"),
    F("max_skip_ratio", "data", "float", 0.1, "stop when more than this share of the rows is bad", low=0, high=1,
      carry="data"),
    F("image_resize", "data", "str", "torch", "whose resize to equal: torchvision's processor or the PIL one",
      choices=("torch", "pil"), carry="always"),
    F("root_image_dir", "data", "str", None, "where relative image paths start", env="ROOT_IMAGE_DIR", carry="data"),
    F("dataloader_num_workers", "data", "int", None, "threads that decode images; chosen by the machine if not given",
      low=0),
    F("load_data_args", "data", "bool", False, "take dataset and split from the args.json of the model or adapter",
      verbs=USE),
)  # fmt: skip

ADAPT = (
    F("train_type", "adapt", "str", "lora", "train an adapter or the weights themselves", aliases=("tuner_type",),
      choices=("lora", "full"), carry="adapter"),
    F("freeze_llm", "adapt", "bool", False, "keep the language model as it is"),
    F("freeze_vit", "adapt", "bool", True, "keep the vision tower as it is"),
    F("freeze_aligner", "adapt", "bool", True, "keep the projector between the two as it is"),
    F("freeze_parameters", "adapt", "list", (), "name prefixes to freeze (full)"),
    F("trainable_parameters", "adapt", "list", (), "name prefixes to train after all (full)"),
    F("lora_rank", "adapt", "int", 8, "rank of the update", low=1),
    F("lora_alpha", "adapt", "int", 32, "scale of the update: alpha / rank", low=0),
    F("lora_dropout", "adapt", "float", 0.05, "dropout before the update", low=0, high=1),
    F("lora_bias", "adapt", "str", "none", "which biases are trained", choices=("none", "all")),
    F("target_modules", "adapt", "list", ("all-linear",),
      "modules that get an adapter; all-linear is every linear layer of the parts that are not frozen, "
      "all-router the routers"),
    F("target_regex", "adapt", "str", None, "one regular expression instead of --target_modules"),
    F("modules_to_save", "adapt", "list", (), "modules trained and saved whole beside the adapter"),
    F("use_dora", "adapt", "bool", False, "DoRA: learn magnitude and direction apart"),
    F("use_rslora", "adapt", "bool", False, "rsLoRA: scale by alpha / sqrt(rank)"),
    F("lorap_lr_ratio", "adapt", "float", None, "LoRA+: learning rate of B over that of A", low=0),
)  # fmt: skip

TRAINING = (
    F("num_train_epochs", "train", "float", 3.0, "passes over the data", low=0),
    F("max_steps", "train", "int", -1, "optimiser steps; overrides the epochs unless -1", low=-1,
      verbs=(*TRAIN, "demo")),
    F("per_device_train_batch_size", "train", "int", 1, "rows (packs) of a microbatch on one process", low=1),
    F("per_device_eval_batch_size", "train", "int", 1, "the same while evaluating", low=1, verbs=(*TRAIN, "infer")),
    F("gradient_accumulation_steps", "train", "int", None, "microbatches of a step; fills 16 rows if not given",
      low=1),
    F("learning_rate", "train", "float", None, "peak learning rate; 1e-4 for lora, 1e-5 for full if not given", low=0),
    F("vit_lr", "train", "float", None, "learning rate of the vision tower", low=0),
    F("aligner_lr", "train", "float", None, "learning rate of the projector", low=0),
    F("optim", "train", "str", "adamw_torch_fused", "optimiser",
      choices=("adamw_torch_fused", "adamw_torch", "muon")),
    F("weight_decay", "train", "float", 0.1, "decay of matrices; vectors are never decayed", low=0),
    F("adam_beta1", "train", "float", 0.9, "decay of the first moment", low=0, high=1),
    F("adam_beta2", "train", "float", 0.95, "decay of the second moment", low=0, high=1),
    F("adam_epsilon", "train", "float", 1e-8, "added to the root of the second moment", low=0),
    F("max_grad_norm", "train", "float", 1.0, "clip the global gradient norm; 0 never", low=0),
    F("lr_scheduler_type", "train", "str", "cosine", "shape of the schedule after warm-up",
      choices=("cosine", "linear", "constant", "constant_with_warmup", "warmup_stable_decay")),
    F("warmup_ratio", "train", "float", 0.0, "share of the run that warms up", low=0, high=1),
    F("warmup_steps", "train", "int", 0, "steps that warm up; overrides --warmup_ratio", low=0),
    F("min_lr", "train", "float", 0.0, "where the schedule ends", low=0),
    F("wsd_decay_ratio", "train", "float", 0.1, "warmup_stable_decay: share of the run that decays", low=0, high=1),
    F("seed", "train", "int", 42, "seed of everything random", low=0,
      verbs=(*TRAIN, "infer", "data", "demo", "compose")),
    F("gradient_checkpointing", "train", "bool", True, "true is --recompute_granularity full, false none"),
    F("vit_gradient_checkpointing", "train", "bool", None,
      "recompute every block of the tower; as the decoder if not given"),
    F("moe_aux_loss_coeff", "train", "float", 0.0, "weight of the loss that keeps experts equally busy", low=0,
      aliases=("router_aux_loss_coef",)),
    F("moe_shared_expert_overlap", "train", "bool", False, "run shared experts beside the exchange of tokens (GPU)"),
    F("loss_chunk_size", "train", "int", 1024, "rows of logits held at once", low=1),
    F("max_bad_steps", "train", "int", 5, "stop after this many non-finite steps in a row", low=1),
    F("eval_strategy", "train", "str", None, "when to evaluate; as --save_strategy if not given",
      choices=("steps", "epoch", "no")),
    F("eval_steps", "train", "steps", None, "evaluate every N steps or share of the run; -1 at the end only"),
)  # fmt: skip

MEMORY = (
    F("recompute_granularity", "memory", "str", None,
      "compute nothing, parts of each layer or whole layers again in backward; overrides --gradient_checkpointing",
      choices=("none", "selective", "full")),
    F("recompute_method", "memory", "str", None, "full: groups of N layers as one, or only the first N; uniform",
      choices=("uniform", "block")),
    F("recompute_num_layers", "memory", "int", None, "full: this N; 1 if not given", low=1),
    F("recompute_modules", "memory", "list", (), "selective: these parts of each layer; core_attn if not given",
      choices=("core_attn", "mlp", "layernorm", "moe")),
    F("activation_cpu_offload", "memory", "bool", False, "keep what decoder layers save for backward in host memory",
      aliases=("cpu_offloading",)),
    F("activation_offload_num_layers", "memory", "int", None, "of the first N layers; all but the last if not given",
      aliases=("cpu_offloading_num_layers",), low=1),
    F("optimizer_cpu_offload", "memory", "bool", False, "keep optimizer state on the host and step there"),
    F("optimizer_offload_fraction", "memory", "float", 1.0, "share of the trained elements that this is done for",
      low=0, high=1),
    F("fp8", "memory", "bool", None, "decoder linears in float8 (full training; torchao, GPU with float8 units)"),
    F("fp8_format", "memory", "str", None, "e4m3, or (hybrid, the default) with e5m2 for gradients; implies --fp8",
      choices=("e4m3", "hybrid")),
)  # fmt: skip

REST = (
    F("output_dir", "save", "str", None, "where runs go; output/<model name> if not given",
      verbs=(*TRAIN, "export", "demo", "compose")),
    F("add_version", "save", "bool", True, "put every run into its own vN-<time> directory"),
    F("save_strategy", "save", "str", "steps", "when to save", choices=("steps", "epoch", "no")),
    F("save_steps", "save", "steps", 500, "save every N steps or share of the run; -1 at the end only"),
    F("save_total_limit", "save", "int", None, "checkpoints kept; the best and the last stay", low=1),
    F("async_save", "save", "bool", False, "write checkpoints while training goes on, from a copy in host memory"),
    F("save_only_model", "save", "bool", False, "leave out what only resuming needs"),
    F("resume_from_checkpoint", "save", "str", None, "checkpoint to go on from; true for the newest complete one"),
    F("max_shard_size", "save", "size", 5 * 10**9, "largest weight file", low=1,
      verbs=(*TRAIN, "export", "compose")),
    F("logging_steps", "log", "steps", 5, "print and log every N steps"),
    F("logging_first_step", "log", "bool", True, "also log step 1"),
    F("report_to", "log", "list", ("tensorboard",), "where curves go", choices=("tensorboard", "wandb", "none")),
    F("run_name", "log", "str", None, "name of the run in wandb"),
    F("deepspeed", "parallel", "str", None, "zero0 replicates, zero1 to zero3 shard over processes (FSDP2)"),
    F("fsdp", "parallel", "str", None, "the same in FSDP's words", choices=("fsdp2", "full_shard", "shard_grad_op")),
    F("tensor_model_parallel_size", "parallel", "int", 1, "ranks that split heads, MLP and vocabulary", low=1),
    F("pipeline_model_parallel_size", "parallel", "int", 1, "stages that the layers are cut into", low=1),
    F("virtual_pipeline_model_parallel_size", "parallel", "int", 1, "parts of a stage, for the interleaved schedule",
      low=1),
    F("decoder_first_pipeline_num_layers", "parallel", "int", None, "layers on the first stage, beside the tower",
      low=1),
    F("decoder_last_pipeline_num_layers", "parallel", "int", None, "layers on the last stage, beside the head", low=1),
    F("pipeline_schedule", "parallel", "str", None, "order of work; interleaved if stages have parts, else 1f1b",
      choices=("1f1b", "interleaved", "zero_bubble")),
    F("context_parallel_size", "parallel", "int", 1, "ranks that share the tokens of one batch", low=1),
    F("cp_comm_type", "parallel", "str", "allgather", "how they attend: gather keys and values, or exchange heads",
      choices=("allgather", "a2a")),
    F("expert_model_parallel_size", "parallel", "int", 1, "ranks that the experts of a sparse layer are divided among",
      low=1),
    F("data_parallel_replicate_size", "parallel", "int", 1, "copies of the sharded model (HSDP)", low=1),
    F("vision_balance", "parallel", "bool", True, "spread the images of a step evenly over the data-parallel ranks"),
    F("ddp_timeout", "parallel", "int", 1800, "seconds without progress until the run ends and names the rank", low=1),
    F("nproc_per_node", "parallel", "int", 1, "processes on this machine", env="NPROC_PER_NODE", low=1),
    F("nnodes", "parallel", "int", 1, "machines", env="NNODES", low=1),
    F("node_rank", "parallel", "int", 0, "which of them this is", env="NODE_RANK", low=0),
    F("master_addr", "parallel", "str", None, "address of the first machine", env="MASTER_ADDR"),
    F("master_port", "parallel", "int", None, "port on the first machine; a free one on a single machine, else 29500",
      env="MASTER_PORT", low=1, high=65535),
    F("max_new_tokens", "infer", "int", None, "most tokens of an answer; what the model has room for if not given",
      low=1),
    F("temperature", "infer", "float", None, "0 is greedy; the model's generation_config.json if not given", low=0),
    F("top_k", "infer", "int", None, "sample among this many tokens", low=-1),
    F("top_p", "infer", "float", None, "sample among tokens of this total probability", low=0, high=1),
    F("repetition_penalty", "infer", "float", None, "above 1 discourages repetition", low=0),
    F("stream", "infer", "bool", None, "print tokens as they come; true in a conversation if not given"),
    F("max_batch_size", "infer", "int", 8, "rows generated together", low=1),
    F("result_path", "infer", "str", None, "JSON lines of answers; infer_result/<time>.jsonl if not given"),
    F("val_dataset_sample", "infer", "int", None, "answer only the first N rows", low=1),
    F("merge_lora", "export", "bool", False, "write the base model with the adapter added in"),
    F("push_to_hub", "export", "bool", False, "upload the directory"),
    F("hub_model_id", "export", "str", None, "namespace/name on the hub"),
    F("hub_token", "export", "str", None, "access token; never written to a file"),
    F("hub_private_repo", "export", "bool", False, "create the repository as private"),
    F("exist_ok", "export", "bool", False, "write into a directory that exists", verbs=("export", "compose")),
    F("vision", "compose", "str", None, "VLM whose vision tower is taken"),
    F("llm", "compose", "str", None, "model, text-only or VLM, whose language model and tokenizer are taken"),
    F("aligner", "compose", "str", "init", "init for a new projector between the two, or the VLM to take it from"),
    F("config", "compose", "str", None, "instead: config.json, or directory with one, of a model with random weights"),
    F("dry_run", "run", "bool", False, "resolve and check everything, print the plan, load no weights"),
)  # fmt: skip

INERT = (
    F("model_type", "inert", "str", inert="the family is read from the model's config.json"),
    F("attn_impl", "inert", "str", choices=("sdpa", "eager", "flash_attn", "flash_attention_2", "flash_attention_3"),
      inert="attention is always packed and exact, on the fastest kernel of the device"),
    F("fps_max_frames", "inert", "int", low=1, env="FPS_MAX_FRAMES",
      inert="a video is a list of frames, and all of them are used"),
    F("dataset_num_proc", "inert", "int", inert="planning lengths needs no worker processes"),
    F("lazy_tokenize", "inert", "bool", inert="lengths come from headers and rows are always encoded when needed"),
    F("load_from_cache_file", "inert", "bool", inert="there is no preprocessing cache to load"),
    F("remove_unused_columns", "inert", "bool", inert="columns that no format knows are ignored"),
    F("padding_free", "inert", "bool", inert="batches never hold padding"),
    F("use_liger_kernel", "inert", "bool", inert="the loss never holds the whole logits anyway"),
    F("sequence_parallel", "inert", "bool", inert="tensor ranks always split the sequence between blocks, and one rank "
      "has nothing to split"),
    F("cross_entropy_loss_fusion", "inert", "bool", inert="head and cross entropy are always one, split over tensor "
      "ranks"),
    F("moe_grouped_gemm", "inert", "bool", inert="experts are always multiplied in one grouped product"),
    F("moe_permute_fusion", "inert", "bool", inert="tokens are sorted by expert in one pass either way"),
    F("check_model", "inert", "bool", inert="every tensor of a checkpoint is accounted for when it is loaded"),
    F("use_hf", "inert", "bool", env="USE_HF", inert="ids are always looked up on the Hugging Face hub"),
    F("infer_backend", "inert", "str", choices=("pt", "transformers"), inert="the engine is always tessera's own"),
)  # fmt: skip

FLAGS: tuple[Flag, ...] = (*MODEL, *DATA, *ADAPT, *TRAINING, *MEMORY, *REST, *INERT)
BY_NAME: Mapping[str, Flag] = {name: flag for flag in FLAGS for name in (flag.name, *flag.aliases)}


def flags_of(verb: str) -> Iterator[Flag]:
    """The rows that ``verb`` takes, in the table's order."""
    return (flag for flag in FLAGS if flag.belongs_to(verb))
