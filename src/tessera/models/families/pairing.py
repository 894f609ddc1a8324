"""The ``config.json`` of one model's tower before another model's language model, derived value by value.

A pair is written as the published family that is exactly this pair, if there is one, so that every other tool loads it.
Whether there is one is read off the language model's computation, not off its name: one published decoder has biases
on queries, keys and values and no norms there, the other norms and a head size of its own, and so on. Otherwise the
pair becomes a :mod:`~tessera.models.families.composite`, which says what the published form cannot express.

Nothing of the decoder is taken from the model that gives the tower. Rotary positions keep the language model's base
period and scaling. If it has not been trained with three axes itself, its frequencies follow the axes as those of the
tower's model do, in the same proportions if its heads are of another size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from tessera.config.errors import UserError
from tessera.contract.model import HFConfig
from tessera.models.decoder import DecoderConfig
from tessera.models.families import composite, family_of
from tessera.models.families.common import text_config
from tessera.models.families.internvl import DECODERS
from tessera.models.rope import RopeConfig, frequencies
from tessera.models.vlm import VLM, Trunk

TILED = "internvl"
"""The family that holds any decoder, with one position per token."""

LANGUAGE: Mapping[str, str] = {"qwen2_5_vl": "qwen2", "qwen3_vl": "qwen3", "qwen3_vl_moe": "qwen3_moe"}
"""The language model inside a VLM, by the VLM's ``model_type``."""

PUBLISHED: Mapping[str, tuple[str, str]] = {
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl_text"),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", "qwen3_vl_text"),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe_text"),
}
"""Architecture, and ``model_type`` of the text, of the families that a pair may be written as."""

_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
_OF_THE_FILE = (
    *("architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "_name_or_path", "auto_map"),
)
_AXES = ("type", "mrope_section", "mrope_interleaved")
_OF_THE_TEXT = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, slots=True)
class Pair:
    """The ``config.json`` of a pair; ``inexpressible`` says why transformers cannot hold it (empty: it can)."""

    config: dict[str, Any]
    inexpressible: str = ""


def vision_token_ids(config: HFConfig) -> dict[str, int]:
    """The ids of special tokens that a VLM's own fields name, by field; none of the language model's."""
    return {
        key: value
        for key, value in config.items()
        if key.endswith("_token_id") and key not in _OF_THE_TEXT and isinstance(value, int)
    }


def built(config: HFConfig) -> VLM:
    """The model of ``config`` on the meta device; UserError if it is not one of our own."""
    with torch.device("meta"):
        module = family_of(config).build(config)
    if not isinstance(module, VLM):
        raise UserError(f"config.json: model_type {config.get('model_type')!r} is run whole and cannot be taken apart")
    return module


def pair(vision: HFConfig, language: HFConfig, vocabulary: int, tokens: Mapping[str, int]) -> Pair:
    """The tower of ``vision`` before the language model of ``language``.

    ``vocabulary`` is the number of embeddings, ``tokens`` the new ids of :func:`vision_token_ids`. UserError if a model
    has no tower, or either is of a family that cannot be taken apart.
    """
    family = _tower(vision)
    text = language_config(language)
    own = replace(built(language).decoder.config, vocab=vocabulary)
    text |= {"vocab_size": vocabulary, "tie_word_embeddings": own.tied}
    shared = {"tie_word_embeddings": own.tied, **tokens}
    if family == TILED:
        own = replace(own, rope=replace(own.rope, sections=(), interleaved=False))
        return _checked(Pair({**_top(vision), **shared, "text_config": text}), own)
    model = built(vision)
    own = replace(own, rope=axes_of(own, model.decoder.config))
    levels = model.model.levels if isinstance(model.model, Trunk) else 0
    if levels > own.layers:
        raise UserError(f"config.json: a decoder of {own.layers} layers has no room for {levels} deepstack levels")
    sees = {**vision["vision_config"], "out_hidden_size": own.hidden}
    target, why = _target(family, own)
    if target is None:
        sees["model_type"] = sees.get("model_type", family)
        config = {
            **_top(vision),
            **shared,
            "architectures": ["CompositeForConditionalGeneration"],
            "model_type": composite.NAME,
            "text_config": {**text, "rope_parameters": _parameters(own.rope)},
            "vision_config": sees,
        }
        found = Pair({key: value for key, value in config.items() if key != "transformers_version"}, why)
    else:
        found = Pair(_published(vision, family, target, text, own.rope, {**shared, "vision_config": sees}))
    return _checked(found, own)


def language_config(config: HFConfig) -> dict[str, Any]:
    """The language model of ``config`` as a text model of its own, nothing left to a family's defaults."""
    family = str(config.get("model_type"))
    raw = dict(text_config(config))
    nested = "text_config" in config
    kind = LANGUAGE.get(family, str(raw.get("model_type")) if nested else family)
    if kind not in DECODERS:
        known = ", ".join((*DECODERS, *LANGUAGE, TILED, composite.NAME))
        raise UserError(f"config.json: the language model of {family!r} cannot be taken ({known})")
    own = built(config).decoder.config
    others = () if nested else ("vision_config", *vision_token_ids(config))
    text = {key: value for key, value in raw.items() if key not in (*_OF_THE_FILE, *_ROPE, *others)}
    text |= {
        "model_type": kind,
        "vocab_size": own.vocab,
        "hidden_size": own.hidden,
        "intermediate_size": own.inner,
        "num_hidden_layers": own.layers,
        "num_attention_heads": own.heads,
        "num_key_value_heads": own.kv_heads,
        "head_dim": own.head_dim,
        "rms_norm_eps": own.eps,
        "tie_word_embeddings": own.tied,
        "rope_parameters": _parameters(replace(own.rope, sections=(), interleaved=False)),
    }
    if own.moe is not None:
        text["norm_topk_prob"] = own.moe.normalise
    assert _same(DECODERS[kind](text), own), f"{kind} does not describe the language model of {family}"
    return text


