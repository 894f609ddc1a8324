"""What is run, as values: one frozen dataclass per room, held together by a :class:`Run`.

Rooms receive the dataclass of their name and read plain attributes; nobody else parses anything. The fields carry no
defaults: those, the help and the allowed values are the rows of the same names in ``flags.py`` (a test compares the
two), and :mod:`tessera.config.resolve` is where a Run comes from::

    run = resolve(["sft", "--model", "DIR", "--dataset", "rows.jsonl"], os.environ)   # a command line
    run = run_of("sft", model="DIR", dataset=("rows.jsonl",))                        # a program, a test
    run.train.learning_rate, run.provenance["learning_rate"]                         # 0.0001, 'default'

A Run remembers where every value came from, and becomes a flat ``args.json`` in ms-swift's spelling, so that tools
which read that file also read ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tessera import __version__
from tessera.config.flags import BY_NAME, FLAGS, Dialect

Provenance = Mapping[str, str]
"""Flag name -> 'flag', 'yaml', 'env', 'args.json', 'program' (run_of) or 'default'."""

Steps = int | float
"""A number of steps, a share of the run if below 1, or -1: at the end only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelArgs:
    """Which model, in which dtype, at which resolution, quantised or not."""

    model: str | None
    adapters: tuple[str, ...]
    torch_dtype: str | None
    max_pixels: int | None
    min_pixels: int | None
    video_max_pixels: int | None
    fps: float | None
    hf_dir: str | None
    allow_missing_vision_projection_checkpoint: bool
    max_num: int | None
    use_tiling: bool | None
    quant_method: str | None
    quant_bits: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DataArgs:
    """Which rows, and how they become batches; ``system`` is the text itself, ``data_seed`` is always set."""

    dataset: tuple[str, ...]
    val_dataset: tuple[str, ...]
    split_dataset_ratio: float
    data_seed: int
    dataset_shuffle: bool
    train_dataloader_shuffle: bool
    val_dataset_shuffle: bool
    max_length: int | None
    truncation_strategy: str
    packing: bool
    packing_length: int | None
    system: str | None
    loss_scale: str
    columns: Mapping[str, str] | None
    strict: bool
    max_skip_ratio: float
    image_resize: str | None
    root_image_dir: str | None
    dataloader_num_workers: int | None
    dataloader_drop_last: bool
    load_data_args: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptArgs:
    """What is trainable: the weights or an adapter, of which parts."""

    train_type: str
    freeze_llm: bool
    freeze_vit: bool
    freeze_aligner: bool
    freeze_parameters: tuple[str, ...]
    trainable_parameters: tuple[str, ...]
    lora_rank: int
    lora_alpha: int
    lora_dropout: float
    lora_bias: str
    target_modules: tuple[str, ...]
    target_regex: str | None
    modules_to_save: tuple[str, ...]
    use_dora: bool
    use_rslora: bool
    lorap_lr_ratio: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainArgs:
    """The loop: length, batch, optimiser, schedule, recomputation, evaluation. No field is left undecided but the
    learning rates of tower and projector, which then follow ``learning_rate``."""

    num_train_epochs: float
    max_steps: int
    per_device_train_batch_size: int
    per_device_eval_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int
    learning_rate: float
    vit_lr: float | None
    aligner_lr: float | None
    optim: str
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_grad_norm: float
    lr_scheduler_type: str
    warmup_ratio: float
    warmup_steps: int
    lr_warmup_fraction: float | None
    lr_decay_iters: float | None
    min_lr: float
    wsd_decay_ratio: float
    seed: int
    gradient_checkpointing: bool
    vit_gradient_checkpointing: bool
    moe_aux_loss_coeff: float
    moe_shared_expert_overlap: bool
    loss_chunk_size: int
    max_bad_steps: int
    eval_strategy: str
    eval_steps: Steps
    eval_iters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryArgs:
    """What stays on the device. Always decided: without full recompute, method and number are those it would have;
    ``recompute_modules`` is empty unless selective. ``activation_offload_num_layers`` None is all layers but the last.
    """

    recompute_granularity: str
    recompute_method: str
    recompute_num_layers: int
    recompute_modules: tuple[str, ...]
    activation_cpu_offload: bool
    activation_offload_num_layers: int | None
    optimizer_cpu_offload: bool
    optimizer_offload_fraction: float
    fp8: bool
    fp8_format: str

    @property
    def optimizer_share(self) -> float:
        """The share of the trained elements whose optimiser state lives on the host."""
        return self.optimizer_offload_fraction if self.optimizer_cpu_offload else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveArgs:
    """What is kept, where, how often; ``max_shard_size`` in bytes, ``resume_from_checkpoint`` a path or ``true``."""

    output_dir: str
    add_version: bool
    save_strategy: str
    save_steps: Steps
    save_total_limit: int | None
    async_save: bool
    save_format: str
    save_only_model: bool
    resume_from_checkpoint: str | None
    max_shard_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LogArgs:
    """What is shown; an empty ``report_to`` means files only."""

    logging_steps: Steps
    logging_first_step: bool
    report_to: tuple[str, ...]
    run_name: str | None
    wandb_project: str | None
    tensorboard_dir: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelArgs:
    """On how many processes, and how they share the work; ``deepspeed`` is None or one of zero0 to zero3,
    ``ddp_timeout`` in seconds."""

    deepspeed: str | None
    fsdp: str | None
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    virtual_pipeline_model_parallel_size: int
    decoder_first_pipeline_num_layers: int | None
    decoder_last_pipeline_num_layers: int | None
    pipeline_schedule: str
    context_parallel_size: int
    cp_comm_type: str
    expert_model_parallel_size: int
    data_parallel_replicate_size: int
    vision_balance: bool
    ddp_timeout: int
    nproc_per_node: int
    nnodes: int
    node_rank: int
    master_addr: str | None
    master_port: int | None

    @property
    def model_parallel_size(self) -> int:
        """Ranks that work on the same batch."""
        return self.tensor_model_parallel_size * self.context_parallel_size * self.pipeline_model_parallel_size

    @property
    def zero_stage(self) -> int | None:
        """0 (replicate) to 3 (shard parameters too), or None where neither flag asks for anything."""
        if self.deepspeed is not None:
            return int(self.deepspeed.removeprefix("zero"))
        return {None: None, "fsdp2": 3, "full_shard": 3, "shard_grad_op": 2}[self.fsdp]


