"""InternVL 3 and 3.5 as transformers names them: a tiled tower, a projector, and the decoder of another family.

Checkpoints on the hub name their tensors ``vision_tower.*``, ``multi_modal_projector.*``, ``language_model.model.*``
and ``language_model.lm_head``; transformers 5 holds, and may write, ``model.*`` and ``lm_head``. Both are read, and
written back as they were. (Releases with code of their own, ``internvl_chat``, are another layout of the same model.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from tessera.config.errors import UserError
from tessera.contract.model import Family, Geometry, HFConfig
from tessera.contract.plan import Groups, Plan
from tessera.contract.weightmap import Rename, Tie, WeightMap
from tessera.models.decoder import Decoder, DecoderConfig
from tessera.models.families import llama, qwen2, qwen3, qwen3_moe
from tessera.models.families.common import decoder_parts, expert_stacks, normalisation, tensor_rows
from tessera.models.layers import Activation, RMSNorm, activation
from tessera.models.tiled import Projector, TiledConfig, TiledGeometry, TiledTower, TiledTrunk
from tessera.models.vlm import VLM

DECODERS: Mapping[str, Callable[[HFConfig], DecoderConfig]] = {
    "qwen2": qwen2.decoder,
    "qwen3": qwen3.decoder,
    "qwen3_moe": qwen3_moe.decoder,
    "llama": llama.decoder,
}
"""Language models by the ``model_type`` of ``text_config``."""

RENAMES = (
    Rename("model.language_model.**", "language_model.model.**"),
    Rename("lm_head.**", "language_model.lm_head.**"),
    Rename("model.vision_tower.**", "vision_tower.**"),
    Rename("model.multi_modal_projector.**", "multi_modal_projector.**"),
)


def _side(size: Any) -> int:
    """One number, where a config may hold it twice."""
    sides = set(size) if isinstance(size, list | tuple) else {size}
    if len(sides) != 1:
        raise UserError(f"config.json: tiles and patches of a tower must be square, not {size}")
    return int(sides.pop())


def _merge(config: HFConfig) -> int:
    return int(1 / config.get("downsample_ratio", 0.5))


def tiled(config: HFConfig) -> TiledConfig:
    """The vision tower of a ``config.json``; transformers' values where it is silent."""
    vision = config["vision_config"]
    refused = {
        "vision_feature_layer": config.get("vision_feature_layer", -1) != -1,
        "vision_feature_select_strategy": config.get("vision_feature_select_strategy", "default") != "default",
        "projection_dropout": bool(vision.get("projection_dropout")),
        "hidden_dropout_prob": bool(vision.get("hidden_dropout_prob")),
        "attention_dropout": bool(vision.get("attention_dropout")),
    }
    for name in (name for name, wrong in refused.items() if wrong):
        raise UserError(f"config.json: this value of {name} is not supported by this family")
    eps, rms = vision.get("layer_norm_eps", 1e-6), vision.get("norm_type", "layer_norm") == "rms_norm"
    return TiledConfig(
        depth=vision.get("num_hidden_layers", 24),
        hidden=vision.get("hidden_size", 1024),
        inner=vision.get("intermediate_size", 4096),
        heads=vision.get("num_attention_heads", 16),
        patch=_side(vision.get("patch_size", 14)),
        side=_side(vision.get("image_size", 448)),
        merge=_merge(config),
        norm=lambda size: RMSNorm(size, eps) if rms else nn.LayerNorm(size, eps=eps),
        act=activation(vision.get("hidden_act", "gelu")),
        qkv_bias=bool(vision.get("attention_bias", False)),
        qk_norm=bool(vision.get("use_qk_norm", False)),
        final_norm=not vision.get("use_mean_pooling", True),
        table=bool(vision.get("use_absolute_position_embeddings", True)),
        mask_token=bool(vision.get("use_mask_token", False)),
        channels=vision.get("num_channels", 3),
    )


