"""Flags of Megatron's command lines that need no counterpart here, each with the reason.

A script written for Megatron describes the architecture that it loads, switches on kernels and communication one by
one, and says how its data loader and its log work. Here the first comes from ``config.json``, the second is always on,
the third has its own flags. Such a flag is taken so that the script runs as written, and the reason is said once, on
the console. What would change a result and cannot be done here is *not* in this table: it is refused like any unknown
name. The one exception is dropout of activations, whose reason says so.

The table is by reason; :func:`rows` turns it into (name, kind, reason) for ``flags.py``. Kinds are the table's: b(ool),
i(nt), f(loat), s(tr), l(ist).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

AcceptedKind = Literal["bool", "int", "float", "str", "list"]
KINDS: Mapping[str, AcceptedKind] = {"b": "bool", "i": "int", "f": "float", "s": "str", "l": "list"}

REASONS: Mapping[str, Mapping[str, str]] = {
    "the architecture is read from the model's config.json": {
        "b": "swiglu group_query_attention untie_embeddings_and_output_weights disable_bias_linear add_qkv_bias "
        "qk_layernorm use_rotary_position_embeddings moe_router_enable_expert_bias moe_router_pre_softmax "
        "multi_latent_attention disable_vision_class_token pixel_shuffle",
        "i": "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels "
        "max_position_embeddings num_experts moe_router_topk moe_ffn_hidden_size vocab_size extra_vocab_size patch_dim "
        "img_h img_w moe_shared_expert_intermediate_size rotary_seq_len_interpolation_factor",
        "f": "norm_epsilon rotary_base rotary_percent moe_router_topk_scaling_factor",
        "s": "normalization position_embedding_type moe_layer_freq moe_router_score_function rope_scaling "
        "vision_model_type language_model_type model_size image_tag_type",
        "l": "mrope_section",
    },
    "the model is loaded, not initialised": {
        "b": "no_initialization use_cpu_initialization auto_detect_ckpt_format exit_on_missing_checkpoint "
        "load_safetensors use_checkpoint_args",
        "f": "init_method_std",
    },
    "--load takes weights only; --resume_from_checkpoint goes on with a run, as it was": {
        "b": "finetune no_load_optim no_load_rng",
    },
    "the state of random generators is part of what --no_save_optim leaves out": {"b": "no_save_rng"},
    "this engine trains without dropout of activations": {"f": "attention_dropout hidden_dropout"},
    "attention is always packed and exact, on the fastest kernel of the device": {
        "b": "use_flash_attn no_masked_softmax_fusion attention_softmax_in_fp32 apply_query_key_layer_scaling "
        "reset_position_ids reset_attention_mask no_create_attention_mask_in_dataloader",
        "s": "attention_backend",
    },
    "layers are PyTorch's own, fused where that is faster": {
        "b": "use_te no_bias_dropout_fusion no_bias_swiglu_fusion no_rope_fusion no_gradient_accumulation_fusion",
        "s": "transformer_impl cross_entropy_fusion_impl",
    },
    "communication runs beside computation wherever it can": {
        "b": "overlap_grad_reduce overlap_param_gather tp_comm_overlap overlap_p2p_communication "
        "overlap_moe_expert_parallel_comm",
    },
    "experts are never cut, only divided among ranks, tensor ranks included": {"i": "expert_tensor_parallel_size"},
    "experts get their tokens in one exchange that drops none": {
        "b": "moe_enable_deepep",
        "s": "moe_token_dispatcher_type moe_token_drop_policy",
    },
    "the scores of a router are float32": {"s": "moe_router_dtype"},
    "the balance loss is over the whole global batch": {"s": "moe_router_load_balancing_type"},
    "the loss of a step is the mean over all its trained tokens": {"b": "calculate_per_token_loss eod_mask_loss"},
    "masters, gradients and moments are float32": {
        "b": "use_precision_aware_optimizer",
        "s": "main_grads_dtype main_params_dtype exp_avg_dtype exp_avg_sq_dtype",
    },
    "float8 products are scaled by the values at hand, without a history": {
        "b": "fp8_param_gather",
        "i": "fp8_amax_history_len",
        "s": "fp8_recipe fp8_amax_compute_algo",
    },
    "rows are rendered by the checkpoint's own tokenizer and chat template": {
        "s": "tokenizer_type tokenizer_prompt_format patch_tokenizer_type prompt_path",
    },
    "rows are read by index, in the order that --data_seed decides": {
        "s": "dataloader_type dataloader_save",
        "b": "mlp_padding_free",
        "i": "max_padding_length",
    },
    "every log line holds it, or the run's page": {
        "b": "log_params_norm log_throughput log_num_zeros_in_grad log_timers_to_tensorboard "
        "no_log_learning_rate_to_tensorboard log_validation_ppl_to_tensorboard log_memory_to_tensorboard",
        "i": "tensorboard_log_interval tensorboard_queue_size timing_log_level",
        "s": "logging_level wandb_save_dir",
    },
    "Python and the scheduler decide when memory is collected and when a job ends": {
        "b": "manual_gc",
        "i": "manual_gc_interval exit_duration_in_mins",
    },
    "NCCL on GPUs, gloo on CPUs; --ddp_timeout says when a standstill ends": {
        "s": "distributed_backend",
        "i": "distributed_timeout_minutes",
    },
}  # fmt: skip


def rows() -> Iterator[tuple[str, AcceptedKind, str]]:
    """(name, kind, reason) of every accepted flag."""
    for reason, kinds in REASONS.items():
        for kind, names in kinds.items():
            for name in names.split():
                yield name, KINDS[kind], reason