@dataclass(frozen=True, slots=True, kw_only=True)
class InferArgs:
    """How answers are generated; None defers to the model's generation config or to the mode (``stream``)."""

    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    stream: bool | None
    max_batch_size: int
    result_path: str | None
    val_dataset_sample: int | None
    task: str | None
    input_image_path: str | None
    gt_path: str | None
    output_path: str | None
    num_partitions: int
    partition_id: int
    num_samples_per_partition: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalArgs:
    """What is asked and how it is scored; ``eval_timeout`` is in seconds."""

    eval_dataset: tuple[str, ...]
    eval_dataset_args: Mapping[str, Any] | None
    local_path: str | None
    eval_limit: int | None
    eval_generation_config: Mapping[str, Any] | None
    scorer: str | None
    eval_backend: str
    eval_url: str | None
    concurrency: int
    eval_timeout: float
    eval_output_dir: str
    download: bool
    compare: tuple[str, ...]
    input_path: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployArgs:
    """How a model is served: where, under which name, to whom, within which limits; sizes in bytes, times in seconds.

    ``infer_backend`` is ``tessera``, ``vllm`` or ``sglang`` once resolved. ``api_key`` lives in memory only.
    """

    infer_backend: str
    host: str
    port: int
    api_key: str | None
    ssl_keyfile: str | None
    ssl_certfile: str | None
    served_model_name: str | None
    stats_interval: int
    max_logprobs: int
    max_model_len: int | None
    max_num_seqs: int
    max_waiting: int
    limit_mm_per_prompt: Mapping[str, int] | None
    gpu_memory_utilization: float | None
    tensor_parallel_size: int
    allowed_media_dir: str | None
    allowed_media_domains: tuple[str, ...]
    max_body_size: int
    max_image_pixels: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportArgs:
    """What leaves the house; ``hub_token`` lives in memory only."""

    merge_lora: bool
    push_to_hub: bool
    hub_model_id: str | None
    hub_token: str | None
    hub_private_repo: bool
    exist_ok: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertArgs:
    """What is converted between Hugging Face and Megatron, and how the Megatron side is laid out.

    ``mcore_model``, ``mcore_adapters`` and ``mcore_vision_model`` are the sources on the Megatron side; a vocabulary is
    padded to ``padded_vocab_size`` rows, or to a multiple of ``make_vocab_size_divisible_by`` x tensor ranks.
    """

    to_mcore: bool
    to_hf: bool
    mcore_model: str | None
    mcore_adapters: tuple[str, ...]
    mcore_vision_model: str | None
    mcore_format: str
    mcore_dialect: str | None
    mcore_layer_layout: str | None
    target_tensor_parallel_size: int | None
    target_pipeline_parallel_size: int | None
    target_expert_parallel_size: int | None
    make_vocab_size_divisible_by: int | None
    padded_vocab_size: int | None
    test_convert_precision: bool
    test_convert_dtype: str

    @property
    def asked(self) -> bool:
        """Whether anything is converted."""
        return self.to_mcore or self.to_hf

    def describe(self) -> str:
        """The conversion in one line, for a dry run and for errors."""
        sources = [name for name in (self.mcore_model, self.mcore_vision_model, *self.mcore_adapters) if name]
        parts = [" + ".join(sources), "to Megatron" if self.to_mcore else "to Hugging Face"]
        if self.to_mcore:
            sizes = {
                "tp": self.target_tensor_parallel_size,
                "pp": self.target_pipeline_parallel_size,
                "ep": self.target_expert_parallel_size,
            }
            parts += [self.mcore_format, self.mcore_dialect or "", self.mcore_layer_layout or ""]
            parts += [f"{name}{size}" for name, size in sizes.items() if size]
            if self.padded_vocab_size:
                parts.append(f"vocabulary padded to {self.padded_vocab_size}")
            if self.make_vocab_size_divisible_by:
                parts.append(f"vocabulary padded to a multiple of {self.make_vocab_size_divisible_by}")
        if self.test_convert_precision:
            parts.append(f"compared in {self.test_convert_dtype}")
        return " ".join(part for part in parts if part)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardArgs:
    """How shards are made of data and described, and how rows are looked at; ``split`` is the text ``9,1,0``."""

    split: str | None
    sample_type: str | None
    field_map: Mapping[str, str] | None
    shuffle_tars: bool
    max_samples_per_tar: int
    json: bool
    num_samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ComposeArgs:
    """What a new model is made of: ``vision`` and ``llm``, or ``config`` alone; ``aligner`` is a directory or init."""

    vision: str | None
    llm: str | None
    aligner: str
    config: str | None


