"""Hugging Face checkpoints: read tensor by tensor into a model, written back as they were found.

A checkpoint directory holds one or several safetensors files (a JSON header with every tensor's type, shape and byte
range, then the bytes) and, beside them, the config, tokenizer and processor files. Reading and writing stream: never
more than one tensor is held in addition to the model, on either side.

Loading accounts for every tensor. A tensor the model needs and the checkpoint lacks, one the model has no place
for, or one of another shape stops the load with their names, unless the family's weight map says why it is so.

Saving with a ``source`` restores that checkpoint's names, order, shards and types, so that a load followed by a save
reproduces the weight files byte for byte, whatever type the model had in memory. Of sharded parameters (DTensors) each
rank reads and writes its own slices, from and to their places in the files.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from tessera.config.errors import UserError
from tessera.contract.shards import Part, whole
from tessera.contract.weightmap import Piece, WeightMap
from tessera.weights.files import DTYPES, INDEX, SINGLE, Entry, read_region
from tessera.weights.saving import SIDE_FILES, Saving, bytes_of, copy_side_files, some
from tessera.weights.shards import held, local, plain

__all__ = [
    "INDEX",
    "SIDE_FILES",
    "SINGLE",
    "Checkpoint",
    "LoadReport",
    "account",
    "check_copy",
    "copy_side_files",
    "load",
    "place",
    "save",
    "shapes_of",
]


class Checkpoint:
    """The tensors of a Hugging Face directory, by name; headers are read now, data when asked for."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        self._data: dict[str, int] = {}
        for file in self._files():
            self._read_header(file)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.entries)

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> Tensor:
        """The tensor ``name`` on the CPU, or the ``part`` of it that these slices cut out."""
        entry = self.entries[name]
        path = self.path / entry.file
        try:
            return read_region(path, self._data[entry.file], entry, whole(entry.shape) if part is None else part)
        except (OSError, EOFError) as error:
            raise UserError(f"{path}: tensor {name} cannot be read ({error}); copy the checkpoint again") from error

    def _files(self) -> list[str]:
        if not self.path.is_dir():
            raise UserError(f"--model {self.path}: no such directory")
        index = self.path / INDEX
        if index.is_file():
            return sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        found = sorted(file.name for file in self.path.glob("*.safetensors"))
        if SINGLE in found:
            return [SINGLE]
        if len(found) == 1:
            return found
        raise UserError(f"{self.path}: expected {SINGLE} or {INDEX}, found {', '.join(found) or 'no safetensors file'}")

    def _read_header(self, file: str) -> None:
        path = self.path / file
        try:
            with path.open("rb") as stream:
                (size,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(size))
        except (OSError, ValueError, struct.error) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error}); copy the checkpoint again") from error
        self._data[file] = 8 + size
        data = path.stat().st_size - self._data[file]
        self.metadata[file] = header.pop("__metadata__", {})
        for name, fields in header.items():
            start, end = fields["data_offsets"]
            if fields["dtype"] not in DTYPES or end > data:
                reason = "is cut short" if end > data else f"has type {fields['dtype']}, which is not supported"
                raise UserError(f"{path}: tensor {name} {reason}")
            self.entries[name] = Entry(file, DTYPES[fields["dtype"]], tuple(fields["shape"]), start, end)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load did: tensors placed, their parameters, and disk tensors left out because the weight map says so."""

    tensors: int
    parameters: int
    left_out: tuple[str, ...]


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a checkpoint of ``module`` holds, by our names."""
    return {name: tuple(tensor.shape) for name, (tensor, _) in _places(module).items()}


