"""Qwen3-MoE (text): Qwen3's block with many small experts in place of most MLPs, softmax routing.

Checkpoints on the hub hold every expert's three matrices as tensors of their own; transformers may also write them
stacked, as they are in memory. Both are read, and written back as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tessera.contract.model import HFConfig
from tessera.contract.weightmap import WeightMap
from tessera.models.decoder import DecoderConfig
from tessera.models.families.common import (
    decoder_config,
    expert_stacks,
    rope_config,
    stepped_layers,
    text_family,
    text_weights,
    tied,
)
from tessera.models.moe import MoEConfig


def experts(text: HFConfig, *, normalise: bool) -> MoEConfig:
    """The sparse layers of a decoder config; transformers has called the number of experts by two names."""
    return MoEConfig(
        experts=text["num_experts"] if "num_experts" in text else text["num_local_experts"],
        top_k=text["num_experts_per_tok"],
        inner=text["moe_intermediate_size"],
        layers=stepped_layers(text),
        normalise=normalise,
    )


def decoder(config: HFConfig) -> DecoderConfig:
    """Our values for a ``config.json`` of model type ``qwen3_moe``."""
    bias = bool(config.get("attention_bias", False))
    return decoder_config(
        config,
        rope_config(config, theta=10000.0),
        tie=tied(config),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=False,
        qk_norm=True,
        moe=experts(config, normalise=bool(config.get("norm_topk_prob", False))),
    )


def weightmap(config: HFConfig, disk_names: Sequence[str]) -> WeightMap:
    """A text model's names, with the experts one by one or stacked."""
    return replace(text_weights(config, disk_names), stacks=expert_stacks("model", disk_names))


def tiny() -> dict[str, Any]:
    """``config.json`` of a small random instance; its first layer is dense."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 48,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "router_aux_loss_coef": 0.001,
        "initializer_range": 0.05,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


FAMILY = text_family("qwen3_moe", decoder, tiny, weightmap)