SECRET_VARIABLES = frozenset(("VLLM_API_KEY", *(flag.env for flag in FLAGS if flag.secret and flag.env)))
"""Environment variables whose values are stored nowhere."""

ROOM_CLASSES: Mapping[str, type] = {
    "model": ModelArgs,
    "data": DataArgs,
    "adapt": AdaptArgs,
    "train": TrainArgs,
    "memory": MemoryArgs,
    "save": SaveArgs,
    "log": LogArgs,
    "parallel": ParallelArgs,
    "infer": InferArgs,
    "evaluate": EvalArgs,
    "deploy": DeployArgs,
    "export": ExportArgs,
    "convert": ConvertArgs,
    "shards": ShardArgs,
    "compose": ComposeArgs,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Everything a verb is told.

    ``dialect`` says whose names and defaults the command line was in; nothing but those depends on it.
    ``target`` is the positional argument of ``report`` (a run directory) and ``demo``, and what ``data`` converts or
    prepares; ``task`` is what ``data`` does, in words. ``config_file`` is the YAML or JSON file the flags came from,
    ``env`` the environment variables that had a say and those of the file's ``ENV`` block, ``inert`` the accepted flags
    without effect, ``notes`` what to tell the user once before anything starts.
    """

    verb: str
    dialect: Dialect
    model: ModelArgs
    data: DataArgs
    adapt: AdaptArgs
    train: TrainArgs
    memory: MemoryArgs
    save: SaveArgs
    log: LogArgs
    parallel: ParallelArgs
    infer: InferArgs
    evaluate: EvalArgs
    deploy: DeployArgs
    export: ExportArgs
    convert: ConvertArgs
    shards: ShardArgs
    compose: ComposeArgs
    dry_run: bool
    task: tuple[str, ...]
    target: str | None
    config_file: str | None
    provenance: Provenance
    env: Mapping[str, str]
    inert: Mapping[str, Any]
    notes: tuple[str, ...]

    def values(self) -> dict[str, Any]:
        """Flag name -> value of every room."""
        rooms = asdict(self)
        return {name: value for room in ROOM_CLASSES for name, value in rooms[room].items()}

    def to_json(self) -> dict[str, Any]:
        """The flat args.json: every flag under all its spellings, tokens nulled, plus what made this run."""
        out: dict[str, Any] = {}
        for name, value in {**self.values(), **self.inert}.items():
            if BY_NAME[name].room == "deploy" and self.verb != "deploy":
                continue  # a server says nothing about a model, and shares spellings with training
            for spelling in BY_NAME[name].names(self.dialect):
                out[spelling] = list(value) if isinstance(value, tuple) else value
                if BY_NAME[name].secret:
                    out[spelling] = None
        return {
            **out,
            "verb": self.verb,
            "dialect": self.dialect,
            "env": {name: text for name, text in self.env.items() if name not in SECRET_VARIABLES},
            "tessera_version": __version__,
        }

    def describe(self) -> str:
        """One line per room with the values that are not defaults, each followed by where it came from."""
        lines = []
        for room in ROOM_CLASSES:
            shown = [
                f"{name}={value}" + (f" ({origin})" if (origin := self.provenance[name]) != "flag" else "")
                for name, value in self.values().items()
                if BY_NAME[name].room == room and self.provenance[name] != "default" and not BY_NAME[name].secret
            ]
            if shown:
                lines.append(f"{room:<9} {'  '.join(shown)}")
        return "\n".join(lines)
