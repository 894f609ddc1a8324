"""GLM-4.5V: sigmoid-routed experts beside a shared one, rotary positions on half of each head, a tower of its own.

The tower is the common one with more at both ends: patches are normed and get a learned position, interpolated
bicubically from a square table; behind the blocks come a norm, a strided convolution that turns ``merge^2`` patches
into one token, and a gated MLP. The decoder's first layers are dense; in the others a correction bias, which is a
float32 buffer and not trained by gradients, takes part in choosing experts but not in weighing them.

Checkpoints hold every expert's three matrices as tensors of their own; transformers may also write them stacked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.contract.batch import Grid, Media, Segments
from tessera.contract.model import Family, HFConfig
from tessera.contract.model import Geometry as GeometryOf
from tessera.contract.weightmap import WeightMap
from tessera.models.families.common import (
    axial_theta,
    decoder_config,
    expert_stacks,
    normalisation,
    rope_config,
    text_config,
    tied,
    ties,
    vlm_plan,
)
from tessera.models.geometry import PatchGeometry, smart_resize
from tessera.models.layers import Embedding, GatedMLP, RMSNorm
from tessera.models.moe import MoEConfig
from tessera.models.tower import Tower, TowerConfig
from tessera.models.vlm import VLM


class Merger(GatedMLP):
    """Projection, norm and gated MLP on ``[V, H]``."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__(size, inner, bias=False)
        self.proj = nn.Linear(size, size, bias=False)
        self.post_projection_norm = nn.LayerNorm(size)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.gelu(self.post_projection_norm(self.proj(x))))


class PositionTable(nn.Module):
    """``side * side`` learned positions, sampled anywhere: ``points [P, 2]`` (x, y in -1 .. 1) to ``[P, E]``."""

    def __init__(self, side: int, size: int) -> None:
        super().__init__()
        self.side = side
        self.position_embedding = Embedding(side * side, size)

    def forward(self, points: Tensor) -> Tensor:
        table = self.position_embedding.weight.float().t().view(1, -1, self.side, self.side)
        found = F.grid_sample(table, points[None, :, None], mode="bicubic", padding_mode="border", align_corners=False)
        return found[0, :, :, 0].t()


class MoreTower(Tower):
    """The common tower with this family's two ends."""

    def __init__(self, config: TowerConfig, out: int, side: int) -> None:
        super().__init__(config)
        self.embeddings = PositionTable(side, config.hidden)
        self.post_conv_layernorm = config.norm(config.hidden)
        self.post_layernorm = config.norm(config.hidden)
        self.downsample = nn.Conv2d(config.hidden, out, kernel_size=config.merge, stride=config.merge)

    def embedded(self, media: Media) -> Tensor:
        """Patches ``[P, E]``, normed, with their positions."""
        x: Tensor = self.post_conv_layernorm(super().embedded(media))
        return x + self.embeddings(media.tower["interp_points"]).to(x.dtype)

    def merged(self, x: Tensor) -> Tensor:
        """``[P, E]`` to ``[P / merge^2, H]``; a convolution whose stride is its kernel is a product."""
        kernel = self.downsample.weight.permute(0, 2, 3, 1).flatten(1)
        cells = self.post_layernorm(x).view(-1, kernel.shape[1])
        return super().merged(F.linear(cells, kernel, self.downsample.bias))


