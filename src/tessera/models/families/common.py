"""What family files share: reading a ``config.json`` of either transformers 4 or 5 into our own values.

transformers 4 wrote ``rope_theta`` and ``rope_scaling`` side by side and, in some VLMs, the decoder's fields at the top
level; transformers 5 nests both (``rope_parameters``, ``text_config``). Only plain dictionaries are read here, so a
text-only model never imports transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tessera.config.errors import UserError
from tessera.contract.batch import Normalisation
from tessera.contract.model import Family, HFConfig
from tessera.contract.plan import Groups, Plan
from tessera.contract.weightmap import Stack, Tie, WeightMap
from tessera.models.decoder import DecoderConfig
from tessera.models.families import text_config
from tessera.models.geometry import TextGeometry
from tessera.models.moe import MoEConfig
from tessera.models.rope import RopeConfig
from tessera.models.vlm import VLM


def tied(config: HFConfig) -> bool:
    """Whether the head is the embedding; older VLM configs say so in ``text_config``."""
    return bool(config.get("tie_word_embeddings", False) or text_config(config).get("tie_word_embeddings", False))


def rope_config(
    text: HFConfig,
    *,
    theta: float,
    sections: Sequence[int] = (),
    interleaved: bool = False,
    partial: float | None = None,
) -> RopeConfig:
    """RoPE of a decoder config; ``theta`` is the family's default, ``sections`` its m-RoPE default.

    ``partial`` is the default share of a head that is turned, for families that can turn a part.
    """
    scaling: Mapping[str, Any] = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    share = scaling.get("partial_rotary_factor", text.get("partial_rotary_factor", partial or 1.0))
    if partial is None and share != 1.0:
        raise UserError("config.json: partial_rotary_factor other than 1 is not supported by this family")
    if kind == "llama3" and "original_max_position_embeddings" not in scaling:
        scaling = {**scaling, "original_max_position_embeddings": text["max_position_embeddings"]}
    return RopeConfig(
        theta=float(scaling.get("rope_theta", text.get("rope_theta", theta))),
        kind="default" if kind == "mrope" else kind,
        scaling=scaling,
        sections=tuple(scaling.get("mrope_section", sections)) if sections else (),
        interleaved=interleaved,
        partial=float(share),
    )


def decoder_config(
    text: HFConfig,
    rope: RopeConfig,
    *,
    tie: bool,
    qkv_bias: bool,
    out_bias: bool,
    mlp_bias: bool,
    qk_norm: bool,
    moe: MoEConfig | None = None,
) -> DecoderConfig:
    """Sizes from a decoder config; UserError for an option the decoder does not have."""
    heads = text["num_attention_heads"]
    refused = {
        "use_sliding_window": bool(text.get("use_sliding_window", False)),
        "attention_dropout": bool(text.get("attention_dropout")),
        "hidden_act": text.get("hidden_act", "silu") != "silu",
    }
    for name in (name for name, wrong in refused.items() if wrong):
        raise UserError(f"config.json: {name} {text[name]!r} is not supported by this family")
    return DecoderConfig(
        vocab=text["vocab_size"],
        hidden=text["hidden_size"],
        inner=text["intermediate_size"],
        layers=text["num_hidden_layers"],
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        eps=text.get("rms_norm_eps", 1e-6),
        rope=rope,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        tied=tie,
        moe=moe,
    )


def stepped_layers(text: HFConfig) -> frozenset[int]:
    """Sparse layers where every ``decoder_sparse_step``-th is one, except ``mlp_only_layers``."""
    step, dense = text.get("decoder_sparse_step", 1), text.get("mlp_only_layers") or ()
    return frozenset(i for i in range(text["num_hidden_layers"]) if i not in dense and (i + 1) % step == 0)


def expert_stacks(decoder: str, disk_names: Sequence[str]) -> tuple[Stack, ...]:
    """Rules for experts that lie on disk one by one, below the decoder called ``decoder``; none if they are stacked."""
    if any(name.endswith(".mlp.experts.gate_up_proj") for name in disk_names):
        return ()
    experts = f"{decoder}.layers.*.mlp.experts"
    return (
        Stack(f"{experts}.gate_up_proj", (f"{experts}.#.gate_proj.weight", f"{experts}.#.up_proj.weight")),
        Stack(f"{experts}.down_proj", (f"{experts}.#.down_proj.weight",)),
    )


def axial_theta(vision: HFConfig) -> float:
    """Base period of a tower's rotary positions; UserError for a rule other than the axial one."""
    rope: Mapping[str, Any] = vision.get("rope_parameters") or {}
    if rope.get("rope_type", "axial") not in ("axial", "default"):
        raise UserError(f"config.json: rope_type {rope['rope_type']!r} of the vision tower is not supported (axial)")
    return float(rope.get("rope_theta", 10000.0))


