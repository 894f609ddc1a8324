"""Reading ``torch_dist`` checkpoints: PyTorch's distributed format as Megatron fills it, without Megatron.

    iter_0000010/ or release/
      metadata.json            says that it is one
      .metadata                pickle: every tensor's type, shape and chunks, and where each chunk lies
      common.pt                everything that is not sharded: arguments, iteration
      __<rank>_<n>.distcp      torch.save archives, one per chunk, one after the other

A chunk is a box of a global tensor. The layers of a homogeneous block are one tensor with the layer as dimension 0
(``decoder.layers.mlp.linear_fc2.weight [L, H, F]``); others are kept one by one, and for a while single experts and the
two halves of gated matrices were, too. All of these become the same canonical names. Only the chunks that a region
overlaps are opened, and of those only its bytes are read. Optimizer and random states are passed over.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tessera.config.errors import UserError
from tessera.contract.shards import whole
from tessera.weights.megatron import archive
from tessera.weights.megatron.assembled import Found
from tessera.weights.megatron.stored import Stored
from tessera.weights.megatron.tiling import Shape, Tile, Tiling
from tessera.weights.megatron.unpickle import Inert, loads

METADATA = ".metadata"
OTHER_STATE = re.compile(r"^(optimizer|rng_state|rerun_state_machine_state|opt_param_scheduler|chained_\d+)\b")
PREFIX = re.compile(r"^(module\.|model\d*\.)+")
STACKED = re.compile(r"\.(layers|deepstack_merger_list)\.(?!\d)")
EXPERT = re.compile(r"(.*\.experts\.experts)\.(\d+)\.(.+)")
HALF = re.compile(r"(.*)_([wv])$")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor and the archive that holds it."""

    offset: Shape
    shape: Shape
    file: str
    start: int
    length: int


class Chunks(Mapping[str, Stored]):
    """The chunks of a checkpoint by key, each opened when it is asked for."""

    def __init__(self, path: Path, chunks: Mapping[str, tuple[Chunk, torch.dtype]]) -> None:
        self._path, self._chunks = path, chunks
        self._opened: dict[str, Stored] = {}

    def __getitem__(self, key: str) -> Stored:
        if key not in self._opened:
            chunk, dtype = self._chunks[key]
            held = archive.load(self._path / chunk.file, chunk.start, chunk.length)
            if not isinstance(held, Stored) or (held.shape, held.dtype) != (chunk.shape, dtype):
                raise UserError(f"{self._path / chunk.file}: chunk {key} is not what .metadata says it is")
            self._opened[key] = held
        return self._opened[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._chunks)

    def __len__(self) -> int:
        return len(self._chunks)


def read(path: Path) -> Found:
    """The tensors of the directory ``path`` (an ``iter_*`` or ``release``); headers are read, data is not."""
    _check_backend(path / "metadata.json")
    tensors = _metadata(path)
    _check_files(path, tensors)
    chunks = {
        f"{name}@{','.join(map(str, chunk.offset))}": (chunk, dtype)
        for name, (dtype, _, parts) in tensors.items()
        for chunk in parts
    }
    whole_ones: dict[str, Tiling] = {}
    dtypes: dict[str, torch.dtype] = {}
    for name, (dtype, shape, parts) in tensors.items():
        tiles = []
        for chunk in parts:
            where = tuple(slice(at, at + size) for at, size in zip(chunk.offset, chunk.shape, strict=True))
            tiles.append(Tile(f"{name}@{','.join(map(str, chunk.offset))}", whole(chunk.shape), where))
        whole_ones[name] = Tiling(shape, tuple(tiles))
        dtypes[name] = dtype
    canonical = _canonical({name: tiling.shape for name, tiling in whole_ones.items()})
    tilings = {name: tiling.through(whole_ones) for name, tiling in canonical.items()}
    types = {name: dtypes[tiling.tiles[0].source] for name, tiling in canonical.items()}
    return Found(path, tilings, types, Chunks(path, chunks))


def _check_backend(file: Path) -> None:
    """UserError if the directory says that it is of another format."""
    if not file.is_file():
        return
    try:
        kind = json.loads(file.read_text("utf-8")).get("sharded_backend", "torch_dist")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file}: not a readable JSON file ({error})") from error
    if kind != "torch_dist":
        raise UserError(f"{file}: format {kind} is not supported; save it with --ckpt-format torch_dist or torch")


def common(path: Path) -> Mapping[str, Any]:
    """What ``common.pt`` holds, ``{}`` if there is none."""
    file = path / "common.pt"
    if not file.is_file():
        return {}
    held = archive.load(file)
    return held if isinstance(held, Mapping) else {}


