"""Megatron's names of a vision-language model: four dialects, which agree on the language model below a prefix.

``pai``, Pai-Megatron-Patch, and ``bridge``, Megatron-Bridge, build towers of Megatron's own layers::

    visual.blocks.i.     norm1, attn.qkv     decoder.layers.i.self_attention.linear_qkv.layer_norm_*, linear_qkv
                         attn.proj           decoder.layers.i.self_attention.linear_proj
                         norm2, mlp.*        decoder.layers.i.mlp.linear_fc1.layer_norm_*, linear_fc1, linear_fc2
    visual.merger.       norm, linear_fc*    pai: decoder.final_layernorm, projection.encoder.linear_fc*
                                             bridge: merger.patch_norm, merger.linear_fc*

A tower's fused qkv has all queries first; Megatron's has query, key and value of one head side by side. ``swift``,
Megatron-SWIFT, keeps transformers' modules as they are below ``visual``, on every rank; so does ``bridge`` for the
families it has no tower for. ``lm`` is Megatron-LM's own multimodal example: a tower with class token and layer scale
whose norms are modules of their own, ``vision_model.*`` and ``vision_projection.*``.

A pair of family and dialect that is in none of the tables is refused by name: nobody could load what we would write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch

from tessera.config.errors import UserError
from tessera.contract.model import Family, HFConfig
from tessera.contract.shards import whole
from tessera.contract.weightmap import WeightMap
from tessera.models.tiled import TiledTower
from tessera.models.tower import Tower
from tessera.models.vlm import VLM
from tessera.weights.hf import shapes_of
from tessera.weights.megatron.names import add_decoder, add_gated
from tessera.weights.megatron.table import COLUMNS, COPIED, ROWS, Builder, Row, Source, Split, Table, leaves
from tessera.weights.megatron.tiling import Tile, Tiling

DIALECTS = ("pai", "bridge", "swift", "lm")
LANGUAGE = "language_model."
OURS = "model.visual."
THEIRS = "vision_model."
LEAVES = ("weight", "bias")

AddTower = Callable[[Builder, VLM, WeightMap], None]


def make_table(family: Family, config: HFConfig, dialect: str) -> Table:
    """The table of a model in ``dialect``; UserError if that toolkit has no such model. They agree on plain text."""
    with torch.device("meta"):
        module = family.build(config)
    if not isinstance(module, VLM):
        raise UserError(f"model_type {family.name!r}: Megatron has no names for this family's tensors")
    known = TOWERS.get(family.name, {})
    sees = module.visual is not None
    if sees and dialect not in known:
        options = f"choose one of {', '.join(known)}" if known else "no dialect has it"
        raise UserError(f"--mcore_dialect {dialect}: has no layout for model_type {family.name!r}; {options}")
    to = Builder(shapes_of(module))
    language = LANGUAGE if sees else ""
    decoder = module.decoder.config
    add_decoder(to, decoder, "model.language_model." if sees else "model.", language)
    if sees:
        known[dialect](to, module, family.weightmap(config, []))
    return to.table(dialect, language, decoder)


def dialects_of(family: Family) -> tuple[str, ...]:
    """The dialects that have a layout for a family; all of them for a language model, none for a new pair."""
    return tuple(TOWERS[family.name]) if family.name in TOWERS else DIALECTS


def _blocks(to: Builder, module: VLM) -> Tower:
    """Rows of a tower's layers, as Megatron's own."""
    tower = cast(Tower, module.visual)
    config = tower.config
    head = config.hidden // config.heads
    for index in range(config.depth):
        ours, theirs = f"{OURS}blocks.{index}.", f"{THEIRS}decoder.layers.{index}."
        qkv = f"{ours}attn.qkv."
        for leaf in LEAVES:
            if f"{qkv}{leaf}" in to.ours:
                parts: list[Source] = [(f"{qkv}{leaf}", at * config.hidden, head) for at in range(3)]
                split = Split(0, unit=3 * head)
                to.interleave(f"{theirs}self_attention.linear_qkv.{leaf}", parts, config.heads, split)
            _keep(to, f"{theirs}self_attention.linear_qkv.layer_norm_{leaf}", f"{ours}norm1.{leaf}")
            _keep(to, f"{theirs}mlp.linear_fc1.layer_norm_{leaf}", f"{ours}norm2.{leaf}")
            across = Split(1, unit=head) if leaf == "weight" else COPIED
            _keep(to, f"{theirs}self_attention.linear_proj.{leaf}", f"{ours}attn.proj.{leaf}", across)
            _keep(to, f"{theirs}mlp.linear_fc1.{leaf}", f"{ours}mlp.linear_fc1.{leaf}", COLUMNS)
            across = ROWS if leaf == "weight" else COPIED
            _keep(to, f"{theirs}mlp.linear_fc2.{leaf}", f"{ours}mlp.linear_fc2.{leaf}", across)
        if f"{ours}mlp.gate_proj.weight" in to.ours:
            bias = f"{ours}mlp.gate_proj.bias" in to.ours
            add_gated(to, f"{ours}mlp.", f"{theirs}mlp.", bias=bias, layer=None)
    for name in leaves(to.ours, f"{OURS}patch_embed."):
        to.keep(f"{THEIRS}patch_embed.{name}", f"{OURS}patch_embed.{name}")
    _keep(to, f"{THEIRS}pos_embed.weight", f"{OURS}pos_embed.weight")
    return tower


def _keep(to: Builder, theirs: str, ours: str, split: Split = COPIED) -> None:
    """A tensor as it is, if the tower has it."""
    if ours in to.ours:
        to.keep(theirs, ours, split)


def _merger(to: Builder, ours: str, theirs: str, parts: Mapping[str, str]) -> None:
    """Rows of a projector: norm, first and second matrix, by what both sides call them."""
    for one, two in parts.items():
        for leaf in LEAVES:
            split = COPIED
            if two.endswith("linear_fc1"):
                split = COLUMNS
            elif two.endswith("linear_fc2") and leaf == "weight":
                split = ROWS
            _keep(to, f"{theirs}{two}.{leaf}", f"{ours}{one}.{leaf}", split)


def _pai_windowed(to: Builder, module: VLM, released: WeightMap) -> None:
    """A gated tower with windows, whose merger norms before it merges."""
    _blocks(to, module)
    parts = {"ln_q": "decoder.final_layernorm", "mlp.0": "projection.encoder.linear_fc1"}
    _merger(to, f"{OURS}merger.", THEIRS, parts | {"mlp.2": "projection.encoder.linear_fc2"})


def _pai_deepstack(to: Builder, module: VLM, released: WeightMap) -> None:
    """A tower with deepstack: one merger at its end, others on the way."""
    tower = _blocks(to, module)
    first, second = "projection.encoder.linear_fc1", "projection.encoder.linear_fc2"
    parts = {"norm": "decoder.final_layernorm", "linear_fc1": first, "linear_fc2": second}
    _merger(to, f"{OURS}merger.", THEIRS, parts)
    for level in range(len(tower.config.deepstack)):
        stem = f"decoder.deepstack_merger_list.{level}.encoder."
        parts = {"norm": f"decoder.deepstack_norm_list.{level}"}
        parts |= {"linear_fc1": f"{stem}linear_fc1", "linear_fc2": f"{stem}linear_fc2"}
        _merger(to, f"{OURS}deepstack_merger_list.{level}.", THEIRS, parts)


def _bridge_deepstack(to: Builder, module: VLM, released: WeightMap) -> None:
    """The same as Megatron-Bridge names it."""
    tower = _blocks(to, module)
    parts = {"norm": "patch_norm", "linear_fc1": "linear_fc1", "linear_fc2": "linear_fc2"}
    _merger(to, f"{OURS}merger.", f"{THEIRS}merger.", parts)
    for level in range(len(tower.config.deepstack)):
        theirs = f"{THEIRS}decoder.deepstack_merger_list.{level}."
        _merger(to, f"{OURS}deepstack_merger_list.{level}.", theirs, parts)


def _as_it_is(prefixes: Mapping[str, str]) -> AddTower:
    """transformers' modules, unchanged, below other names."""

    def add(to: Builder, module: VLM, released: WeightMap) -> None:
        for ours, theirs in prefixes.items():
            for name in leaves(to.ours, ours):
                to.keep(f"{theirs}{name}", f"{ours}{name}")

    return add


