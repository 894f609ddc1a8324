"""Checkpoints put together, or cut again, by their names alone: no model configuration is needed.

Megatron-LM's multimodal example makes its first checkpoint from a language model and a tower that were converted each
for itself (:func:`combine` puts ``language_model.`` and ``vision_model.`` in front of their names; the projection
between them is left to be trained), and then moves layers between pipeline stages (:func:`repipeline`). Shards stay
what they are, rank by rank, so both work on any model. :func:`tower_to_megatron` is the first step: a tower alone, as
its own repository has it.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tessera.config.errors import UserError
from tessera.weights.files import at_once
from tessera.weights.hf import Checkpoint
from tessera.weights.megatron import archive, legacy, legacy_writer
from tessera.weights.megatron.checkpoint import LEGACY, Megatron, locate
from tessera.weights.megatron.convert import stored_in, widest, write
from tessera.weights.megatron.legacy import LAYER, Rank, RankFile
from tessera.weights.megatron.options import Options
from tessera.weights.megatron.publish import publishing
from tessera.weights.megatron.ranks import Ranks
from tessera.weights.megatron.stored import Reader, Stored
from tessera.weights.megatron.table import COLUMNS, COPIED, ROWS, Builder, Source, Split
from tessera.weights.megatron.tiling import Tiling, same
from tessera.weights.saving import some

LANGUAGE, VISION = "language_model.", "vision_model."
PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype)


@dataclass(slots=True)
class _File:
    """A rank's file to be written: tensors by name, and names of empty extra states."""

    tensors: dict[str, Stored] = field(default_factory=dict)
    extras: list[str] = field(default_factory=list)

    def take(self, file: RankFile, called: Callable[[str, int], str | None]) -> None:
        """The tensors of another rank's file under the names that ``called`` gives (name, first layer); None: not."""
        for model, begin in zip(file.models, file.begins, strict=True):
            for name, value in archive.leaves(model):
                new = called(legacy.PREFIX.sub("", name), begin)
                if new is not None and isinstance(value, Stored):
                    self.tensors[new] = value
                elif new is not None and "_extra_state" in name:
                    self.extras.append(new)


def combine(language: Path, vision: Path, root: Path, *, iteration: int = 1) -> tuple[int, int]:
    """Write the language model and the tower at these paths as one checkpoint below ``root``; tensors of each.

    Both must be rank by rank checkpoints of equally many tensor ranks; the tower goes to the first pipeline stage.
    UserError if they do not fit together.
    """
    text, seeing = _legacy(language, "--mcore_model"), _legacy(vision, "--mcore_vision_model")
    one, two = legacy.open_ranks(text.path), legacy.open_ranks(seeing.path)
    tensor = 1 + max(rank[0] for rank in one)
    if tensor != 1 + max(rank[0] for rank in two):
        raise UserError(
            f"--mcore_vision_model {vision}: has {1 + max(rank[0] for rank in two)} tensor ranks, the language model "
            f"{tensor}; convert one of them with --target_tensor_parallel_size"
        )
    if any(rank[1] or rank[2] for rank in two):
        raise UserError(f"--mcore_vision_model {vision}: a tower has no pipeline or expert ranks")
    for found, path in ((one, language), (two, vision)):
        if any(name.startswith((VISION, "vision_projection.")) for file in found.values() for name in file.models[0]):
            raise UserError(f"{path}: already holds a combined model")
    files: dict[Rank, _File] = {}
    for rank, file in one.items():
        made = files[rank] = _File()
        made.take(file, lambda name, begin: _below(LANGUAGE, name))
        if rank[1] == 0:
            made.take(two[rank[0], 0, 0], lambda name, begin: _below(VISION, name))
    names = [name for rank, file in files.items() if rank[0] == rank[2] == 0 for name in file.tensors]
    seen = sum(name.startswith(VISION) for name in names)
    counts = len(names) - seen, seen
    ranks = Ranks(tp=tensor, pp=1 + max(r[1] for r in one), ep=1 + max(r[2] for r in one))
    _write(root, files, ranks, legacy.arguments(f.held for f in one.values()), iteration)
    return counts


def repipeline(source: Path, root: Path, pp: int, *, stages: tuple[int, ...] | None = None, iteration: int = 1) -> int:
    """Write the rank by rank checkpoint at ``source`` for ``pp`` pipeline stages below ``root``; its layers.

    ``stages``: layers of each stage, if they are not equally many. Tensor and expert ranks stay.
    """
    found = legacy.open_ranks(_legacy(source, "--mcore_model").path)
    layers = 1 + max(_layer(name, begin) for file in found.values() for name, begin, _ in file.tensors())
    args = legacy.arguments(file.held for file in found.values())
    said = vars(args).get("num_layers") if args is not None else None
    if said is not None and said != layers:
        raise UserError(f"{source}: has {layers} layers, but its arguments say num_layers {said}; ranks are missing")
    ranks = Ranks(tp=1 + max(r[0] for r in found), pp=pp, ep=1 + max(r[2] for r in found), stages=stages)
    cuts = ranks.layers(layers)
    files: dict[Rank, _File] = {}
    tied = bool(args is not None and not vars(args).get("untie_embeddings_and_output_weights", True))
    for (tp, _, ep), file in found.items():
        for stage, held in enumerate(cuts):
            made = files.setdefault((tp, stage, ep), _File())
            made.take(file, partial(_local, held, stage, pp, tied))
            if tied and pp > 1 and stage == pp - 1:
                made.take(file, lambda name, begin: _as_head(name))
    _write(root, files, ranks, args, iteration)
    return layers


