"""NVLM-D: InternViT-6B and a Qwen2 or Llama decoder, with a tag in front of every tile of an image.

The tower's checkpoint has 32 attention heads for 25: seven *dummies*, all zero, so that eight ranks can share them.
The projector is as wide inside as the decoder's MLP and has no biases. Tensors are called and fused as in
``internvl_chat``; in memory they are named as in ``internvl``.

An image is written ``<Image>``, then for each tile its tag and its features, then ``</Image>`` and a newline. The model
was trained with every tag a text of its own: five tokens and 256 features, 261 for each tile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from tessera.contract.model import Family, Geometry, HFConfig
from tessera.models.families import internvl, internvl_chat, qwen2
from tessera.models.families.common import normalisation
from tessera.models.layers import activation
from tessera.models.tiled import TaggedGeometry, TiledConfig

PADS = ("<|vision_pad|>", "<image>")
"""Tokens that stand for a feature: of the checkpoints on the hub, and of tokenizers prepared for training."""

TAGS = {"llama": "<tile_global>"}
"""The thumbnail's tag by the decoder's ``model_type``, where it is not ``<tile_global_thumbnail>``."""


def tower(config: HFConfig) -> TiledConfig:
    """The vision tower, with as many dummies as make the number of heads a multiple of eight."""
    seeing = internvl_chat.tower(config)
    return replace(seeing, dummies=config["vision_config"].get("num_dummy_heads", -seeing.heads % 8))


def build(config: HFConfig) -> nn.Module:
    """The module on the current default device."""
    text = internvl_chat.decoder(config)
    return internvl.assembled(tower(config), text, activation("gelu"), inner=text["intermediate_size"], bias=False)


def geometry(config: HFConfig, preprocessor: Mapping[str, Any]) -> Geometry:
    """Geometry from ``config.json``, which says how images are cut; the processor's file says how they are normed."""
    seeing, pad = tower(config), config.get("image_token", PADS[0])
    return TaggedGeometry(
        patch_size=seeing.patch,
        merge_size=seeing.merge,
        side=seeing.side,
        normalisation=normalisation(internvl_chat.IMAGENET | dict(preprocessor)),
        pad_ids={"image": config["image_token_id"]},
        placeholder={"image": f"<Image>{pad}</Image>"},
        behind="\n",
        resize="pil",
        fewest=config.get("min_dynamic_patch", 1),
        most=config.get("max_dynamic_patch", 6),
        thumbnail=bool(config.get("use_thumbnail", True)),
        cut=bool(config.get("dynamic_image_size", True)),
        switches=internvl_chat.SWITCHES,
        pad=pad,
        last=TAGS.get(internvl_chat.decoder(config)["model_type"], "<tile_global_thumbnail>"),
    )


def tiny() -> dict[str, Any]:
    """``config.json`` of a small random instance: tiles of 4 x 4 patches, two heads and six dummies."""
    return {
        "architectures": ["NVLM_D"],
        "model_type": "NVLM_D",
        "image_token_id": 5,
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 56,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 6,
        "use_thumbnail": True,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "chatml",
        "tie_word_embeddings": False,
        "llm_config": qwen2.tiny() | {"tie_word_embeddings": False},
        "vision_config": internvl_chat.tiny_tower(),
    }


FAMILY = Family(
    name="nvlm_d",
    model_types=("NVLM_D",),
    build=build,
    geometry=geometry,
    plan=internvl.plan,
    weightmap=internvl_chat.weightmap,
    tiny=tiny,
    tokens={"image_token": PADS},
)