def _as_released(to: Builder, module: VLM, released: WeightMap) -> None:
    """The modules of a family's own code, unchanged, below ``visual``: tensors as its checkpoints have them."""
    tiles: dict[str, list[Tile]] = {}
    for name, shape in to.ours.items():
        if name.startswith(("model.language_model.", "lm_head.")):
            continue
        for piece in released.pieces(name, shape):
            found = piece.overlap(whole(shape))
            assert found is not None, f"{piece} holds nothing of {name}"
            inside, where = found
            tiles.setdefault(piece.disk, []).append(Tile(name, where, inside, piece.turned))
    for disk, held in tiles.items():
        ends = tuple(max(tile.where[at].stop for tile in held) for at in range(len(held[0].where)))
        to.add(f"visual.{disk}", Row(Tiling(ends, tuple(held))))


def _lm_tiled(to: Builder, module: VLM, released: WeightMap) -> None:
    """A tiled tower as Megatron-LM's example has it, and its projection."""
    config = cast(TiledTower, module.visual).config
    own = "model.vision_tower."
    refused = {"use_mask_token": config.mask_token, "use_mean_pooling": config.final_norm}
    for name in (name for name, wrong in refused.items() if wrong):
        raise UserError(f"config.json: Megatron-LM's towers cannot express this value of vision_config.{name}")
    to.keep(f"{THEIRS}class_token", f"{own}embeddings.cls_token")
    places = f"{own}embeddings.position_embeddings"
    if places in to.ours:
        to.keep(f"{THEIRS}position_embeddings.weight", places, shape=to.ours[places][1:])
    for leaf in LEAVES:
        to.keep(f"{THEIRS}conv1.{leaf}", f"{own}embeddings.patch_embeddings.projection.{leaf}")
    for index in range(config.depth):
        _tiled_layer(
            to, f"{own}encoder.layer.{index}.", f"{THEIRS}decoder.layers.{index}.", config.hidden, config.heads
        )
    projector, theirs = "model.multi_modal_projector.", "vision_projection.encoder."
    for leaf in LEAVES:
        _keep(to, f"{theirs}linear_fc1.layer_norm_{leaf}", f"{projector}layer_norm.{leaf}")
        _keep(to, f"{theirs}linear_fc1.{leaf}", f"{projector}linear_1.{leaf}", COLUMNS)
        _keep(to, f"{theirs}linear_fc2.{leaf}", f"{projector}linear_2.{leaf}", ROWS if leaf == "weight" else COPIED)


