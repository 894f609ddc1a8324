"""Qwen2.5-VL: a windowed tower, Qwen2's decoder, m-RoPE with chunked sections.

Checkpoints on the hub name their tensors ``visual.*`` and ``model.layers.*``; transformers 5 holds, and may write,
``model.visual.*`` and ``model.language_model.*``. Both are read, and written back as they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from tessera.contract.model import Family, Geometry, HFConfig
from tessera.contract.weightmap import Rename, WeightMap
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
from tessera.models.layers import GatedMLP, RMSNorm, activation
from tessera.models.tower import Tower, TowerConfig
from tessera.models.vlm import VLM


class Merger(nn.Module):
    """``merge^2`` patches ``[P, E]`` to one token ``[P / merge^2, H]``."""

    def __init__(self, size: int, merge: int, out: int) -> None:
        super().__init__()
        self.wide = size * merge**2
        self.ln_q = RMSNorm(size, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(self.wide, self.wide), nn.GELU(), nn.Linear(self.wide, out))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp(self.ln_q(x).view(-1, self.wide))
        return out


def tower(vision: Mapping[str, Any]) -> Tower:
    """The vision tower of a ``vision_config``; transformers' values where it is silent."""
    size, merge = vision.get("hidden_size", 3584), vision.get("spatial_merge_size", 2)
    inner, act = vision.get("intermediate_size", 3420), activation(vision.get("hidden_act", "silu"))
    return Tower(
        TowerConfig(
            depth=vision.get("depth", 32),
            hidden=size,
            heads=vision.get("num_heads", 16),
            patch=vision.get("patch_size", 14),
            temporal=vision.get("temporal_patch_size", 2),
            channels=vision.get("in_channels", 3),
            merge=merge,
            norm=lambda width: RMSNorm(width, eps=1e-6),
            mlp=lambda: GatedMLP(size, inner, bias=True, act=act),
            merger=lambda _: Merger(size, merge, vision.get("out_hidden_size", 3584)),
            patch_bias=False,
            theta=axial_theta(vision),
            whole=frozenset(vision.get("fullatt_block_indexes", (7, 15, 23, 31))),
        )
    )


def build(config: HFConfig) -> nn.Module:
    """The module on the current default device."""
    text = text_config(config)
    decoder = decoder_config(
        text,
        rope_config(text, theta=1000000.0, sections=(16, 24, 24)),
        tie=tied(config),
        qkv_bias=True,
        out_bias=False,
        mlp_bias=False,
        qk_norm=False,
    )
    return VLM(decoder, tower(config["vision_config"]))


def geometry(config: HFConfig, preprocessor: Mapping[str, Any]) -> Geometry:
    """Geometry from both configs; hub preprocessors give the pixel bounds by either of two spellings."""
    vision = config["vision_config"]
    size = preprocessor.get("size") or {}
    return PatchGeometry(
        patch_size=vision.get("patch_size", 14),
        merge_size=vision.get("spatial_merge_size", 2),
        temporal_patch_size=vision.get("temporal_patch_size", 2),
        normalisation=normalisation(preprocessor),
        pad_ids={"image": config.get("image_token_id", 151655), "video": config.get("video_token_id", 151656)},
        min_pixels=preprocessor.get("min_pixels") or size.get("shortest_edge", 56 * 56),
        max_pixels=preprocessor.get("max_pixels") or size.get("longest_edge", 28 * 28 * 1280),
        window_size=vision.get("window_size", 112),
        tokens_per_second=vision.get("tokens_per_second", 4),
    )


def weightmap(config: HFConfig, disk_names: Sequence[str]) -> WeightMap:
    """Rules for whichever of the two namings the checkpoint uses."""
    embedding = "model.language_model.embed_tokens.weight"
    if any(name.startswith("model.language_model.") for name in disk_names):
        return WeightMap(ties=ties(config, embedding, disk_names))
    renames = (Rename("model.visual.**", "visual.**"), Rename("model.language_model.**", "model.**"))
    return WeightMap(renames, ties(config, embedding, disk_names))


def tiny() -> dict[str, Any]:
    """``config.json`` of a small random instance; one of its three tower blocks attends to whole images."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
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
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "initializer_range": 0.05,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "vision_start_token_id": 3,
        "vision_end_token_id": 4,
        "image_token_id": 5,
        "video_token_id": 6,
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 3,
            "hidden_size": 32,
            "hidden_act": "silu",
            "intermediate_size": 64,
            "num_heads": 2,
            "in_channels": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.05,
        },
    }


FAMILY = Family(
    name="qwen2_5_vl",
    model_types=("qwen2_5_vl",),
    build=build,
    geometry=geometry,
    plan=lambda config: vlm_plan(["model.visual.merger"]),
    weightmap=weightmap,
    tiny=tiny,
)