def assembled(
    seeing: TiledConfig, text: HFConfig, act: Activation, inner: int | None = None, bias: bool = True
) -> nn.Module:
    """Tower, projector (see :class:`~tessera.models.tiled.Projector`) and the decoder of ``text``."""
    kind = text.get("model_type", "qwen2")
    if kind not in DECODERS:
        raise UserError(f"config.json: a language model of type {kind!r} is not supported ({', '.join(DECODERS)})")
    wide = seeing.hidden * seeing.merge**2

    def trunk(decoder: Decoder) -> TiledTrunk:
        projector = Projector(wide, decoder.config.hidden, act, inner, bias)
        return TiledTrunk(TiledTower(seeing), projector, decoder)

    return VLM(DECODERS[kind](text), trunk=trunk)


def build(config: HFConfig) -> nn.Module:
    """The module on the current default device."""
    act = activation(config.get("projector_hidden_act", "gelu"))
    return assembled(tiled(config), {**config["text_config"], "tie_word_embeddings": _tied(config)}, act)


def _tied(config: HFConfig) -> bool:
    return bool(config.get("tie_word_embeddings", True))


def geometry(config: HFConfig, preprocessor: Mapping[str, Any]) -> Geometry:
    """Geometry from both configs; the processor cuts into tiles unless told not to."""
    vision = config["vision_config"]
    side = _side(vision.get("image_size", 448))
    size = preprocessor.get("size") or {"height": side, "width": side}
    if (size.get("height"), size.get("width")) != (side, side):
        raise UserError(f"preprocessor_config.json: size {size} is not the {side} pixels of the tower's image_size")
    return TiledGeometry(
        patch_size=_side(vision.get("patch_size", 14)),
        merge_size=_merge(config),
        side=side,
        normalisation=normalisation(preprocessor),
        pad_ids={"image": config.get("image_token_id", 151667)},
        placeholder={"image": "<img><IMG_CONTEXT></img>"},
        behind="\n",
        fewest=preprocessor.get("min_patches", 1),
        most=preprocessor.get("max_patches", 12),
        cut=bool(preprocessor.get("crop_to_patches", True)),
    )


def plan(config: HFConfig) -> Plan:
    """Where the model is cut."""
    return Plan(
        Groups(
            llm=("model.language_model", "lm_head"),
            aligner=("model.multi_modal_projector",),
            vit=("model.vision_tower",),
        ),
        fsdp_units=("model.language_model.layers.*", "model.vision_tower.encoder.layer.*"),
        recompute_decoder=("model.language_model.layers.*",),
        recompute_tower=("model.vision_tower.encoder.layer.*",),
        tensor=tensor_rows("model.language_model"),
        recompute_modules=decoder_parts("model.language_model.layers.*"),
        experts=("model.language_model.layers.*.mlp.experts",),
    )


def weightmap(config: HFConfig, disk_names: Sequence[str]) -> WeightMap:
    """Rules for whichever of the two namings the checkpoint uses."""
    new = any(name.startswith("model.") for name in disk_names)
    head = "lm_head.weight" if new else "language_model.lm_head.weight"
    copy = (Tie("model.language_model.embed_tokens.weight", head),) if _tied(config) and head in disk_names else ()
    sparse = config["text_config"].get("model_type") == "qwen3_moe"
    stacks = expert_stacks("model.language_model", disk_names) if sparse else ()
    return WeightMap(() if new else RENAMES, copy, stacks=stacks)


def tiny() -> dict[str, Any]:
    """``config.json`` of a small random instance: tiles of 4 x 4 patches, a dense decoder."""
    text = qwen3.tiny()
    del text["architectures"]
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "image_token_id": 5,
        "image_seq_length": 4,
        "downsample_ratio": 0.5,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": {
            "model_type": "internvl_vision",
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "hidden_act": "gelu",
            "attention_bias": True,
            "use_qk_norm": False,
            "norm_type": "layer_norm",
            "layer_norm_eps": 1e-6,
            "image_size": [56, 56],
            "patch_size": [14, 14],
            "num_channels": 3,
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": True,
            "layer_scale_init_value": 0.1,
            "initializer_range": 0.05,
        },
    }


FAMILY = Family(
    name="internvl",
    model_types=("internvl",),
    build=build,
    geometry=geometry,
    plan=plan,
    weightmap=weightmap,
    tiny=tiny,
)
