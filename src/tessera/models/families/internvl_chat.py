"""InternVL 2.5, 3 and 3.5 as their own repositories hold them: the same model as ``internvl`` under other names.

These checkpoints come with modelling code of their own (``InternVLChatModel``). Their tensors are ``vision_model.*``,
``mlp1.*`` and ``language_model.*``, with queries, keys and values of the tower fused; how images are cut stands in
``config.json``; and the id of the token that stands for an image stands in the tokenizer alone. In memory, and so in
adapters, names are those of ``internvl``. A chat template of theirs prints text only, so an image is written into the
text of its message: ``<img>``, the features, ``</img>`` and a newline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from tessera.config.errors import UserError
from tessera.contract.model import Family, Geometry, HFConfig
from tessera.contract.weightmap import Fuse, Rename, Tie, WeightMap
from tessera.models.families import internvl, qwen3
from tessera.models.families.common import expert_stacks, normalisation
from tessera.models.layers import activation
from tessera.models.tiled import Switches, TiledConfig, TiledGeometry

IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
"""Pixel normalisation where the checkpoint has no ``preprocessor_config.json``."""

ARCHITECTURES = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "LlamaForCausalLM": "llama",
}
"""``model_type`` of an ``llm_config`` that names its architecture only."""

SWITCHES = Switches("config.json", "min_dynamic_patch", "max_dynamic_patch", "dynamic_image_size")

_TOWER, _DISK, _LAYER = "model.vision_tower", "vision_model", "model.vision_tower.encoder.layer.*"
_PARTS = {
    "attention.projection_layer.**": "attn.proj.**",
    "attention.q_norm.**": "attn.q_norm.**",
    "attention.k_norm.**": "attn.k_norm.**",
    "attention.qkv.**": "attn.qkv.**",
    "mlp.**": "mlp.**",
    "layernorm_before.**": "norm1.**",
    "layernorm_after.**": "norm2.**",
    "lambda_1": "ls1",
    "lambda_2": "ls2",
}
RENAMES = (
    *(Rename(f"{_LAYER}.{ours}", f"{_DISK}.encoder.layers.*.{disk}") for ours, disk in _PARTS.items()),
    Rename(f"{_TOWER}.embeddings.cls_token", f"{_DISK}.embeddings.class_embedding"),
    Rename(f"{_TOWER}.embeddings.position_embeddings", f"{_DISK}.embeddings.position_embedding"),
    Rename(f"{_TOWER}.embeddings.patch_embeddings.projection.**", f"{_DISK}.embeddings.patch_embedding.**"),
    Rename("model.multi_modal_projector.layer_norm.**", "mlp1.0.**"),
    Rename("model.multi_modal_projector.linear_1.**", "mlp1.1.**"),
    Rename("model.multi_modal_projector.linear_2.**", "mlp1.3.**"),
    Rename("model.language_model.**", "language_model.model.**"),
    Rename("lm_head.**", "language_model.lm_head.**"),
)
FUSES = tuple(
    Fuse(tuple(f"{_LAYER}.attention.{part}_proj.{leaf}" for part in "qkv"), f"{_LAYER}.attention.qkv.{leaf}")
    for leaf in ("weight", "bias")
)


def decoder(config: HFConfig) -> dict[str, Any]:
    """The decoder's config; its ``model_type`` may have to be read off its architecture."""
    text = dict(config["llm_config"])
    names = text.get("architectures") or [""]
    text.setdefault("model_type", ARCHITECTURES.get(names[0], names[0]))
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    return {**text, "tie_word_embeddings": bool(tied)}