def normalisation(preprocessor: Mapping[str, Any]) -> Normalisation:
    """Pixel normalisation of a ``preprocessor_config.json``, CLIP's values where it is silent."""
    return Normalisation(
        mean=tuple(preprocessor.get("image_mean", (0.48145466, 0.4578275, 0.40821073))),
        std=tuple(preprocessor.get("image_std", (0.26862954, 0.26130258, 0.27577711))),
        rescale=preprocessor.get("rescale_factor", 1 / 255),
    )


def ties(config: HFConfig, embedding: str, disk_names: Sequence[str]) -> tuple[Tie, ...]:
    """The rule for a tied head of which the checkpoint stores a copy all the same."""
    return (Tie(embedding, "lm_head.weight"),) if tied(config) and "lm_head.weight" in disk_names else ()


def tensor_rows(decoder: str) -> tuple[tuple[str, str], ...]:
    """How tensor ranks split the decoder at module ``decoder``, and the head."""
    layer = f"{decoder}.layers.*"
    columns = [f"self_attn.{name}_proj" for name in "qkv"] + ["mlp.gate_proj", "mlp.up_proj"]
    return (
        *((f"{layer}.{name}", "column") for name in columns),
        (f"{layer}.self_attn.o_proj", "row"),
        (f"{layer}.mlp.down_proj", "row"),
        (f"{decoder}.embed_tokens", "vocab"),
        ("lm_head", "vocab"),
    )


def decoder_parts(layers: str) -> dict[str, tuple[str, ...]]:
    """The finer recompute points of our decoder's layers, which are the modules that match ``layers``."""
    return {
        "core_attn": (f"{layers}.self_attn.core",),
        "mlp": (f"{layers}.mlp",),
        "layernorm": (f"{layers}.input_layernorm", f"{layers}.post_attention_layernorm"),
    }


TEXT_PLAN = Plan(
    Groups(llm=("model", "lm_head")),
    fsdp_units=("model.layers.*",),
    recompute_decoder=("model.layers.*",),
    tensor=tensor_rows("model"),
    recompute_modules=decoder_parts("model.layers.*"),
    experts=("model.layers.*.mlp.experts",),
)


def vlm_plan(aligner: Sequence[str]) -> Plan:
    """The plan of a VLM with a tower at ``model.visual`` whose projectors are ``aligner``."""
    return Plan(
        Groups(llm=("model.language_model", "lm_head"), aligner=tuple(aligner), vit=("model.visual",)),
        fsdp_units=("model.language_model.layers.*", "model.visual.blocks.*"),
        recompute_decoder=("model.language_model.layers.*",),
        recompute_tower=("model.visual.blocks.*",),
        tensor=tensor_rows("model.language_model"),
        experts=("model.language_model.layers.*.mlp.experts",),
        recompute_modules=decoder_parts("model.language_model.layers.*"),
    )


def text_weights(config: HFConfig, disk_names: Sequence[str]) -> WeightMap:
    """Names of a text-only model: the same on disk."""
    return WeightMap(
        ties=ties(config, "model.embed_tokens.weight", disk_names),
        # Llama 2 checkpoints store the rotary frequencies, which follow from config.json.
        ignored=("model.layers.*.self_attn.rotary_emb.inv_freq",),
    )


def text_geometry(config: HFConfig, preprocessor: Mapping[str, Any]) -> TextGeometry:
    """Geometry of a model without images."""
    return TextGeometry()


def text_family(name: str, build: Any, tiny: Any, weights: Any = text_weights) -> Family:
    """A family without a tower."""

    def module(config: HFConfig) -> nn.Module:
        return VLM(build(config))

    return Family(name, (name,), module, text_geometry, lambda config: TEXT_PLAN, weights, tiny)
