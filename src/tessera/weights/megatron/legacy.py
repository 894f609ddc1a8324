"""Rank by rank checkpoints (``--ckpt-format torch``): what every rank's module had, under that module's names.

    iter_0000001/mp_rank_<tp>[_<pp>][_<ep>]/model_optim_rng.pt      {"args", "checkpoint_version", "iteration", "model"}

A suffix is there if the job had more than one pipeline or expert rank. Three things differ from the canonical names:
layers are counted from zero on every pipeline stage; experts are single tensors, counted from zero on every expert
rank, and called by the module that ran them; and each tensor is a rank's shard. :func:`read` opens the files (nothing
but their pickles is read), :meth:`RankFiles.merged` puts the shards together as a table says, and :func:`write` cuts.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from tessera.config.errors import UserError
from tessera.weights.megatron import archive
from tessera.weights.megatron.assembled import Found, fitting
from tessera.weights.megatron.ranks import Ranks, shard
from tessera.weights.megatron.stored import Stored
from tessera.weights.megatron.table import Row, Table
from tessera.weights.megatron.tiling import Tile, Tiling, same

FILES = ("model_optim_rng.pt", "model_rng.pt")
FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3}))?(?:_(\d{3}))?")
PREFIX = re.compile(r"^(module\.)+")
LAYER = re.compile(r"((?:language_model\.)?decoder\.layers\.)(\d+)\.(.*)")
GROUPED = re.compile(r"(.*\.mlp\.experts)\.(linear_fc[12]\.(?:weight|bias))(\d+)")
SEQUENTIAL = re.compile(r"(.*\.mlp\.experts)\.local_experts\.(\d+)\.(linear_fc[12]\.(?:weight|bias))")
TOGETHER = re.compile(r"(.*\.mlp\.experts)\.weight([12])")
EXTRA = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclass(frozen=True, slots=True)
class Piece:
    """What one rank holds of a canonical tensor: ``expert`` (local index) if it is one of several, ``joint`` if it is
    all of the rank's experts in one transposed tensor."""

    key: str
    tp: int
    ep: int
    expert: int | None = None
    joint: bool = False


@dataclass(frozen=True, slots=True)
class RankFiles:
    """The opened files: pieces by canonical name, what is stored, and how many ranks there are of each kind."""

    path: Path
    names: Mapping[str, Sequence[Piece]]
    stored: Mapping[str, Stored]
    tp: int
    ep: int
    args: Namespace | None

    def merged(self, table: Table) -> Found:
        """Shards put together to the tensors of ``table``; names it does not know are kept to be reported."""
        called = fitting(self.names, table)
        etp = self._expert_tp(table, called)
        ranks = Ranks(tp=self.tp, ep=self.ep, etp=etp)
        if table.experts % self.ep:
            raise UserError(f"{self.path}: {self.ep} expert ranks do not divide the {table.experts} experts")
        stored = dict(self.stored)
        tilings: dict[str, Tiling] = {}
        for name, spelled in called.items():
            row = self._fitted(name, table, self.names[spelled])
            tilings[spelled] = self._join(name, row, ranks, self.names[spelled], stored)
        for name in self.names.keys() - set(called.values()):
            key = self.names[name][0].key
            tilings[name] = same(key, stored[key].shape)
        types = {name: self.stored[self.names[name][0].key].dtype for name in tilings}
        return Found(self.path, tilings, types, stored)

    def _expert_tp(self, table: Table, called: Mapping[str, str]) -> int:
        """Ranks that divide an expert: one, if a rank holds whole ones."""
        for name, spelled in called.items():
            piece, row = self.names[spelled][0], table.rows[name]
            if row.split.experts:
                held = prod(self.stored[piece.key].shape) // (
                    1 if piece.expert is not None else row.shape[0] // self.ep
                )
                return 1 if held == prod(row.shape[1:]) else self.tp
        return self.tp

    def _fitted(self, name: str, table: Table, pieces: Sequence[Piece]) -> Row:
        """The table's row, as long as the shards together where it may be of another length."""
        row = table.rows[name]
        axis = row.split.axis
        least = row.split.least or (row.shape[axis or 0] if name in (table.embedding, table.head) else 0)
        if axis is None or not least:
            return row
        shape = self.stored[pieces[0].key].shape
        total = shape[axis] * self.tp if axis < len(shape) else 0
        return table.resized({name: total}).rows[name] if total >= least else row

    def _join(self, name: str, row: Row, ranks: Ranks, pieces: Sequence[Piece], stored: dict[str, Stored]) -> Tiling:
        """The whole of a tensor in terms of the ranks' pieces."""
        count = 1 if row.split.axis is None else ranks.expert_tp if row.split.experts else ranks.tp
        tiles: dict[tuple[int, ...], Tile] = {}
        for piece in pieces:
            mine = shard(name, row, ranks, piece.tp % count, piece.ep)
            held, key = self.stored[piece.key], piece.key
            expected = mine.shape if piece.expert is None else mine.shape[1:]
            if piece.joint:
                # Experts side by side in memory, each transposed; the shape it is stored with only looks otherwise.
                expected = (mine.shape[0], mine.shape[2], mine.shape[1])
                fits = prod(held.shape) == prod(expected)
                key = f"{piece.key}#experts"
                stored[key] = replace(held, shape=expected)
            else:
                fits = held.shape == expected
            if not fits:
                raise UserError(
                    f"{held.file}: {name} has shape {list(held.shape)}, expected {list(expected)} of {count} tensor "
                    "ranks; config.json does not fit these weights, or ranks are missing"
                )
            for tile in mine.tiles:
                found = _place(tile, piece, key)
                tiles.setdefault(tuple(cut.start for cut in found.where), found)
        return Tiling(row.shape, tuple(tiles.values()))