def _legacy(path: Path, flag: str) -> Megatron:
    found = locate(path)
    if found.format != LEGACY:
        raise UserError(f"{flag} {path}: is a torch_dist checkpoint; convert it with --mcore_format torch first")
    return found


def _below(prefix: str, name: str) -> str:
    return name if name.startswith(prefix) else prefix + name


def _layer(name: str, begin: int) -> int:
    found = LAYER.fullmatch(name)
    return begin + int(found[2]) if found else -1


def _local(held: range, stage: int, pp: int, tied: bool, name: str, begin: int) -> str | None:
    """What a tensor is called on a stage that has the layers ``held``; None if it is not there."""
    found = LAYER.fullmatch(name)
    if found is not None:
        layer = begin + int(found[2])
        return f"{found[1]}{layer - held.start}.{found[3]}" if layer in held else None
    if name.endswith("output_layer.weight") and tied:
        return None  # a copy of the embedding, for a last stage that is not the first
    last = any(part in name for part in ("decoder.final_layernorm.", "decoder.final_norm.", "output_layer."))
    last = last and not name.startswith(VISION)
    return name if stage == (pp - 1 if last else 0) else None


def _as_head(name: str) -> str | None:
    ending = "embedding.word_embeddings.weight"
    return f"{name.removesuffix(ending)}output_layer.weight" if name.endswith(ending) else None


def _write(root: Path, files: Mapping[Rank, _File], ranks: Ranks, args: Namespace | None, iteration: int) -> None:
    """Write every rank's file and the tracker."""
    told: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": iteration}
    if args is not None:
        kept = {key: value for key, value in vars(args).items() if isinstance(value, PLAIN)}
        kept |= {"tensor_model_parallel_size": ranks.tp, "pipeline_model_parallel_size": ranks.pp}
        told["args"] = Namespace(**kept)

    def write_rank(rank: Rank) -> None:
        file = files[rank]
        blanks = {name: archive.Blank(held.dtype, held.shape) for name, held in file.tensors.items()}
        made = {blanks[name]: same(name, held.shape) for name, held in file.tensors.items()}
        with Reader(file.tensors) as reader:
            values: dict[str, Tiling] = {name: same(name, held.shape) for name, held in file.tensors.items()}
            held = {**told, "model": {**blanks, **dict.fromkeys(file.extras)}}
            legacy_writer.write_file(folder / legacy_writer.folder_of(ranks, *rank), held, made, values, reader)

    with publishing(root, iteration) as folder:
        at_once(partial(write_rank, rank) for rank in files)


def tower_to_megatron(checkpoint: Checkpoint, config: Mapping[str, Any], root: Path, options: Options) -> int:
    """Write a tower of tiles alone, as its own repository names its tensors, for Megatron-LM; how many tensors.

    UserError if the tensors are not such a tower's.
    """
    shapes = {name: entry.shape for name, entry in checkpoint.entries.items()}
    to = Builder(shapes)
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        _add_tower(to, int(config["num_hidden_layers"]), hidden, hidden // heads, heads)
    except KeyError as error:
        raise UserError(f"{checkpoint.path}: no tower of this kind: {error.args[0]} is missing") from error
    placed = {tile.source for row in to.rows.values() for tile in row.tiling.tiles}
    unknown = sorted(shapes.keys() - placed)
    if unknown:
        raise UserError(f"{checkpoint.path}: {len(unknown)} tensors have no place in a tower: {some(unknown)}")
    table = to.table("lm", "", None)
    stored = stored_in(checkpoint)
    dtypes = widest(table, {name: held.dtype for name, held in stored.items()}, options.dtype)
    write(root, table, table.tilings, dtypes, stored, options, config)
    return len(table.rows)


def _add_tower(to: Builder, depth: int, hidden: int, head: int, heads: int) -> None:
    to.keep("class_token", "embeddings.class_embedding")
    places = "embeddings.position_embedding"
    to.keep("position_embeddings.weight", places, shape=to.ours[places][1:])
    for leaf in ("weight", "bias"):
        to.keep(f"conv1.{leaf}", f"embeddings.patch_embedding.{leaf}")
    for index in range(depth):
        ours, theirs = f"encoder.layers.{index}.", f"decoder.layers.{index}."
        for name in ("ls1", "ls2"):
            to.keep(f"{theirs}{name}", f"{ours}{name}")
        for leaf in ("weight", "bias"):
            down = ROWS if leaf == "weight" else COPIED
            across = Split(1, unit=head, least=hidden) if leaf == "weight" else COPIED
            for their, own, split in (
                ("input_layernorm", "norm1", COPIED),
                ("pre_mlp_layernorm", "norm2", COPIED),
                ("self_attention.linear_proj", "attn.proj", across),
                ("mlp.linear_fc1", "mlp.fc1", COLUMNS),
                ("mlp.linear_fc2", "mlp.fc2", down),
            ):
                if leaf == "weight" or f"{ours}{own}.bias" in to.ours:
                    to.keep(f"{theirs}{their}.{leaf}", f"{ours}{own}.{leaf}", split)
            qkv = f"{ours}attn.qkv.{leaf}"
            if leaf == "weight" or qkv in to.ours:
                parts: list[Source] = [(qkv, at * hidden, head) for at in range(3)]
                split = Split(0, unit=3 * head, least=3 * hidden)
                to.interleave(f"{theirs}self_attention.linear_qkv.{leaf}", parts, heads, split)
        for name in ("q", "k"):
            norm = f"{ours}attn.{name}_norm.weight"
            if norm in to.ours:
                to.keep(f"{theirs}self_attention.{name}_layernorm.weight", norm, Split(0, unit=head, least=hidden))