def load(
    module: nn.Module,
    checkpoint: Checkpoint,
    weightmap: WeightMap,
    *,
    dtype: torch.dtype | Callable[[str], torch.dtype],
    device: torch.device | str = "cpu",
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    stored: Callable[[str], str | None] = lambda name: name,
) -> LoadReport:
    """Fill ``module`` from ``checkpoint``. Meta tensors are created on ``device``, others overwritten in place.

    ``dtype`` (of floating tensors; per name if it is a function) applies to meta tensors. Sharded parameters get their
    local slice only. Don't call ``to_empty`` before: it would wipe the buffers that no checkpoint stores. If ``module``
    is a part of a model, or has more in it, ``shapes`` are those of the whole, which is what the checkpoint must hold,
    and ``stored`` says what a tensor of ``module`` is called there; None: it gets memory, and values from the caller.
    """
    places = _places(module)
    shapes = shapes or shapes_of(module)
    weightmap, left_out = account(shapes, checkpoint, weightmap)
    parameters = 0
    for own_name, (tensor, owners) in places.items():
        name = stored(own_name)
        asked = dtype if isinstance(dtype, torch.dtype) else dtype(own_name)
        if name is None:
            placed = place(tensor, lambda part: (), asked, torch.device(device))
        else:
            pieces = weightmap.pieces(name, shapes[name])
            found = checkpoint.entries[pieces[0].disk].dtype
            # A buffer's type is part of its meaning (float32 beside half-precision weights); nobody casts it.
            wanted = asked if isinstance(tensor, nn.Parameter) else tensor.dtype
            kept = wanted if found.is_floating_point else found
            placed = place(tensor, partial(regions, checkpoint, pieces), kept, torch.device(device))
            for copy in weightmap.copies(name):
                check_copy(checkpoint, copy, pieces[0].disk, held(placed))
        parameters += tensor.numel()
        if placed is not tensor:
            _register(placed, tensor, owners)
    for child in module.modules():
        for leaf, buffer in child.named_buffers(recurse=False):
            assert not buffer.is_meta, f"{leaf} of {type(child).__name__} has no value and no checkpoint stores it"
            child.register_buffer(leaf, buffer.to(device), leaf not in child._non_persistent_buffers_set)
    return LoadReport(len(places), parameters, left_out)