def _place(tile: Tile, piece: Piece, key: str) -> Tile:
    """A tile of the whole tensor from one of a shard (whole -> shard)."""
    inside, where = tile.where, tile.inside
    if piece.expert is not None:
        first = where[0].start + piece.expert
        return Tile(key, inside[1:], (slice(first, first + 1), *where[1:]))
    if piece.joint:
        return Tile(key, (inside[0], inside[2], inside[1]), where, turned=True)
    return Tile(key, inside, where)


@dataclass(frozen=True, slots=True)
class RankFile:
    """The opened file of a rank: its state dicts (one per virtual stage) and the layer each of them begins with."""

    folder: Path
    held: Mapping[str, Any]
    models: Sequence[Mapping[str, Any]]
    begins: Sequence[int]

    def tensors(self) -> Iterator[tuple[str, int, Stored]]:
        """Local names, where the layers of their state dict begin, and tensors; extra states are passed over."""
        for model, begin in zip(self.models, self.begins, strict=True):
            for name, tensor in archive.tensors(model):
                if "_extra_state" not in name:
                    yield PREFIX.sub("", name), begin, tensor


Rank = tuple[int, int, int]
"""Tensor, pipeline and expert rank."""


def open_ranks(path: Path) -> dict[Rank, RankFile]:
    """The files of all ranks below ``path``; UserError if one is missing, damaged or not to be trusted."""
    folders = {folder: FOLDER.fullmatch(folder.name) for folder in sorted(path.glob("mp_rank_*"))}
    loaded = {folder: archive.load(_file(folder)) for folder, found in folders.items() if found is not None}
    if not loaded:
        raise UserError(f"{path}: has no mp_rank_* directories")
    for folder, held in loaded.items():
        if not isinstance(held, Mapping):
            raise UserError(f"{_file(folder)}: holds no dictionary, so no model")
    ranks = _coordinates(path, loaded, arguments(loaded.values()))
    begins = _layer_offsets(loaded, ranks)
    found = {}
    for rank, folder in sorted(ranks.items()):
        models = _models(loaded[folder], folder)
        found[rank] = RankFile(folder, loaded[folder], models, [begins[rank[1], at] for at in range(len(models))])
    return found


def arguments(files: Iterable[Mapping[str, Any]]) -> Namespace | None:
    """The job's arguments, from the first file that has them."""
    return next((held["args"] for held in files if isinstance(held.get("args"), Namespace)), None)


def read(path: Path) -> RankFiles:
    """What the ranks hold, by canonical name; their pickles are read, data is not."""
    ranks = open_ranks(path)
    names: dict[str, list[Piece]] = {}
    stored: dict[str, Stored] = {}
    for (tp, _, ep), file in ranks.items():
        for local, begin, tensor in file.tensors():
            key = f"{file.folder.name}/{begin}/{local}"
            stored[key] = tensor
            name, piece = _canonical(local, begin, Piece(key, tp, ep))
            names.setdefault(name, []).append(piece)
    args = arguments(file.held for file in ranks.values())
    return RankFiles(path, names, stored, 1 + max(r[0] for r in ranks), 1 + max(r[2] for r in ranks), args)


def common(path: Path) -> Mapping[str, Any]:
    """What the first rank's file holds beside the tensors."""
    folder = next((f for f in sorted(path.glob("mp_rank_*")) if FOLDER.fullmatch(f.name)), None)
    if folder is None:
        return {}
    held = archive.load(_file(folder))
    return {key: value for key, value in held.items() if not re.fullmatch(r"model\d*", key)}