def _metadata(path: Path) -> dict[str, tuple[torch.dtype, Shape, list[Chunk]]]:
    """Type, shape and chunks of every model tensor, as ``.metadata`` has them."""
    file = path / METADATA
    if not file.is_file():
        raise UserError(f"{path}: has no {METADATA}: the checkpoint was not finished, or not copied whole")
    data = loads(file.read_bytes(), str(file))
    try:
        described, stored = data.field("state_dict_metadata"), data.field("storage_data")
        places: dict[tuple[str, Shape], Any] = {}
        for index, info in stored.items():
            places[index.field("fqn"), tuple(index.field("offset") or ())] = info
        tensors = {}
        for name, held in described.items():
            if OTHER_STATE.match(PREFIX.sub("", name)) or OTHER_STATE.match(name) or "_extra_state" in name:
                continue
            size = held.field("size")
            if size is None:  # an object, not a tensor
                continue
            dtype = _dtype(held.field("properties"))
            chunks = [_chunk(name, part, places, file) for part in held.field("chunks")]
            tensors[name] = (dtype, tuple(size), chunks)
    except (AttributeError, TypeError, KeyError, IndexError) as error:
        raise UserError(f"{file}: not the metadata of a distributed checkpoint ({error})") from error
    return tensors


def _dtype(properties: Inert) -> torch.dtype:
    state = properties.state
    found = state[0] if isinstance(state, tuple) else state["dtype"]
    assert isinstance(found, torch.dtype)
    return found


def _chunk(name: str, part: Inert, places: Mapping[tuple[str, Shape], Any], file: Path) -> Chunk:
    offset, shape = tuple(part.field("offsets")), tuple(part.field("sizes"))
    info = places.get((name, offset))
    if info is None:
        raise UserError(f"{file}: says nothing about where {name} at {list(offset)} is stored")
    return Chunk(offset, shape, info.field("relative_path"), info.field("offset"), info.field("length"))


def _check_files(path: Path, tensors: Mapping[str, tuple[torch.dtype, Shape, list[Chunk]]]) -> None:
    """UserError if a file is missing, or shorter than the chunks in it."""
    needed: dict[str, int] = defaultdict(int)
    for _, _, chunks in tensors.values():
        for chunk in chunks:
            if Path(chunk.file).name != chunk.file:
                raise UserError(f"{path / METADATA}: names {chunk.file}, which is outside the checkpoint")
            needed[chunk.file] = max(needed[chunk.file], chunk.start + chunk.length)
    for name, size in needed.items():
        file = path / name
        if not file.is_file():
            raise UserError(f"{file}: is missing; copy the checkpoint again")
        if file.stat().st_size < size:
            raise UserError(f"{file}: is cut short ({file.stat().st_size} bytes of {size}); copy the checkpoint again")


def _canonical(shapes: Mapping[str, Shape]) -> dict[str, Tiling]:
    """Canonical names in terms of the names on disk: layers one by one, experts and halves together."""
    found: dict[str, Tiling] = {}
    parts: dict[str, dict[tuple[int, int], tuple[str, Shape]]] = defaultdict(dict)
    for disk, shape in shapes.items():
        name = PREFIX.sub("", disk)
        stacked = STACKED.search(f".{name}")
        if stacked is not None:
            at = stacked.end() - 1
            for layer in range(shape[0]):
                inside = (slice(layer, layer + 1), *whole(shape[1:]))
                found[f"{name[:at]}{layer}.{name[at:]}"] = Tiling(shape[1:], (Tile(disk, inside, whole(shape[1:])),))
            continue
        expert, half = EXPERT.fullmatch(name), HALF.fullmatch(name)
        if expert is None and half is None:
            found[name] = Tiling(shape, (Tile(disk, whole(shape), whole(shape)),))
            continue
        leaf = expert[3] if expert else name
        half = HALF.fullmatch(leaf)
        base = half[1] if half else leaf
        index = int(expert[2]) if expert else -1
        parts[f"{expert[1]}.{base}" if expert else base][index, "wv".index(half[2]) if half else 0] = (disk, shape)
    return found | {name: _joined(name, held) for name, held in parts.items()}


def _joined(name: str, held: Mapping[tuple[int, int], tuple[str, Shape]]) -> Tiling:
    """One tensor from those of its experts and halves."""
    shape = next(iter(held.values()))[1]
    halves = 1 + max(half for _, half in held)
    experts = 1 + max(index for index, _ in held)
    rows, rest = shape[0], shape[1:]
    tiles = []
    for (index, half), (disk, found) in sorted(held.items()):
        if found != shape:
            raise UserError(f"{disk}: has shape {list(found)}, its siblings {list(shape)}")
        where: tuple[slice, ...] = (slice(half * rows, (half + 1) * rows), *whole(rest))
        tiles.append(Tile(disk, whole(shape), (slice(index, index + 1), *where) if index >= 0 else where))
    full = (rows * halves, *rest)
    return Tiling((experts, *full) if experts else full, tuple(tiles))
