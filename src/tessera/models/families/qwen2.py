"""Qwen2 and Qwen2.5 (text): Llama's block with biases on queries, keys and values."""

from __future__ import annotations

from typing import Any

from tessera.contract.model import HFConfig
from tessera.models.decoder import DecoderConfig
from tessera.models.families.common import decoder_config, rope_config, text_family, tied


def decoder(config: HFConfig) -> DecoderConfig:
    """Our values for a ``config.json`` of model type ``qwen2``."""
    rope = rope_config(config, theta=10000.0)
    return decoder_config(config, rope, tie=tied(config), qkv_bias=True, out_bias=False, mlp_bias=False, qk_norm=False)


def tiny() -> dict[str, Any]:
    """``config.json`` of a small random instance with a tied head."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


FAMILY = text_family("qwen2", decoder, tiny)