@dataclass(slots=True)
class Geometry(PatchGeometry):
    """The common geometry with this family's resize rule and sampling points; images only.

    Pixel bounds count an image as often as a temporal patch shows it, as the family's own processor does.
    """

    def resized(self, height: int, width: int, frames: int = 1) -> tuple[int, int]:
        """(height, width) in pixels after the resize rule; images smaller than one token are enlarged first."""
        if 0 < min(height, width) < self.factor:
            scale = max(self.factor / height, self.factor / width)
            height, width = int(height * scale), int(width * scale)
        shown = self.temporal_patch_size
        return smart_resize(height, width, self.factor, self.min_pixels // shown, self.max_pixels // shown)

    def tower_inputs(self, grids: Sequence[Grid]) -> tuple[dict[str, Tensor], dict[str, Segments]]:
        """As usual, and ``interp_points [P, 2] float32``: x and y of each patch's centre, the image being -1 .. 1."""
        tensors, segments = PatchGeometry.tower_inputs(self, grids)
        counts = torch.tensor([t * h * w for t, h, w in grids])
        sides = torch.tensor([[h, w] for _, h, w in grids], dtype=torch.float32).repeat_interleave(counts, dim=0)
        tensors["interp_points"] = (((tensors["position_ids"] + 0.5) / sides) * 2 - 1).flip(-1)
        return tensors, segments


def tower(vision: Mapping[str, Any]) -> Tower:
    """The vision tower of a ``vision_config``; transformers' values where it is silent."""
    size, out, patch = (
        vision.get("hidden_size", 1536),
        vision.get("out_hidden_size", 4096),
        vision.get("patch_size", 14),
    )
    eps, bias = vision.get("rms_norm_eps", 1e-5), bool(vision.get("attention_bias", False))
    config = TowerConfig(
        depth=vision.get("depth", 24),
        hidden=size,
        heads=vision.get("num_heads", 12),
        patch=patch,
        temporal=vision.get("temporal_patch_size", 2),
        channels=vision.get("in_channels", 3),
        merge=vision.get("spatial_merge_size", 2),
        norm=lambda width: RMSNorm(width, eps=eps),
        mlp=lambda: GatedMLP(size, out, bias=False),
        merger=lambda _: Merger(out, vision.get("intermediate_size", 13696)),
        patch_bias=True,
        qkv_bias=bias,
        out_bias=False,
        theta=axial_theta(vision),
    )
    return MoreTower(config, out, vision.get("image_size", 336) // patch)


def experts(text: HFConfig) -> MoEConfig:
    """The sparse layers of a decoder config: all behind the first ``first_k_dense_replace``."""
    inner = text.get("moe_intermediate_size", 1408)
    return MoEConfig(
        experts=text.get("n_routed_experts", 128),
        top_k=text.get("num_experts_per_tok", 8),
        inner=inner,
        layers=frozenset(range(text.get("first_k_dense_replace", 1), text["num_hidden_layers"])),
        scoring="sigmoid",
        normalise=bool(text.get("norm_topk_prob", True)),
        scale=float(text.get("routed_scaling_factor", 1.0)),
        groups=text.get("n_group", 1),
        top_groups=text.get("topk_group", 1),
        shared=inner * text.get("n_shared_experts", 1),
    )


def build(config: HFConfig) -> nn.Module:
    """The module on the current default device."""
    text = {"rms_norm_eps": 1e-5, **text_config(config)}
    decoder = decoder_config(
        text,
        rope_config(text, theta=10000.0, sections=(8, 12, 12), partial=0.5),
        tie=tied(config),
        qkv_bias=bool(text.get("attention_bias", True)),
        out_bias=False,
        mlp_bias=False,
        qk_norm=False,
        moe=experts(text),
    )
    return VLM(decoder, tower(config["vision_config"]))


def geometry(config: HFConfig, preprocessor: Mapping[str, Any]) -> GeometryOf:
    """Geometry from both configs."""
    vision = config["vision_config"]
    size = preprocessor.get("size") or {}
    return Geometry(
        patch_size=vision.get("patch_size", 14),
        merge_size=vision.get("spatial_merge_size", 2),
        temporal_patch_size=vision.get("temporal_patch_size", 2),
        normalisation=normalisation(preprocessor),
        pad_ids={"image": config.get("image_token_id", 151363)},
        placeholder={"image": "<|begin_of_image|><|image|><|end_of_image|>"},
        min_pixels=preprocessor.get("min_pixels") or size.get("shortest_edge", 112 * 112),
        max_pixels=preprocessor.get("max_pixels") or size.get("longest_edge", 28 * 28 * 15000),
    )


def weightmap(config: HFConfig, disk_names: Sequence[str]) -> WeightMap:
    """Names are the same on disk and in memory, but for the experts; a layer past the last predicts further tokens."""
    decoder = "model.language_model"
    return WeightMap(
        ties=ties(config, f"{decoder}.embed_tokens.weight", disk_names),
        stacks=expert_stacks(decoder, disk_names),
        ignored=(f"{decoder}.layers.{text_config(config)['num_hidden_layers']}.**",),
    )


def tiny() -> dict[str, Any]:
    """``config.json`` of a small random instance with one dense layer and four groups of experts."""
    return {
        "architectures": ["Glm4vMoeForConditionalGeneration"],
        "model_type": "glm4v_moe",
        "image_start_token_id": 3,
        "image_end_token_id": 4,
        "image_token_id": 5,
        "video_token_id": 6,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "glm4v_moe_text",
            "vocab_size": 256,
            "hidden_size": 64,
            "intermediate_size": 128,
            "moe_intermediate_size": 48,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.5,
            "first_k_dense_replace": 1,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "hidden_act": "silu",
            "attention_bias": True,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 0.5,
            "rope_theta": 10000.0,
            "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]},
            "initializer_range": 0.05,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "vision_config": {
            "model_type": "glm4v_moe_vision",
            "depth": 3,
            "hidden_size": 32,
            "hidden_act": "silu",
            "intermediate_size": 96,
            "num_heads": 2,
            "in_channels": 3,
            "image_size": 112,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 64,
            "attention_bias": False,
            "rms_norm_eps": 1e-5,
            "initializer_range": 0.05,
        },
    }


FAMILY = Family(
    name="glm4v_moe",
    model_types=("glm4v_moe",),
    build=build,
    geometry=geometry,
    plan=lambda config: vlm_plan(["model.visual.merger"]),
    weightmap=weightmap,
    tiny=tiny,
)
