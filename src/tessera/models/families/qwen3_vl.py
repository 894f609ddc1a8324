"""Qwen3-VL (dense): a tower with a learned position table, deepstack, Qwen3's decoder, interleaved m-RoPE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tessera.contract.model import Family, Geometry, HFConfig
from tessera.contract.weightmap import WeightMap
from tessera.models.families.common import decoder_config, normalisation, rope_config, text_config, tied, ties, vlm_plan
from tessera.models.geometry import PatchGeometry
from tessera.models.tower import prepare
from tessera.models.vlm import VLM


def build(config: HFConfig) -> nn.Module:
    """The module on the current default device."""
    from transformers.models.qwen3_vl import configuration_qwen3_vl, modeling_qwen3_vl

    vision = {key: value for key, value in config["vision_config"].items() if key != "model_type"}
    tower = modeling_qwen3_vl.Qwen3VLVisionModel(configuration_qwen3_vl.Qwen3VLVisionConfig(**vision))
    text = {"head_dim": 128, **text_config(config)}
    bias = bool(text.get("attention_bias", False))
    decoder = decoder_config(
        text,
        rope_config(text, theta=500000.0, sections=(24, 20, 20), interleaved=True),
        tie=tied(config),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=False,
        qk_norm=True,
    )
    return VLM(decoder, prepare(tower))


def geometry(config: HFConfig, preprocessor: Mapping[str, Any]) -> Geometry:
    """Geometry from both configs."""
    vision = config["vision_config"]
    size = preprocessor.get("size") or {}
    half = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
    return PatchGeometry(
        patch_size=vision.get("patch_size", 16),
        merge_size=vision.get("spatial_merge_size", 2),
        temporal_patch_size=vision.get("temporal_patch_size", 2),
        normalisation=normalisation({**half, **preprocessor}),
        pad_ids={"image": config.get("image_token_id", 151655), "video": config.get("video_token_id", 151656)},
        min_pixels=preprocessor.get("min_pixels") or size.get("shortest_edge", 256 * 256),
        max_pixels=preprocessor.get("max_pixels") or size.get("longest_edge", 4096 * 4096),
        table_side=int(vision.get("num_position_embeddings", 2304) ** 0.5),
        time_axis="stamps",
    )


def weightmap(config: HFConfig, disk_names: Sequence[str]) -> WeightMap:
    """Names are the same on disk and in memory."""
    return WeightMap(ties=ties(config, "model.language_model.embed_tokens.weight", disk_names))


def tiny() -> dict[str, Any]:
    """``config.json`` of a small random instance with a tied head and two deepstack levels."""
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": 5,
        "video_token_id": 6,
        "vision_start_token_id": 3,
        "vision_end_token_id": 4,
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "qwen3_vl_text",
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
            "rope_theta": 5000000.0,
            "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [6, 5, 5]},
            "tie_word_embeddings": True,
            "initializer_range": 0.05,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": 3,
            "hidden_size": 32,
            "hidden_act": "gelu_pytorch_tanh",
            "intermediate_size": 64,
            "num_heads": 2,
            "in_channels": 3,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
            "initializer_range": 0.05,
        },
    }


FAMILY = Family(
    name="qwen3_vl",
    model_types=("qwen3_vl",),
    build=build,
    geometry=geometry,
    plan=lambda config: vlm_plan(["model.visual.merger", "model.visual.deepstack_merger_list"]),
    weightmap=weightmap,
    tiny=tiny,
)
