"""Megatron's names of a language model, from a decoder's configuration.

One layer, ours on the left (``g`` counts groups of query heads that share a key and a value)::

    input_layernorm.weight                     self_attention.linear_qkv.layer_norm_weight
    self_attn.{q,k,v}_proj.{weight,bias}       self_attention.linear_qkv.{weight,bias}     per g: queries, key, value
    self_attn.{q,k}_norm.weight                self_attention.{q,k}_layernorm.weight
    self_attn.o_proj.weight                    self_attention.linear_proj.weight
    post_attention_layernorm.weight            mlp.linear_fc1.layer_norm_weight            dense
                                               pre_mlp_layernorm.weight                    sparse
    mlp.{gate,up}_proj, mlp.down_proj          mlp.linear_fc1 (gate, then up), mlp.linear_fc2
    mlp.gate.weight                            mlp.router.weight
    mlp.gate.e_score_correction_bias           mlp.router.expert_bias
    mlp.experts.gate_up_proj, .down_proj       mlp.experts.experts.linear_fc1.weight, .linear_fc2.weight
    mlp.shared_experts.*                       mlp.shared_experts.linear_fc1.weight, .linear_fc2.weight

These are the names of the fused modules of Transformer Engine. Megatron's own modules keep norms apart; the same
tensors are then called otherwise, and :func:`spellings` knows how.
"""

from __future__ import annotations

import re

from tessera.models.decoder import DecoderConfig
from tessera.weights.megatron.table import COPIED, GATED, ROWS, Builder, Split

EXPERT_COLUMNS = Split(1, blocks=2, experts=True)
EXPERT_ROWS = Split(2, experts=True)
VOCABULARY = Split(0)


def add_decoder(to: Builder, config: DecoderConfig, ours: str, theirs: str) -> None:
    """Rows of the decoder whose modules begin with ``ours`` (``model.``) here and with ``theirs`` there."""
    to.keep(f"{theirs}embedding.word_embeddings.weight", f"{ours}embed_tokens.weight", VOCABULARY)
    for layer in range(config.layers):
        one, two = f"{ours}layers.{layer}.", f"{theirs}decoder.layers.{layer}."
        _attention(to, config, one, two, layer)
        if config.moe is not None and layer in config.moe.layers:
            _sparse(to, one, two, layer)
        else:
            _dense(to, config, one, two, layer)
    to.keep(f"{theirs}decoder.final_layernorm.weight", f"{ours}norm.weight", last=True)
    if not config.tied:
        to.keep(f"{theirs}output_layer.weight", "lm_head.weight", VOCABULARY, last=True)


def _attention(to: Builder, config: DecoderConfig, ours: str, theirs: str, layer: int) -> None:
    own, their = f"{ours}self_attn.", f"{theirs}self_attention."
    to.keep(f"{their}linear_qkv.layer_norm_weight", f"{ours}input_layernorm.weight", layer=layer)
    queries = config.heads // config.kv_heads * config.head_dim
    for leaf in ["weight", "bias"] if config.qkv_bias else ["weight"]:
        rows = {"q": queries, "k": config.head_dim, "v": config.head_dim}
        parts = [(f"{own}{name}_proj.{leaf}", 0, count) for name, count in rows.items()]
        split = Split(0, unit=queries + 2 * config.head_dim)
        to.interleave(f"{their}linear_qkv.{leaf}", parts, config.kv_heads, split, layer=layer)
    if config.qk_norm:
        for name in "qk":
            to.keep(f"{their}{name}_layernorm.weight", f"{own}{name}_norm.weight", layer=layer)
    to.keep(f"{their}linear_proj.weight", f"{own}o_proj.weight", Split(1, unit=queries), layer=layer)
    if config.out_bias:
        to.keep(f"{their}linear_proj.bias", f"{own}o_proj.bias", layer=layer)