def _tiled_layer(to: Builder, ours: str, theirs: str, hidden: int, heads: int) -> None:
    """One layer. Where tensor ranks do not divide the heads there are empty ones, as there may be in ours."""
    head = hidden // heads
    attention, their = f"{ours}attention.", f"{theirs}self_attention."
    for one, two in {"lambda_1": "ls1", "lambda_2": "ls2"}.items():
        to.keep(f"{theirs}{two}", f"{ours}{one}")
    for leaf in LEAVES:
        _keep(to, f"{theirs}input_layernorm.{leaf}", f"{ours}layernorm_before.{leaf}")
        _keep(to, f"{theirs}pre_mlp_layernorm.{leaf}", f"{ours}layernorm_after.{leaf}")
        if f"{attention}q_proj.{leaf}" in to.ours:
            parts: list[Source] = [(f"{attention}{name}_proj.{leaf}", 0, head) for name in "qkv"]
            all_heads = to.ours[parts[0][0]][0] // head
            to.interleave(f"{their}linear_qkv.{leaf}", parts, all_heads, Split(0, unit=3 * head, least=3 * hidden))
        if f"{attention}projection_layer.{leaf}" in to.ours:
            across = Split(1, unit=head, least=hidden) if leaf == "weight" else COPIED
            to.keep(f"{their}linear_proj.{leaf}", f"{attention}projection_layer.{leaf}", across)
        to.keep(f"{theirs}mlp.linear_fc1.{leaf}", f"{ours}mlp.fc1.{leaf}", COLUMNS)
        to.keep(f"{theirs}mlp.linear_fc2.{leaf}", f"{ours}mlp.fc2.{leaf}", ROWS if leaf == "weight" else COPIED)
    for name in "qk":
        if f"{attention}{name}_norm.weight" in to.ours:
            own, split = f"{attention}{name}_norm.weight", Split(0, unit=head, least=hidden)
            to.keep(f"{their}{name}_layernorm.weight", own, split)


_SEEN_BY_SWIFT = _as_it_is({OURS: "visual.visual."})
_SEEN_BY_BRIDGE = _as_it_is({OURS: "visual."})
_TILED_BY_SWIFT = _as_it_is(
    {"model.vision_tower.": "visual.vision_tower.", "model.multi_modal_projector.": "visual.multi_modal_projector."}
)
_DEEPSTACK: Mapping[str, AddTower] = {"pai": _pai_deepstack, "bridge": _bridge_deepstack, "swift": _SEEN_BY_SWIFT}

TOWERS: Mapping[str, Mapping[str, AddTower]] = {
    "qwen2_5_vl": {"pai": _pai_windowed, "bridge": _SEEN_BY_BRIDGE, "swift": _SEEN_BY_SWIFT},
    "qwen3_vl": _DEEPSTACK,
    "qwen3_vl_moe": _DEEPSTACK,
    "glm4v_moe": {"bridge": _SEEN_BY_BRIDGE, "swift": _SEEN_BY_SWIFT},
    "internvl": {"swift": _TILED_BY_SWIFT, "lm": _lm_tiled},
    "internvl_chat": {"swift": _as_released, "lm": _lm_tiled},
    "nvlm_d": {"lm": _lm_tiled},
    "composite": {},
}
"""How each dialect names the towers it has, by family."""
