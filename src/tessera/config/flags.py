"""The one table of flags.

Every flag that a command line, a YAML file or an ``args.json`` may hold is one row here: its name, older spellings of
the same thing (``aliases``), the room of the :class:`~tessera.config.run.Run` it belongs to, how its text is read
(``kind``), its default, the values it allows, the environment variable that may also set it, and one line of help.
Parsing, ``--help``, ``docs/flags.md``, ``args.json`` and the typed rooms are all derived from these rows, so a flag is
added by adding a row here and the field of the same name in ``run.py``.

``default`` holds for every verb; ``defaults`` lists the exceptions by verb and by dialect. A *dialect* is a second set
of names and defaults for the same concepts: ``tessera sft`` is ``swift``, ``tessera megatron sft`` is ``megatron``. It
is further entries of a row (``megatron``: names, ``defaults``: values), never a second table. The names of the first
dialect hold in both.

A row with ``means`` is short for others: it says which flags each of its values sets.

A row with ``inert`` is a flag of other tools that needs no counterpart here. It is accepted so that their commands run
as written, and the sentence says once, on the console, why it does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tessera.config import accepted
from tessera.config.flag import ANSWER, ROOMS, TRAIN, USE, VERBS, Dialect, Flag, Kind

__all__ = ["BY_NAME", "FLAGS", "ROOMS", "TRAIN", "USE", "VERBS", "Dialect", "Flag", "Kind", "called", "flags_of"]

F = Flag

MODEL = (
    F("model", "model", "str", None, "directory or hub id of the model", carry="adapter"),
    F("adapters", "model", "list", (), "adapters (deploy: DIR or NAME=DIR); their args.json has the base model",
      megatron=("adapter_load",)),
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
    F("hf_dir", "model", "str", None, "where config.json and tokenizer lie if --model is a Megatron checkpoint without",
      carry="adapter", megatron=("tokenizer_model",)),
    F("allow_missing_vision_projection_checkpoint", "model", "bool", False,
      "draw the projection of a Megatron checkpoint that was combined without one", verbs=TRAIN, only="megatron"),
    F("max_num", "model", "int", None, "most tiles an image is cut into, its thumbnail not counted", env="MAX_NUM",
      low=1, carry="always"),
    F("use_tiling", "model", "bool", None, "cut images into tiles or show them whole; the model's own way if not given",
      carry="always"),
    F("model_kwargs", "model", "json", None, "the limits above as one JSON object"),
    F("quant_method", "model", "str", None, "quantise the frozen base model (QLoRA)", carry="adapter",
      choices=("bnb",)),
    F("quant_bits", "model", "int", None, "bits of the quantised base model; 4 is NF4, 8 LLM.int8", carry="adapter",
      choices=("4", "8")),
)  # fmt: skip

DATA = (
    F("dataset", "data", "list", (), "files, directories or ids, each as path[:subset][#N]", carry="data",
      megatron=("data_path", "train_data_path")),
    F("val_dataset", "data", "list", (), "validation data, same syntax", carry="data", megatron=("valid_data_path",)),
    F("split_dataset_ratio", "data", "float", 0.0, "share of --dataset set aside for validation", low=0, high=1,
      carry="data"),
    F("data_seed", "data", "int", None, "seed of sampling, splitting and order; --seed if not given", carry="data"),
    F("dataset_shuffle", "data", "bool", True, "sample and split in random order", carry="data"),
    F("train_dataloader_shuffle", "data", "bool", True, "shuffle the training rows in every epoch"),
    F("val_dataset_shuffle", "data", "bool", False, "shuffle the validation rows", carry="data"),
    F("max_length", "data", "int", None, "most tokens of a row; the model's maximum if not given", low=1,
      megatron=("seq_length", "decoder_seq_length")),
    F("truncation_strategy", "data", "str", "delete", "what happens to longer rows", carry="always",
      choices=("delete", "left", "right", "split")),
    F("packing", "data", "bool", False, "pack whole rows into units of --packing_length tokens"),
    F("packing_length", "data", "int", None, "tokens of a pack; --max_length if not given", low=1),
    F("system", "data", "str", None, "system prompt, or a .txt file that holds it", carry="always",
      verbs=(*TRAIN, "infer", "deploy", "data")),
    F("loss_scale", "data", "str", "default", "which turns count: assistant turns, the last of them, or every token",
      choices=("default", "last_round", "all"), defaults={"pt": "all"}),
    F("columns", "data", "json", None, "column names of the dataset mapped to ours, e.g. '{\"question\": \"query\"}'",
      carry="data"),
    F("strict", "data", "bool", False, "stop at the first bad row instead of skipping it", carry="data"),
    F("max_skip_ratio", "data", "float", 0.1, "stop when more than this share of the rows is bad", low=0, high=1,
      carry="data"),
    F("image_resize", "data", "str", None, "whose resize to equal, torchvision's or PIL's; the model's if not given",
      choices=("torch", "pil"), carry="always", verbs=(*TRAIN, "infer", "deploy", "data")),
    F("root_image_dir", "data", "str", None, "where relative image paths start", env="ROOT_IMAGE_DIR", carry="data"),
    F("dataloader_num_workers", "data", "int", None, "threads that decode images; chosen by the machine if not given",
      low=0, megatron=("num_workers",)),
    F("dataloader_drop_last", "data", "bool", False,
      "every step is a whole batch: what is left of an epoch begins the next one, what is left at the end is dropped",
      defaults={"megatron": True}),
    F("load_data_args", "data", "bool", False, "take dataset and split from the args.json of the model or adapter",
      verbs=("infer", "export")),
)  # fmt: skip

ADAPT = (
    F("train_type", "adapt", "str", "lora", "train an adapter or the weights themselves", aliases=("tuner_type",),
      choices=("lora", "full"), carry="adapter", defaults={"megatron": "full"}),
    F("freeze_llm", "adapt", "bool", False, "keep the language model as it is", megatron=("freeze_LM",)),
    F("freeze_vit", "adapt", "bool", True, "keep the vision tower as it is", megatron=("freeze_ViT",)),
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
    F("num_train_epochs", "train", "float", 3.0, "passes over the data", low=0, megatron=("max_epochs",)),
    F("max_steps", "train", "int", -1, "optimiser steps; overrides the epochs unless -1", low=-1,
      verbs=(*TRAIN, "demo"), megatron=("train_iters",)),
    F("per_device_train_batch_size", "train", "int", 1, "rows (packs) of a microbatch on one process", low=1,
      megatron=("micro_batch_size",)),
    F("per_device_eval_batch_size", "train", "int", 1, "the same while evaluating", low=1, verbs=(*TRAIN, "infer")),
    F("gradient_accumulation_steps", "train", "int", None, "microbatches of a step; fills 16 rows if not given",
      low=1),
    F("global_batch_size", "train", "int", None,
      "rows (packs) of a step over all processes; instead of --gradient_accumulation_steps", low=1,
      defaults={"megatron": 16}),
    F("learning_rate", "train", "float", None, "peak learning rate; 1e-4 for lora, 1e-5 for full if not given", low=0,
      megatron=("lr",)),
    F("vit_lr", "train", "float", None, "learning rate of the vision tower", low=0),
    F("aligner_lr", "train", "float", None, "learning rate of the projector", low=0),
    F("optim", "train", "str", "adamw_torch_fused", "optimiser",
      choices=("adamw_torch_fused", "adamw_torch", "muon")),
    F("weight_decay", "train", "float", 0.1, "decay of matrices; vectors are never decayed", low=0),
    F("adam_beta1", "train", "float", 0.9, "decay of the first moment", low=0, high=1),
    F("adam_beta2", "train", "float", 0.95, "decay of the second moment", low=0, high=1),
    F("adam_epsilon", "train", "float", 1e-8, "added to the root of the second moment", low=0, megatron=("adam_eps",)),
    F("max_grad_norm", "train", "float", 1.0, "clip the global gradient norm; 0 never", low=0,
      megatron=("clip_grad",)),
    F("lr_scheduler_type", "train", "str", "cosine", "shape of the schedule after warm-up",
      choices=("cosine", "linear", "constant", "constant_with_warmup", "warmup_stable_decay"),
      megatron=("lr_decay_style",)),
    F("warmup_ratio", "train", "float", 0.0, "share of the run that warms up", low=0, high=1),
    F("warmup_steps", "train", "int", 0, "steps that warm up; overrides --warmup_ratio", low=0,
      megatron=("lr_warmup_iters",)),
    F("lr_warmup_fraction", "train", "float", None, "share of --lr_decay_iters that warms up, not rounded to steps",
      low=0, high=1),
    F("lr_decay_iters", "train", "float", None, "steps until --min_lr is reached, if not those of the run", low=0),
    F("min_lr", "train", "float", 0.0, "where the schedule ends", low=0),
    F("wsd_decay_ratio", "train", "float", 0.1, "warmup_stable_decay: share of the run that decays", low=0, high=1),
    F("seed", "train", "int", 42, "seed of everything random", low=0,
      verbs=(*TRAIN, "infer", "eval", "data", "demo", "compose")),
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
    F("eval_steps", "train", "steps", None, "evaluate every N steps or share of the run; -1 at the end only",
      megatron=("eval_interval",)),
    F("eval_iters", "train", "int", -1, "evaluate on so many batches of --global_batch_size rows; -1 all, 0 never",
      low=-1),
)  # fmt: skip

MEMORY = (
    F("recompute_granularity", "memory", "str", None,
      "compute nothing, parts of each layer or whole layers again in backward; overrides --gradient_checkpointing",
      choices=("none", "selective", "full"), defaults={"megatron": "selective"}),
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
      verbs=(*TRAIN, "export", "data", "demo", "compose"), megatron=("save",)),
    F("add_version", "save", "bool", True, "put every run into its own vN-<time> directory"),
    F("save_strategy", "save", "str", "steps", "when to save", choices=("steps", "epoch", "no")),
    F("save_steps", "save", "steps", 500, "save every N steps or share of the run; -1 at the end only",
      megatron=("save_interval",)),
    F("save_total_limit", "save", "int", None, "checkpoints kept; the best and the last stay", low=1),
    F("async_save", "save", "bool", False, "write checkpoints while training goes on, from a copy in host memory"),
    F("save_format", "save", "str", None, "as Hugging Face directories or as Megatron checkpoints; in tessera megatron "
      "that of --load, else hf", choices=("hf", "mcore")),
    F("save_only_model", "save", "bool", False, "leave out what only resuming needs"),
    F("resume_from_checkpoint", "save", "str", None, "checkpoint to go on from; true for the newest complete one"),
    F("max_shard_size", "save", "size", 5 * 10**9, "largest weight file", low=1,
      verbs=(*TRAIN, "export", "compose")),
    F("logging_steps", "log", "steps", 5, "print and log every N steps", megatron=("log_interval",)),
    F("logging_first_step", "log", "bool", True, "also log step 1"),
    F("report_to", "log", "list", ("tensorboard",), "where curves go", choices=("tensorboard", "wandb", "none")),
    F("run_name", "log", "str", None, "name of the run in wandb", megatron=("wandb_exp_name",)),
    F("wandb_project", "log", "str", None, "project of the run in wandb; implies --report_to wandb"),
    F("tensorboard_dir", "log", "str", None, "where tensorboard's files go; runs/ in the run's directory if not given",
      aliases=("logging_dir",)),
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
    F("data_parallel_replicate_size", "parallel", "int", 1, "copies of the sharded model (HSDP)", low=1,
      megatron=("num_distributed_optimizer_instances",)),
    F("vision_balance", "parallel", "bool", True, "spread the images of a step evenly over the data-parallel ranks"),
    F("ddp_timeout", "parallel", "int", 1800, "seconds without progress until the run ends and names the rank", low=1,
      verbs=(*TRAIN, "eval")),
    F("nproc_per_node", "parallel", "int", 1, "processes on this machine", env="NPROC_PER_NODE", low=1,
      verbs=(*TRAIN, "eval")),
    F("nnodes", "parallel", "int", 1, "machines", env="NNODES", low=1, verbs=(*TRAIN, "eval")),
    F("node_rank", "parallel", "int", 0, "which of them this is", env="NODE_RANK", low=0, verbs=(*TRAIN, "eval")),
    F("master_addr", "parallel", "str", None, "address of the first machine", env="MASTER_ADDR",
      verbs=(*TRAIN, "eval")),
    F("master_port", "parallel", "int", None, "port on the first machine; a free one on a single machine, else 29500",
      env="MASTER_PORT", low=1, high=65535, verbs=(*TRAIN, "eval")),
    F("max_new_tokens", "infer", "int", None, "most tokens of an answer; what the model has room for if not given",
      low=1, aliases=("out_seq_length",), verbs=ANSWER),
    F("temperature", "infer", "float", None, "0 is greedy; the model's generation_config.json if not given", low=0,
      verbs=ANSWER),
    F("top_k", "infer", "int", None, "sample among this many tokens", low=-1, verbs=ANSWER),
    F("top_p", "infer", "float", None, "sample among tokens of this total probability", low=0, high=1, verbs=ANSWER),
    F("min_p", "infer", "float", None, "sample among tokens of this share of the most probable one's probability",
      low=0, high=1, verbs=ANSWER),
    F("repetition_penalty", "infer", "float", None, "above 1 discourages repetition", low=0, verbs=ANSWER),
    F("stream", "infer", "bool", None, "print tokens as they come; true in a conversation if not given",
      verbs=("infer",)),
    F("max_batch_size", "infer", "int", 8, "rows generated together", low=1, defaults={"eval": 32}),
    F("result_path", "infer", "str", None, "JSON lines of answers; infer_result/<time>.jsonl if not given",
      verbs=("infer",)),
    F("val_dataset_sample", "infer", "int", None, "answer only the first N rows", low=1, verbs=("infer",)),
    F("task", "infer", "str", None, "ask a benchmark's questions as Megatron-LM's scripts do (docs/inference.md)",
      choices=("captioning", "TextVQA", "VQAv2", "ChartQA", "InfoVQA", "SPDocVQA", "AI2D", "OCRBench", "RealworldQA",
               "MathVista", "MMMU")),
    F("input_image_path", "infer", "str", None, "task: folder of its images, or of its parquet files",
      verbs=("infer",)),
    F("gt_path", "infer", "str", None, "task: file of its questions and truths", verbs=("infer", "eval")),
    F("output_path", "infer", "str", None, "task: beginning of the name of the file of answers", verbs=("infer",)),
    F("num_partitions", "infer", "int", 0, "task: answer one of N parts; 0 all", low=0, verbs=("infer",)),
    F("partition_id", "infer", "int", 0, "task: this one, from 0", low=0, verbs=("infer",)),
    F("num_samples_per_partition", "infer", "int", 0, "task: questions of a part; equal parts if 0", low=0,
      verbs=("infer",)),
    F("merge_lora", "export", "bool", False, "write the base model with the adapter added in"),
    F("push_to_hub", "export", "bool", False, "upload the directory"),
    F("hub_model_id", "export", "str", None, "namespace/name on the hub"),
    F("hub_token", "export", "str", None, "access token; never written to a file", secret=True),
    F("hub_private_repo", "export", "bool", False, "create the repository as private"),
    F("to_mcore", "convert", "bool", False, "write a Megatron checkpoint"),
    F("to_hf", "convert", "bool", False, "write a Hugging Face directory from --mcore_model or --mcore_adapters"),
    F("mcore_model", "convert", "str", None, "Megatron checkpoint: the directory above iter_N, or that one itself",
      verbs=(*TRAIN, "export")),
    F("mcore_adapters", "convert", "list", (), "adapters of a Megatron run; merged unless --merge_lora false",
      aliases=("mcore_adapter",)),
    F("mcore_vision_model", "convert", "str", None, "Megatron checkpoint of a tower, combined with the language model "
      "of --mcore_model"),
    F("mcore_format", "convert", "str", "torch_dist", "torch_dist, or the older files by rank (torch)",
      choices=("torch_dist", "torch"), megatron=("ckpt_format",), verbs=(*TRAIN, "export")),
    F("mcore_dialect", "convert", "str", None, "whose names for the parts of a VLM; those of a Megatron "
      "source, else the first that has the model of swift, pai, bridge, lm",
      choices=("pai", "bridge", "swift", "lm"), verbs=(*TRAIN, "export")),
    F("mcore_layer_layout", "convert", "str", None, "layers stacked in one tensor or one by one; the dialect's own if "
      "not given", choices=("stacked", "per_layer"), verbs=(*TRAIN, "export")),
    F("target_tensor_parallel_size", "convert", "int", None, "tensor ranks that files are written for; those of a "
      "Megatron source, else 1", low=1),
    F("target_pipeline_parallel_size", "convert", "int", None, "the same for pipeline stages", low=1),
    F("target_expert_parallel_size", "convert", "int", None, "the same for expert ranks", low=1),
    F("make_vocab_size_divisible_by", "convert", "int", None, "pad the vocabulary to a multiple of this x tensor ranks",
      low=1),
    F("padded_vocab_size", "convert", "int", None, "pad the vocabulary to this size", low=1),
    F("test_convert_precision", "convert", "bool", False, "run source and result on one sample and compare"),
    F("test_convert_dtype", "convert", "str", "float32", "dtype of that comparison",
      choices=("float32", "bfloat16", "float16")),
    F("load", "short", "str", None, "--model, a Hugging Face or Megatron directory; beside --model, which is then "
      "--hf_dir", aliases=("pretrained_checkpoint",), only="megatron", verbs=(*TRAIN, *USE)),
    F("bf16", "short", "bool", None, "--torch_dtype bfloat16", only="megatron",
      means={"true": {"torch_dtype": "bfloat16"}}, verbs=(*TRAIN, "export")),
    F("fp16", "short", "bool", None, "--torch_dtype float16", only="megatron",
      means={"true": {"torch_dtype": "float16"}}, verbs=(*TRAIN, "export")),
    F("optimizer", "short", "str", None, "--optim", choices=("adam", "muon"), only="megatron",
      means={"adam": {"optim": "adamw_torch_fused"}, "muon": {"optim": "muon"}}),
    F("use_distributed_optimizer", "short", "bool", None, "false is --deepspeed zero0; otherwise the optimiser is "
      "sharded anyway", only="megatron", means={"false": {"deepspeed": "zero0"}}),
    F("recompute_activations", "short", "bool", None, "--recompute_granularity selective", only="megatron",
      means={"true": {"recompute_granularity": "selective"}}),
    F("no_save_optim", "short", "bool", None, "--save_only_model true", only="megatron",
      means={"true": {"save_only_model": "true"}}),
    F("save_safetensors", "short", "bool", None, "--save_format hf, or mcore if false", only="megatron",
      means={"true": {"save_format": "hf"}, "false": {"save_format": "mcore"}}),
    F("train_samples", "short", "int", None, "--max_steps x --global_batch_size", only="megatron", low=1),
    F("lr_decay_samples", "short", "int", None, "--lr_decay_iters x --global_batch_size", only="megatron", low=1),
    F("lr_warmup_samples", "short", "int", None, "the share of --lr_decay_samples that warms up", only="megatron",
      low=0),
    F("exist_ok", "export", "bool", False, "write into a directory that exists", verbs=("export", "data", "compose")),
    F("split", "shards", "str", None, "prepare, convert: shares of train, val and test in shards, e.g. 9,1,0",
      aliases=("split_ratio",)),
    F("sample_type", "shards", "str", None, "prepare: what a sample is, e.g. VQASample, ChatMLSample"),
    F("field_map", "shards", "json", None, "prepare: which part is which field, e.g. '{\"image\": \"jpg\", ...}'"),
    F("shuffle_tars", "shards", "bool", False, "prepare, convert: divide the shards in random order, always the same"),
    F("max_samples_per_tar", "shards", "int", 10_000, "convert: most samples of a shard", low=1),
    F("json", "shards", "bool", False, "lint, stats: print one JSON object instead of lines"),
    F("num_samples", "shards", "int", 60, "show: how many samples the page holds", low=1),
    F("vision", "compose", "str", None, "VLM whose vision tower is taken"),
    F("llm", "compose", "str", None, "model, text-only or VLM, whose language model and tokenizer are taken"),
    F("aligner", "compose", "str", "init", "init for a new projector between the two, or the VLM to take it from"),
    F("config", "compose", "str", None, "instead: config.json, or directory with one, of a model with random weights"),
    F("dry_run", "run", "bool", False, "resolve and check everything, print the plan, load no weights"),
)  # fmt: skip

EVALUATE = (
    F("eval_dataset", "evaluate", "list", (), "benchmarks, each as NAME or NAME=PATH; while training: asked at every "
      "evaluation", aliases=("eval_datasets",), verbs=("eval", *TRAIN)),
    F("eval_dataset_args", "evaluate", "json", None, "per benchmark: where it lies and how much of it is asked, e.g. "
      "'{\"MMMU\": {\"local_path\": \"mmmu\", \"limit\": 100}}'", aliases=("dataset_args",), verbs=("eval", *TRAIN)),
    F("local_path", "evaluate", "str", None, "where the one benchmark lies, or a directory with one directory or file "
      "per benchmark", aliases=("eval_local_path",), verbs=("eval", *TRAIN)),
    F("eval_limit", "evaluate", "int", None, "ask the first N questions of each benchmark", low=1,
      verbs=("eval", *TRAIN)),
    F("eval_generation_config", "evaluate", "json", None, "how answers are generated, as one JSON object; flags hold "
      "over it", verbs=("eval", *TRAIN)),
    F("scorer", "evaluate", "str", None, "rule for the rows of --dataset, which are the questions then"),
    F("eval_backend", "evaluate", "str", "native", "native is this program; evalscope runs that one against a server",
      choices=("native", "Native", "VLMEvalKit", "OpenCompass", "evalscope")),
    F("eval_url", "evaluate", "str", None, "ask a server that speaks OpenAI's protocol; --model is the name it knows",
      aliases=("api_url", "eval_api_url")),
    F("concurrency", "evaluate", "int", 8, "questions under way at that server", low=1,
      aliases=("eval_num_proc", "eval_batch_size")),
    F("eval_timeout", "evaluate", "float", 600.0, "seconds that server may take for an answer", low=0),
    F("eval_output_dir", "evaluate", "str", "eval_output", "where answers, figures and the page go; the same command "
      "goes on there", aliases=("work_dir",)),
    F("download", "evaluate", "bool", False, "fetch benchmarks that are not here from the Hugging Face hub"),
    F("compare", "evaluate", "list", (), "two directories of evaluations, compared item by item"),
    F("input_path", "evaluate", "str", None, "score the answers that tessera infer --task wrote: a file, or a "
      "directory of its parts"),
)  # fmt: skip

DEPLOY = (
    F("infer_backend", "deploy", "str", "tessera", "the engine: tessera's own (also pt, transformers), or another's "
      "server", choices=("tessera", "pt", "transformers", "vllm", "sglang"), verbs=(*TRAIN, *USE, "data")),
    F("host", "deploy", "str", "127.0.0.1", "address to listen on; 0.0.0.0 is every one of this machine"),
    F("port", "deploy", "int", 8000, "port to listen on; the next free one if it is taken", low=1, high=65535),
    F("api_key", "deploy", "str", None, "what clients must send as bearer token, or what is sent to "
      "--eval_url", env="TESSERA_API_KEY", secret=True, verbs=("deploy", "eval")),
    F("ssl_keyfile", "deploy", "str", None, "private key for HTTPS (PEM)"),
    F("ssl_certfile", "deploy", "str", None, "certificate for HTTPS (PEM)"),
    F("served_model_name", "deploy", "str", None, "what the model is called; the last part of its path if not given"),
    F("stats_interval", "deploy", "int", 20, "seconds between lines about what is going on; 0 prints none", low=0,
      aliases=("log_interval",)),
    F("max_logprobs", "deploy", "int", 20, "most alternatives per token that a request may ask for", low=0, high=20),
    F("max_model_len", "deploy", "int", None, "most tokens of a prompt and its answer; the model's own if not given",
      low=1, aliases=("vllm_max_model_len", "sglang_context_length")),
    F("max_num_seqs", "deploy", "int", 64, "answers generated together", low=1,
      aliases=("vllm_max_num_seqs", "sglang_max_running_requests", "max_batch_size")),
    F("max_waiting", "deploy", "int", 256, "requests that may wait; further ones are told to come back", low=1),
    F("limit_mm_per_prompt", "deploy", "json", None, 'most media of a request, e.g. \'{"image": 5, "video": 2}\'',
      aliases=("vllm_limit_mm_per_prompt",)),
    F("gpu_memory_utilization", "deploy", "float", None, "share of the GPU's memory that vllm or sglang takes", low=0,
      high=1, aliases=("vllm_gpu_memory_utilization", "sglang_mem_fraction_static")),
    F("tensor_parallel_size", "deploy", "int", 1, "GPUs that vllm or sglang splits the model over", low=1,
      aliases=("vllm_tensor_parallel_size", "sglang_tp_size")),
    F("allowed_media_dir", "deploy", "str", None, "requests may name images below this directory; none if not given",
      aliases=("allowed_local_media_path",)),
    F("allowed_media_domains", "deploy", "list", (), "hosts that images may be fetched from; every public one if not "
      "given, none fetches nothing"),
    F("max_body_size", "deploy", "size", 32 * 2**20, "largest request, and largest image that is fetched", low=1),
    F("max_image_pixels", "deploy", "int", 64 * 2**20, "largest image of a request, width times height", low=1),
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
    F("eval_use_evalscope", "inert", "bool", verbs=TRAIN, inert="benchmarks are scored by tessera's own rules"),
    F("verbose", "inert", "bool", inert="requests are counted, what they say is never logged", verbs=("deploy",)),
)  # fmt: skip

MEGATRON = tuple(
    F(name, "inert", kind, only="megatron", inert=reason) for name, kind, reason in accepted.rows()
)  # fmt: skip

FLAGS: tuple[Flag, ...] = (*MODEL, *DATA, *ADAPT, *TRAINING, *MEMORY, *REST, *EVALUATE, *DEPLOY, *INERT, *MEGATRON)
BY_NAME: Mapping[str, Flag] = {name: flag for flag in reversed(FLAGS) for name in flag.names("megatron")}
"""Every spelling of every dialect; :meth:`Flag.names` and :meth:`Flag.belongs_to` say which of them holds where. What
two verbs call by one name is the first row's here; :func:`called` knows both."""


def called(name: str, verb: str, dialect: Dialect = "swift") -> Flag | None:
    """The row that ``name`` may mean, that of ``verb`` if it has one."""
    mine = (flag for flag in FLAGS if name in flag.names(dialect) and flag.belongs_to(verb, dialect))
    return next(mine, BY_NAME.get(name))


def flags_of(verb: str, dialect: Dialect = "swift") -> Iterator[Flag]:
    """The rows that ``verb`` takes in ``dialect``, in the table's order."""
    return (flag for flag in FLAGS if flag.belongs_to(verb, dialect))
