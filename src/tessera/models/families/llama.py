"""Llama 2, 3 and everything that uses its block: no biases, RoPE, optionally Llama 3's frequency scaling."""

from __future__ import annotations

from typing import Any

from tessera.contract.model import HFConfig
from tessera.models.decoder import DecoderConfig
from tessera.models.families.common import decoder_config, rope_config, text_family, tied


def decoder(config: HFConfig) -> DecoderConfig:
    """Our values for a ``config.json`` of model type ``llama``."""
    bias = bool(config.get("attention_bias", False))
    return decoder_config(
        config,
        rope_config(config, theta=10000.0),
        tie=tied(config),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=False,
    )


def tiny() -> dict[str, Any]:
    """``config.json`` of a small random instance with Llama 3.1's rope scaling."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "tie_word_embeddings": False,
        "initializer_range": 0.05,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


FAMILY = text_family("llama", decoder, tiny)
