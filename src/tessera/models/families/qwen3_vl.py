"""Qwen3-VL (dense): a tower with a learned position table, deepstack, Qwen3's decoder, interleaved m-RoPE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tessera.contract.model import Family, Geometry, HFConfig
from tessera.contract.weightmap import WeightMap
from tessera.models.families.common import (
    axial_theta,
    decoder_config,
    normalisation,
    rope_config,
    text_config,
    tied,
    ties,
    vlm_plan,
)
from tessera.models.geometry import PatchGeometry
from tessera.models.layers import MLP, activation
from tessera.models.tower import Tower, TowerConfig
from tessera.models.vlm import VLM


class Merger(nn.Module):
    """``merge^2`` patches ``[P, E]`` to one token ``[P / merge^2, H]``; normed before merging or, deepstack, after."""

    def __init__(self, size: int, merge: int, out: int, norm_merged: bool) -> None:
        super().__init__()
        self.wide = size * merge**2
        self.norm_merged = norm_merged
        self.norm = nn.LayerNorm(self.wide if norm_merged else size, eps=1e-6)
        self.linear_fc1 = nn.Linear(self.wide, self.wide)
        self.linear_fc2 = nn.Linear(self.wide, out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.view(-1, self.wide) if self.norm_merged else x).view(-1, self.wide)
        out: Tensor = self.linear_fc2(F.gelu(self.linear_fc1(x)))
        return out


def tower(vision: Mapping[str, Any]) -> Tower:
    """The vision tower of a ``vision_config``; transformers' values where it is silent."""
    size, merge = vision.get("hidden_size", 1152), vision.get("spatial_merge_size", 2)
    inner, act = vision.get("intermediate_size", 4304), activation(vision.get("hidden_act", "gelu_pytorch_tanh"))
    out = vision.get("out_hidden_size", 3584)
    return Tower(
        TowerConfig(
            depth=vision.get("depth", 27),
            hidden=size,
            heads=vision.get("num_heads", 16),
            patch=vision.get("patch_size", 16),
            temporal=vision.get("temporal_patch_size", 2),
            channels=vision.get("in_channels", 3),
            merge=merge,
            norm=lambda width: nn.LayerNorm(width, eps=1e-6),
            mlp=lambda: MLP(size, inner, act),
            merger=lambda norm_merged: Merger(size, merge, out, norm_merged),
            patch_bias=True,
            theta=axial_theta(vision),
            table=vision.get("num_position_embeddings", 2304),
            deepstack=tuple(vision.get("deepstack_visual_indexes", (8, 16, 24))),
        )
    )


def build(config: HFConfig) -> nn.Module:
    """The module on the current default device."""
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
    return VLM(decoder, tower(config["vision_config"]))


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