def _file(folder: Path) -> Path:
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: has no {FILES[0]}; copy the checkpoint again")


def _coordinates(
    path: Path, loaded: Mapping[Path, Mapping[str, Any]], args: Namespace | None
) -> dict[tuple[int, int, int], Path]:
    """The (tensor, pipeline, expert) rank of every directory; UserError if ranks are missing."""
    groups = {folder: FOLDER.fullmatch(folder.name) for folder in loaded}
    numbers = {folder: [int(x) for x in found.groups() if x is not None] for folder, found in groups.items() if found}
    counts = {len(held) for held in numbers.values()}
    if len(counts) != 1:
        raise UserError(f"{path}: mp_rank_* directories are of more than one layout")
    (count,) = counts
    fields = vars(args) if args is not None else {}
    experts = count == 2 and _second_is_expert(numbers, loaded, fields)
    found = {}
    for folder, held in numbers.items():
        pp = held[1] if count > 1 and not experts else 0
        ep = held[-1] if count == 3 or experts else 0
        found[held[0], pp, ep] = folder
    wanted = {at: 1 + max(rank[at] for rank in found) for at in range(3)}
    flags = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")
    for at, flag in enumerate(flags):
        said = fields.get(flag)
        size = said if isinstance(said, int) and (at < 2 or count == 3 or experts) else wanted[at]
        there = {rank[at] for rank in found}
        missing = sorted(set(range(max(size, wanted[at]))) - there)
        if missing:
            raise UserError(f"{path}: {flag} is {max(size, wanted[at])}, but rank {missing[0]} is missing")
    for tp in range(wanted[0]):
        for pp in range(wanted[1]):
            if not any(rank[:2] == (tp, pp) for rank in found):
                raise UserError(
                    f"{path}: tensor rank {tp} of pipeline stage {pp} is missing; copy the checkpoint again"
                )
    return found


def _second_is_expert(
    numbers: Mapping[Path, Sequence[int]], loaded: Mapping[Path, Mapping[str, Any]], fields: Mapping[str, Any]
) -> bool:
    """Whether the one suffix counts expert ranks: the job says so, or the second rank has an embedding, too."""
    if "pipeline_model_parallel_size" in fields:
        return bool(fields["pipeline_model_parallel_size"] == 1)
    second = next((folder for folder, held in numbers.items() if held[1] == 1), None)
    names = [name for model in _models(loaded[second], second) for name in model] if second is not None else []
    return any("embedding.word_embeddings" in name for name in names)


def _models(held: Mapping[str, Any], folder: Path) -> list[Mapping[str, Any]]:
    """The state dicts of a rank: one, or one per virtual pipeline stage."""
    if isinstance(held.get("model"), Mapping):
        return [held["model"]]
    found = [held[key] for key in sorted((k for k in held if re.fullmatch(r"model\d+", k)), key=lambda k: int(k[5:]))]
    if not found:
        raise UserError(f"{folder}: its file holds no model (it has {', '.join(map(str, held)) or 'nothing'})")
    return found


def _layer_offsets(
    loaded: Mapping[Path, Mapping[str, Any]], ranks: Mapping[tuple[int, int, int], Path]
) -> dict[tuple[int, int], int]:
    """The global index of the first layer of each (pipeline rank, virtual stage): stages go round the ranks."""
    counts = {}
    for (tp, pp, _), folder in ranks.items():
        if tp == 0 and (pp, 0) not in counts:
            for chunk, model in enumerate(_models(loaded[folder], folder)):
                found = (LAYER.fullmatch(PREFIX.sub("", name)) for name in model)
                counts[pp, chunk] = max((1 + int(match[2]) for match in found if match), default=0)
    begins, at = {}, 0
    for pp, chunk in sorted(counts, key=lambda key: (key[1], key[0])):
        begins[pp, chunk] = at
        at += counts[pp, chunk]
    return begins


def _canonical(name: str, begin: int, piece: Piece) -> tuple[str, Piece]:
    """The canonical name of a rank's tensor, and which part of that it is."""
    found = LAYER.fullmatch(name)
    if found is not None:
        name = f"{found[1]}{begin + int(found[2])}.{found[3]}"
    for pattern, base, leaf, index in ((GROUPED, 1, 2, 3), (SEQUENTIAL, 1, 3, 2)):
        match = pattern.fullmatch(name)
        if match is not None:
            return f"{match[base]}.experts.{match[leaf]}", replace(piece, expert=int(match[index]))
    match = TOGETHER.fullmatch(name)
    if match is not None:
        return f"{match[1]}.experts.linear_fc{match[2]}.weight", replace(piece, joint=True)
    return name, piece