def reader(
    checkpoint: Checkpoint, weightmap: WeightMap, shapes: Mapping[str, tuple[int, ...]]
) -> Callable[[str, Part], Tensor]:
    """What reads a region of a tensor by our name, as it is stored; every tensor is accounted for first."""
    weightmap, _ = account(shapes, checkpoint, weightmap)
    pieces = {name: weightmap.pieces(name, shape) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        for copy in weightmap.copies(name):
            check_copy(checkpoint, copy, pieces[name][0].disk, whole(shape))

    def read(name: str, part: Part) -> Tensor:
        shape = tuple(cut.stop - cut.start for cut in part)
        found = list(regions(checkpoint, pieces[name], part))
        if len(found) == 1 and found[0][1].shape == shape:
            return found[0][1]
        value = torch.empty(shape, dtype=checkpoint.entries[pieces[name][0].disk].dtype)
        _fill(value, found)
        return value

    return read


def _register(placed: Tensor, old: Tensor, owners: Sequence[tuple[nn.Module, str]]) -> None:
    """Put ``placed`` where ``old`` was."""
    for owner, leaf in owners:
        if isinstance(old, nn.Parameter):
            owner.register_parameter(leaf, nn.Parameter(placed, requires_grad=old.requires_grad))
        else:
            owner.register_buffer(leaf, placed)


def regions(checkpoint: Checkpoint, pieces: Sequence[Piece], part: Part) -> Iterator[tuple[Part, Tensor]]:
    """The values of the region ``part`` of a tensor made of ``pieces``, and where in it each belongs."""
    for piece in pieces:
        found = piece.overlap(part)
        if found is not None:
            inside, where = found
            everything = inside == whole(checkpoint.entries[piece.disk].shape)
            value = checkpoint.read(piece.disk, None if everything else inside)
            yield where, value.transpose(-1, -2) if piece.turned else value


def place(
    tensor: Tensor, read: Callable[[Part], Iterable[tuple[Part, Tensor]]], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``tensor`` with the values that ``read`` yields for a region of it: itself, or a new one if it is meta."""
    if plain(tensor):
        target = torch.empty(tensor.shape, dtype=dtype, device=device) if tensor.is_meta else tensor
        _fill(target, read(whole(tuple(tensor.shape))))
        return target
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor), f"cannot place a {type(tensor).__name__}"
    part, values = held(tensor), local(tensor)
    shape = tuple(cut.stop - cut.start for cut in part)
    target = torch.empty(shape, dtype=dtype, device=device) if values.is_meta else values
    if target.numel():
        _fill(target, read(part))
    if not values.is_meta:
        return tensor
    stride = torch.empty(tensor.shape, device="meta").stride()
    mesh, placements = tensor.device_mesh, tensor.placements
    return DTensor.from_local(target, mesh, placements, run_check=False, shape=tensor.shape, stride=stride)


def _fill(target: Tensor, values: Iterable[tuple[Part, Tensor]]) -> None:
    """Write each value at its place."""
    with torch.no_grad():
        for where, value in values:
            target[where].copy_(value)


def save(
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    out_dir: Path,
    weightmap: WeightMap,
    *,
    source: Path | Checkpoint | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a model's ``tensors`` (by our names) as safetensors into the existing directory ``out_dir``.

    With ``source``: its names, shards, order and types, and a copy of the files beside the weights. ``dtype`` overrides
    the type of floating tensors (default: the source's, else the tensor's own). Ranks that hold parts of the model
    use :class:`~tessera.weights.saving.Saving`.
    """
    origin = Checkpoint(source) if isinstance(source, Path) else source
    limit = bytes_of(max_shard_size)
    Saving.of(dict(tensors), weightmap, origin=origin, dtype=dtype, max_shard_size=limit).write(out_dir)


def _places(module: nn.Module) -> dict[str, tuple[Tensor, list[tuple[nn.Module, str]]]]:
    """Every tensor of the state dict under its first name, with the (owner, attribute) pairs that share it."""
    places: dict[str, tuple[Tensor, list[tuple[nn.Module, str]]]] = {}
    names: dict[int, str] = {}
    for prefix, owner in module.named_modules():
        held = dict(owner.named_parameters(recurse=False, remove_duplicate=False))
        buffers = owner.named_buffers(recurse=False, remove_duplicate=False)
        held |= {leaf: tensor for leaf, tensor in buffers if leaf not in owner._non_persistent_buffers_set}
        for leaf, tensor in held.items():
            name = names.setdefault(id(tensor), f"{prefix}.{leaf}" if prefix else leaf)
            places.setdefault(name, (tensor, []))[1].append((owner, leaf))
    return places


def account(
    shapes: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint, weightmap: WeightMap
) -> tuple[WeightMap, tuple[str, ...]]:
    """The weight map settled for this checkpoint, and the disk names that it leaves out.

    UserError unless the model, whose tensors have ``shapes``, and the checkpoint hold the same ones.
    """
    weightmap = weightmap.settled(shapes, {name: entry.shape for name, entry in checkpoint.entries.items()})
    needed = {
        piece.disk: piece.shape(shape) for name, shape in shapes.items() for piece in weightmap.pieces(name, shape)
    }
    copies = {tie.copy: weightmap.to_disk(tie.ours) for tie in weightmap.ties if tie.copy in checkpoint.entries}
    spare = checkpoint.entries.keys() - needed.keys()
    left_out = tuple(sorted(name for name in spare if name in copies or weightmap.is_ignored(name)))
    problems = {
        "missing": sorted(needed.keys() - checkpoint.entries.keys()),
        "unexpected": sorted(spare - set(left_out)),
        "of another shape": [
            f"{name} (model {list(shape)}, file {list(checkpoint.entries[name].shape)})"
            for name, shape in needed.items()
            if name in checkpoint.entries and checkpoint.entries[name].shape != shape
        ],
    }
    found = [f"{len(names)} {kind}: {some(names)}" for kind, names in problems.items() if names]
    if found:
        raise UserError(f"{checkpoint.path}: tensors do not fit config.json; {'; '.join(found)}")
    return weightmap, left_out


def check_copy(checkpoint: Checkpoint, copy: str, original: str, part: Part, rows: int = 8192) -> None:
    """UserError unless two matrices that the model ties, if both are on disk, are equal within ``part``."""
    one, two = checkpoint.entries.get(copy), checkpoint.entries[original]
    if one is None:
        return
    equal = (one.shape, one.dtype) == (two.shape, two.dtype)
    first, *rest = part
    for start in range(first.start, first.stop, rows):
        stripe = (slice(start, min(start + rows, first.stop)), *rest)
        equal = equal and torch.equal(checkpoint.read(copy, stripe), checkpoint.read(original, stripe))
    if not equal:
        raise UserError(
            f"{checkpoint.path}: config.json ties the head to the embedding but {copy} differs from {original}; "
            "set tie_word_embeddings to false in config.json"
        )
