"""The tower of one family before the decoder of another, where no published family is the pair.

``vision_config`` keeps the tower's ``model_type``, ``text_config`` the language model's own, with everything that makes
it what it is (norms, biases, head size, experts, base period and scaling of RoPE). What the pair adds is which position
axis each rotary frequency follows: ``mrope_section`` and ``mrope_interleaved`` in the text's ``rope_parameters``. On
text the three axes of a position are equal, so there the decoder computes what the language model alone computes.

transformers has no such model. It could not load one under a published ``model_type`` either without leaving tensors
out, so the ``model_type`` here is one that it refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from tessera.config.errors import UserError
from tessera.contract.model import Family, Geometry, HFConfig
from tessera.contract.plan import Plan
from tessera.contract.weightmap import WeightMap
from tessera.models.decoder import DecoderConfig
from tessera.models.families import qwen2_5_vl, qwen3, qwen3_vl
from tessera.models.families.common import expert_stacks, ties, vlm_plan
from tessera.models.families.internvl import DECODERS
from tessera.models.tower import Tower
from tessera.models.vlm import VLM

NAME = "composite"


@dataclass(frozen=True, slots=True)
class Seeing:
    """The half of a family that sees: its tower, its geometry and where its aligner is."""

    tower: Callable[[Mapping[str, Any]], Tower]
    geometry: Callable[[HFConfig, Mapping[str, Any]], Geometry]
    aligner: tuple[str, ...]


_DEEPSTACK = Seeing(qwen3_vl.tower, qwen3_vl.geometry, ("model.visual.merger", "model.visual.deepstack_merger_list"))
TOWERS: Mapping[str, Seeing] = {
    "qwen2_5_vl": Seeing(qwen2_5_vl.tower, qwen2_5_vl.geometry, ("model.visual.merger",)),
    "qwen3_vl": _DEEPSTACK,
    "qwen3_vl_moe": _DEEPSTACK,
}
"""Towers by the ``model_type`` of ``vision_config``, which transformers 5 writes with ``_vision`` behind it."""


def seeing(config: HFConfig) -> Seeing:
    """The half of ``config`` that sees."""
    kind = str(config["vision_config"].get("model_type"))
    if kind.removesuffix("_vision") not in TOWERS:
        raise UserError(f"config.json: a tower of type {kind!r} is not supported ({', '.join(TOWERS)})")
    return TOWERS[kind.removesuffix("_vision")]


def decoder(config: HFConfig) -> DecoderConfig:
    """The language model's own values, and the axes that its rotary frequencies follow."""
    text = config["text_config"]
    kind = text.get("model_type")
    if kind not in DECODERS:
        raise UserError(f"config.json: a language model of type {kind!r} is not supported ({', '.join(DECODERS)})")
    own, rope = DECODERS[kind](text), text.get("rope_parameters") or {}
    if "mrope_section" not in rope:
        raise UserError("config.json: rope_parameters of text_config lacks mrope_section")
    sections, interleaved = tuple(rope["mrope_section"]), bool(rope.get("mrope_interleaved", False))
    return replace(own, rope=replace(own.rope, sections=sections, interleaved=interleaved))


def build(config: HFConfig) -> nn.Module:
    """The module on the current default device."""
    return VLM(decoder(config), seeing(config).tower(config["vision_config"]))


def geometry(config: HFConfig, preprocessor: Mapping[str, Any]) -> Geometry:
    """The tower's."""
    return seeing(config).geometry(config, preprocessor)


def plan(config: HFConfig) -> Plan:
    """Where the model is cut."""
    return vlm_plan(seeing(config).aligner)


def weightmap(config: HFConfig, disk_names: Sequence[str]) -> WeightMap:
    """Names are the same on disk and in memory; experts may lie one by one."""
    sparse = decoder(config).moe is not None
    return WeightMap(
        ties=ties(config, "model.language_model.embed_tokens.weight", disk_names),
        stacks=expert_stacks("model.language_model", disk_names) if sparse else (),
    )


def tiny() -> dict[str, Any]:
    """``config.json`` of a small random instance: a windowed tower before a decoder with norms on queries and keys."""
    seen, text = qwen2_5_vl.tiny(), qwen3.tiny()
    theta = text.pop("rope_theta")
    del text["architectures"]
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": [4, 6, 6], "mrope_interleaved": False}
    ids = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return {
        "architectures": ["CompositeForConditionalGeneration"],
        "model_type": NAME,
        "tie_word_embeddings": False,
        **{name: seen[name] for name in ids},
        "text_config": {**text, "rope_parameters": rope},
        "vision_config": seen["vision_config"],
    }


FAMILY = Family(
    name=NAME,
    model_types=(NAME,),
    build=build,
    geometry=geometry,
    plan=plan,
    weightmap=weightmap,
    tiny=tiny,
)