def axes_of(language: DecoderConfig, vision: DecoderConfig) -> RopeConfig:
    """The language model's RoPE; which axis its frequencies follow is its own affair, or else as in the other model."""
    if language.rope.sections or not vision.rope.sections:
        return language.rope
    half, others = language.head_dim // 2, sum(vision.rope.sections)
    _, high, wide = (size * half // others for size in vision.rope.sections)
    return replace(language.rope, sections=(half - high - wide, high, wide), interleaved=vision.rope.interleaved)


def _checked(found: Pair, own: DecoderConfig) -> Pair:
    new = built(found.config).decoder.config
    axes = [(rope.sections, rope.interleaved) for rope in (new.rope, own.rope)]
    assert _same(new, own) and axes[0] == axes[1], "the new config.json describes another decoder than the source's"
    return found


def _tower(vision: HFConfig) -> str:
    """The family of the tower of ``vision``."""
    family = str(vision.get("model_type"))
    if family == composite.NAME:
        return str(vision["vision_config"]["model_type"]).removesuffix("_vision")
    if family != TILED and family not in composite.TOWERS:
        lacks = "" if "vision_config" in vision else " (it has no vision tower)"
        known = ", ".join((*composite.TOWERS, TILED, composite.NAME))
        raise UserError(f"config.json: the tower of model_type {family!r} cannot be taken{lacks}; there are {known}")
    return family


def _target(family: str, own: DecoderConfig) -> tuple[str | None, str]:
    """The published family that is the tower of ``family`` before this decoder; None and why there is none."""
    windowed = family == "qwen2_5_vl"
    if windowed:
        wrong = {
            "norms on queries and keys": own.qk_norm,
            "no biases on queries, keys and values": not own.qkv_bias,
            "a head size of its own": own.head_dim * own.heads != own.hidden,
            "experts": own.moe is not None,
        }
    else:
        wrong = {
            "no norms on queries and keys": not own.qk_norm,
            "biases on queries, keys and values only": own.qkv_bias != own.out_bias,
            "router weights that do not sum to one": own.moe is not None and not own.moe.normalise,
        }
    wrong |= {
        "a bias on the attention output": windowed and own.out_bias,
        "biases in the MLP": own.mlp_bias,
        f"{own.rope.kind} scaling of rotary frequencies": own.rope.kind != "default",
        "its way of spreading rotary axes": own.rope.interleaved == windowed,
    }
    found = [what for what, there in wrong.items() if there]
    if found:
        return None, f"its {family} model has no place for what this language model has: {', '.join(found)}"
    if windowed:
        return family, ""
    return "qwen3_vl" if own.moe is None else "qwen3_vl_moe", ""


def _published(
    vision: HFConfig, family: str, target: str, text: Mapping[str, Any], rope: RopeConfig, shared: Mapping[str, Any]
) -> dict[str, Any]:
    """The config of the published family ``target``, nested or flat as ``vision`` is."""
    architecture, kind = PUBLISHED[target]
    config = {**_top(vision), **shared, "architectures": [architecture], "model_type": target}
    if target != family:
        config["vision_config"] = {**config["vision_config"], "model_type": target}
    new = "rope_parameters" in text_config(vision)
    fields = {key: value for key, value in text.items() if key not in (*_ROPE, "model_type")}
    fields |= {"rope_parameters": _parameters(rope)} if new else _older(rope)
    if vision.get("text_config"):
        return {**config, "text_config": {**fields, "model_type": kind}}
    return {**config, **{key: value for key, value in fields.items() if key not in shared}}


def _top(vision: HFConfig) -> dict[str, Any]:
    """Of a VLM's config, what is not the decoder's."""
    if vision.get("text_config"):
        dropped = (*_OF_THE_TEXT, "text_config", "_name_or_path")
        return {key: value for key, value in vision.items() if key not in dropped}
    kept = ("architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "vision_config")
    return {key: value for key, value in vision.items() if key in kept or key in vision_token_ids(vision)}


def _parameters(rope: RopeConfig) -> dict[str, Any]:
    """RoPE as transformers 5 writes it."""
    scaling = {key: value for key, value in (rope.scaling or {}).items() if key not in _AXES}
    found = {**scaling, "rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.sections:
        found |= {"mrope_section": list(rope.sections), "mrope_interleaved": rope.interleaved}
    return found


def _older(rope: RopeConfig) -> dict[str, Any]:
    """RoPE as the first checkpoints of the family have it, which everything reads."""
    axes: dict[str, Any] = {"mrope_section": list(rope.sections)}
    if rope.interleaved:
        axes |= {"rope_type": "default", "mrope_interleaved": True}
    else:
        axes |= {"type": "mrope"}
    return {"rope_theta": rope.theta, "rope_scaling": axes}


def _same(one: DecoderConfig, two: DecoderConfig) -> bool:
    """Whether two decoders compute the same; how their scaling was written down does not matter."""
    plain = [replace(each, rope=RopeConfig(each.rope.theta, each.rope.kind)) for each in (one, two)]
    turning = [frequencies(each.rope, each.head_dim) for each in (one, two)]
    return plain[0] == plain[1] and torch.equal(*turning)