def _dense(to: Builder, config: DecoderConfig, ours: str, theirs: str, layer: int) -> None:
    to.keep(f"{theirs}mlp.linear_fc1.layer_norm_weight", f"{ours}post_attention_layernorm.weight", layer=layer)
    add_gated(to, f"{ours}mlp.", f"{theirs}mlp.", bias=config.mlp_bias, layer=layer)


def add_gated(to: Builder, ours: str, theirs: str, *, bias: bool, layer: int | None) -> None:
    """Rows of a gated MLP: gate and up are one matrix there."""
    for leaf in ["weight", "bias"] if bias else ["weight"]:
        parts = [f"{ours}gate_proj.{leaf}", f"{ours}up_proj.{leaf}"]
        to.join(f"{theirs}linear_fc1.{leaf}", parts, GATED, layer=layer)
        to.keep(
            f"{theirs}linear_fc2.{leaf}", f"{ours}down_proj.{leaf}", ROWS if leaf == "weight" else COPIED, layer=layer
        )


def _sparse(to: Builder, ours: str, theirs: str, layer: int) -> None:
    own, their = f"{ours}mlp.", f"{theirs}mlp."
    to.keep(f"{theirs}pre_mlp_layernorm.weight", f"{ours}post_attention_layernorm.weight", layer=layer)
    to.keep(f"{their}router.weight", f"{own}gate.weight", layer=layer)
    if f"{own}gate.e_score_correction_bias" in to.ours:
        to.keep(f"{their}router.expert_bias", f"{own}gate.e_score_correction_bias", layer=layer)
    experts = f"{their}experts.experts."
    to.keep(f"{experts}linear_fc1.weight", f"{own}experts.gate_up_proj", EXPERT_COLUMNS, layer=layer)
    to.keep(f"{experts}linear_fc2.weight", f"{own}experts.down_proj", EXPERT_ROWS, layer=layer)
    if f"{own}shared_experts.gate_proj.weight" in to.ours:
        add_gated(to, f"{own}shared_experts.", f"{their}shared_experts.", bias=False, layer=layer)


def local_spelling(name: str, *, sparse: bool, sharded: bool) -> str:
    """What Megatron's own modules, rather than Transformer Engine's, call the canonical tensor ``name``.

    In a ``sharded`` checkpoint only the norm of a ``sparse`` layer differs; rank by rank, all norms are modules.
    """
    if sharded:
        return (
            re.sub(r"\.pre_mlp_layernorm\.(weight|bias)$", r".mlp.linear_fc1.layer_norm_\1", name) if sparse else name
        )
    name = re.sub(r"\.self_attention\.linear_qkv\.layer_norm_(weight|bias)$", r".input_layernorm.\1", name)
    return re.sub(r"\.mlp\.linear_fc1\.layer_norm_(weight|bias)$", r".pre_mlp_layernorm.\1", name)


def spellings(name: str) -> tuple[str, ...]:
    """Other names under which checkpoints hold the canonical tensor ``name``, most likely first.

    A sparse layer's norm is called as if it were fused where Megatron's own modules were saved as a sharded checkpoint;
    where they were saved rank by rank, all norms are called by their module.
    """
    found = []
    for leaf in ("weight", "bias"):
        if name.endswith(f".self_attention.linear_qkv.layer_norm_{leaf}"):
            found.append(re.sub(r"self_attention\.linear_qkv\.layer_norm_\w+$", f"input_layernorm.{leaf}", name))
        if name.endswith(f".mlp.linear_fc1.layer_norm_{leaf}"):
            found.append(re.sub(r"mlp\.linear_fc1\.layer_norm_\w+$", f"pre_mlp_layernorm.{leaf}", name))
        if name.endswith(f".pre_mlp_layernorm.{leaf}"):
            found.append(name.removesuffix(f"pre_mlp_layernorm.{leaf}") + f"mlp.linear_fc1.layer_norm_{leaf}")
    return tuple(found)
