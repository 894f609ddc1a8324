"""Which families exist. One file each; the table is literal, and importing it imports no model.

To add a family, write its file (five values, see ``contract/model.py``), add its row here and run ``tests/parity``.
Any other image-text model of transformers is run whole, by the fallback.
"""

from __future__ import annotations

from importlib import import_module

from tessera.config.errors import UserError
from tessera.contract.model import Family, HFConfig

FAMILIES: dict[str, str] = {
    "qwen2_5_vl": "tessera.models.families.qwen2_5_vl:FAMILY",
    "qwen3_vl": "tessera.models.families.qwen3_vl:FAMILY",
    "qwen3_vl_moe": "tessera.models.families.qwen3_vl_moe:FAMILY",
    "glm4v_moe": "tessera.models.families.glm4v_moe:FAMILY",
    "internvl": "tessera.models.families.internvl:FAMILY",
    "internvl_chat": "tessera.models.families.internvl_chat:FAMILY",
    "NVLM_D": "tessera.models.families.nvlm_d:FAMILY",
    "composite": "tessera.models.families.composite:FAMILY",
    "qwen2": "tessera.models.families.qwen2:FAMILY",
    "qwen3": "tessera.models.families.qwen3:FAMILY",
    "qwen3_moe": "tessera.models.families.qwen3_moe:FAMILY",
    "llama": "tessera.models.families.llama:FAMILY",
}
"""``model_type`` of a config.json -> "module:attribute" of its family."""

FALLBACK = "tessera.models.families.fallback:FAMILY"


def text_config(config: HFConfig) -> HFConfig:
    """The decoder's part of a config: nested under one of two names, or flat."""
    nested = config.get("text_config") or config.get("llm_config")
    return nested if nested else config


def family_of(config: HFConfig) -> Family:
    """The family of a checkpoint's ``config.json``; the fallback for any other with a vision tower."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UserError("config.json has no model_type: is --model the directory of a Hugging Face checkpoint?")
    if model_type not in FAMILIES and "vision_config" not in config:
        raise UserError(f"config.json: model_type {model_type!r} is not supported ({', '.join(FAMILIES)})")
    module, attribute = FAMILIES.get(model_type, FALLBACK).split(":")
    family = vars(import_module(module))[attribute]
    assert isinstance(family, Family)
    return family
