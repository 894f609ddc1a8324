"""Qwen3 (text, dense): norms on queries and keys instead of biases, and a head size of its own."""

from __future__ import annotations

from typing import Any

from tessera.contract.model import HFConfig
from tessera.models.decoder import DecoderConfig
from tessera.models.families.common import decoder_config, rope_config, text_family, tied


def decoder(config: HFConfig) -> DecoderConfig:
    """Our values for a ``config.json`` of model type ``qwen3``."""
    bias = bool(config.get("attention_bias", False))
    rope = rope_config(config, theta=10000.0)
    return decoder_config(
        {"head_dim": 128, **config}, rope, tie=tied(config), qkv_bias=bias, out_bias=bias, mlp_bias=False, qk_norm=True
    )


def tiny() -> dict[str, Any]:
    """``config.json`` of a small random instance."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "initializer_range": 0.05,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


FAMILY = text_family("qwen3", decoder, tiny)