def tower(config: HFConfig) -> TiledConfig:
    """The vision tower; the values of its own code where the config is silent."""
    vision = config["vision_config"]
    side = vision.get("image_size", 224)
    refused = {
        "select_layer": config.get("select_layer", -1) != -1,
        "ps_version": config.get("ps_version", "v1") != "v2",
        "pad2square": bool(config.get("pad2square")),
        "force_image_size": (config.get("force_image_size") or side) != side,
    }
    for name in (name for name, wrong in refused.items() if wrong):
        raise UserError(f"config.json: this value of {name} is not supported by this family")
    # Stochastic depth (drop_path_rate) is a choice of whoever trains, not of the model; nobody asked for it here.
    native = {
        "num_hidden_layers": vision.get("num_hidden_layers", 48),
        "hidden_size": vision.get("hidden_size", 3200),
        "intermediate_size": vision.get("intermediate_size", 12800),
        "num_attention_heads": vision.get("num_attention_heads", 25),
        "patch_size": vision.get("patch_size", 14),
        "image_size": side,
        "norm_type": vision.get("norm_type", "rms_norm"),
        "layer_norm_eps": vision.get("layer_norm_eps", 1e-6),
        "hidden_act": vision.get("hidden_act", "gelu"),
        "attention_bias": vision.get("qkv_bias", False),
        "use_qk_norm": vision.get("qk_normalization", True),
        "num_channels": vision.get("num_channels", 3),
        "attention_dropout": vision.get("attention_dropout", 0.0),
        "hidden_dropout_prob": vision.get("dropout", 0.0),
    }
    whole = {"vision_config": native, "downsample_ratio": config.get("downsample_ratio", 0.5)}
    return replace(internvl.tiled(whole), qk_eps=native["layer_norm_eps"])


def build(config: HFConfig) -> nn.Module:
    """The module on the current default device."""
    return internvl.assembled(tower(config), decoder(config), activation("gelu"))


def geometry(config: HFConfig, preprocessor: Mapping[str, Any]) -> Geometry:
    """Geometry from ``config.json``, which says how images are cut; the processor's file says how they are normed."""
    seeing = tower(config)
    return TiledGeometry(
        patch_size=seeing.patch,
        merge_size=seeing.merge,
        side=seeing.side,
        normalisation=normalisation(IMAGENET | dict(preprocessor)),
        pad_ids={"image": config["image_token_id"]},
        placeholder={"image": "<img><IMG_CONTEXT></img>"},
        behind="\n",
        resize="pil",
        fewest=config.get("min_dynamic_patch", 1),
        most=config.get("max_dynamic_patch", 6),
        thumbnail=bool(config.get("use_thumbnail", False)),
        cut=bool(config.get("dynamic_image_size", False)),
        switches=SWITCHES,
    )


def weightmap(config: HFConfig, disk_names: Sequence[str]) -> WeightMap:
    """Rules for these names; the experts of a sparse decoder lie one by one."""
    text, head = decoder(config), "language_model.lm_head.weight"
    copy = text["tie_word_embeddings"] and head in disk_names
    return WeightMap(
        RENAMES,
        (Tie("model.language_model.embed_tokens.weight", head),) if copy else (),
        ignored=("language_model.model.layers.*.self_attn.rotary_emb.inv_freq",),
        stacks=expert_stacks("model.language_model", disk_names) if text["model_type"] == "qwen3_moe" else (),
        fuses=FUSES,
    )


def tiny() -> dict[str, Any]:
    """``config.json`` of a small random instance: tiles of 4 x 4 patches, a dense decoder."""
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "image_token_id": 5,
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 56,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 4,
        "use_thumbnail": True,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "tie_word_embeddings": False,
        "llm_config": qwen3.tiny(),
        "vision_config": tiny_tower(),
    }


def tiny_tower() -> dict[str, Any]:
    """``vision_config`` of a small tower with every option of the large one."""
    return {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "hidden_act": "gelu",
        "norm_type": "rms_norm",
        "layer_norm_eps": 1e-6,
        "qk_normalization": True,
        "qkv_bias": False,
        "image_size": 56,
        "patch_size": 14,
        "initializer_factor": 0.1,
        "initializer_range": 0.05,
    }


FAMILY = Family(
    name="internvl_chat",
    model_types=("internvl_chat",),
    build=build,
    geometry=geometry,
    plan=internvl.plan,
    weightmap=weightmap,
    tiny=tiny,
    tokens={"image_token": ("<IMG_CONTEXT>",)},
)
