"""Qwen3-VL-MoE: Qwen3-VL's tower, deepstack and interleaved m-RoPE around Qwen3-MoE's decoder.

Experts are stacked on disk as they are in memory, but checkpoints on the hub hold them as ``[E, H, 2I]`` and
``[E, I, H]``, the transpose of what transformers 5 keeps in memory and writes. The names are the same, so the shapes
decide; where one of the two tensors is square (H = 2I) the other one tells. A checkpoint that is written without a
source to follow gets the hub's layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from tessera.contract.model import Family, HFConfig
from tessera.contract.weightmap import Turn, WeightMap
from tessera.models.families import qwen3_vl
from tessera.models.families.common import decoder_config, rope_config, text_config, tied, ties, vlm_plan
from tessera.models.families.qwen3_moe import experts
from tessera.models.vlm import VLM

EXPERTS = "model.language_model.layers.*.mlp.experts"


def build(config: HFConfig) -> nn.Module:
    """The module on the current default device."""
    text = text_config(config)
    bias = bool(text.get("attention_bias", False))
    decoder = decoder_config(
        text,
        rope_config(text, theta=500000.0, sections=(24, 20, 20), interleaved=True),
        tie=tied(config),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=False,
        qk_norm=True,
        moe=experts(text, normalise=True),
    )
    return VLM(decoder, qwen3_vl.tower(config["vision_config"]))


def weightmap(config: HFConfig, disk_names: Sequence[str]) -> WeightMap:
    """Names are the same on disk and in memory; the experts lie transposed, unless their shapes say otherwise."""
    return WeightMap(
        ties=ties(config, "model.language_model.embed_tokens.weight", disk_names),
        turns=(Turn((f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj")),),
    )


def tiny() -> dict[str, Any]:
    """``config.json`` of a small random instance: the dense family's, with eight experts in all layers but one."""
    dense = qwen3_vl.tiny()
    sparse = {
        "model_type": "qwen3_vl_moe_text",
        "moe_intermediate_size": 48,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": False,
    }
    return dense | {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "model_type": "qwen3_vl_moe",
        "tie_word_embeddings": False,
        "text_config": dense["text_config"] | sparse,
        "vision_config": dense["vision_config"] | {"model_type": "qwen3_vl_moe"},
    }


FAMILY = Family(
    name="qwen3_vl_moe",
    model_types=("qwen3_vl_moe",),
    build=build,
    geometry=qwen3_vl.geometry,
    plan=lambda config: vlm_plan(["model.visual.merger", "model.visual.deepstack_merger_list"]),
    weightmap=weightmap,
    tiny=tiny,
)
