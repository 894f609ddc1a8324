"""Hugging Face checkpoints: read tensor by tensor into a model, written back as they were found.

A checkpoint directory holds one or several safetensors files (a JSON header with every tensor's type, shape and byte
range, then the bytes) and, beside them, the config, tokenizer and processor files. Reading and writing stream: never
more than one tensor is held in addition to the model, on either side.

Loading accounts for every tensor. A tensor the model needs and the checkpoint lacks, one the model has no place
for, or one of another shape stops the load with their names, unless the family's weight map says why it is so.

Saving with a ``source`` restores that checkpoint's names, order, shards and types, so that a load followed by a save
reproduces the weight files byte for byte, whatever type the model had in memory. Sharded parameters (DTensors) are read
slice by slice and gathered one at a time.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tessera.config.errors import UserError
from tessera.contract.weightmap import Piece, WeightMap
from tessera.weights.files import DTYPES, Entry, Writer

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "*tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.tiktoken",
    "*processor*.json",
    "chat_template.*",
    "additional_chat_templates",
)
"""Everything beside the weights that a checkpoint needs to be loadable."""


class Checkpoint:
    """The tensors of a Hugging Face directory, by name; headers are read now, data when asked for."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        for file in self._files():
            self._read_header(file)
        self._open: dict[str, Any] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.entries)

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> Tensor:
        """The tensor ``name`` on the CPU, or the ``part`` of it that these slices cut out."""
        from safetensors import safe_open

        file = self.entries[name].file
        if file not in self._open:
            self._open[file] = safe_open(self.path / file, framework="pt")
        handle = self._open[file]
        tensor = handle.get_tensor(name) if part is None else handle.get_slice(name)[part]
        assert isinstance(tensor, Tensor)
        return tensor

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
        data = path.stat().st_size - 8 - size
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


class Together(Protocol):
    """Ranks that hold different tensors of one model; collectives over all of them, in the same order everywhere."""

    @property
    def is_main(self) -> bool: ...

    def gather(self, value: Any, axis: str | None = None) -> list[Any]: ...

    def barrier(self) -> None: ...


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
) -> LoadReport:
    """Fill ``module`` from ``checkpoint``. Meta tensors are created on ``device``, others overwritten in place.

    ``dtype`` (of floating tensors; per name if it is a function) applies to meta tensors. Sharded parameters get their
    local slice only. Don't call ``to_empty`` before: it would wipe the buffers that no checkpoint stores. If ``module``
    is a part of a model, ``shapes`` are those of the whole, which is what the checkpoint must hold.
    """
    places = _places(module)
    shapes = shapes or shapes_of(module)
    weightmap = weightmap.settled(shapes, {name: entry.shape for name, entry in checkpoint.entries.items()})
    left_out = _account(shapes, checkpoint, weightmap)
    parameters = 0
    for name, (tensor, owners) in places.items():
        pieces = weightmap.pieces(name, shapes[name])
        found = checkpoint.entries[pieces[0].disk].dtype
        # A buffer's type is part of its meaning (float32 beside half-precision weights); nobody casts it.
        asked = dtype if isinstance(dtype, torch.dtype) else dtype(name)
        wanted = asked if isinstance(tensor, nn.Parameter) else tensor.dtype
        kept = wanted if found.is_floating_point else found
        placed = place(tensor, partial(_read, checkpoint, pieces), kept, torch.device(device))
        parameters += tensor.numel()
        if placed is tensor:
            continue
        for owner, leaf in owners:
            if isinstance(tensor, nn.Parameter):
                owner.register_parameter(leaf, nn.Parameter(placed, requires_grad=tensor.requires_grad))
            else:
                owner.register_buffer(leaf, placed)
    for child in module.modules():
        for leaf, buffer in child.named_buffers(recurse=False):
            assert not buffer.is_meta, f"{leaf} of {type(child).__name__} has no value and no checkpoint stores it"
            child.register_buffer(leaf, buffer.to(device), leaf not in child._non_persistent_buffers_set)
    return LoadReport(len(places), parameters, left_out)


Part = tuple[slice, ...]
"""A region of a tensor, one slice with both ends per dimension."""


def _read(checkpoint: Checkpoint, pieces: Sequence[Piece], part: Part) -> Iterator[tuple[Part, Tensor]]:
    """The values of the region ``part`` of a tensor made of ``pieces``, and where in it each belongs."""
    for piece in pieces:
        found = piece.overlap(part)
        if found is not None:
            inside, where = found
            whole = inside == tuple(slice(0, size) for size in checkpoint.entries[piece.disk].shape)
            value = checkpoint.read(piece.disk, None if whole else inside)
            yield where, value.transpose(-1, -2) if piece.turned else value


def place(
    tensor: Tensor, read: Callable[[Part], Iterable[tuple[Part, Tensor]]], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``tensor`` with the values that ``read`` yields for a region of it: itself, or a new one if it is meta."""
    if _plain(tensor):
        target = torch.empty(tensor.shape, dtype=dtype, device=device) if tensor.is_meta else tensor
        _fill(target, read(tuple(slice(0, size) for size in tensor.shape)))
        return target
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(tensor, DTensor), f"cannot place a {type(tensor).__name__}"
    mesh, placements = tensor.device_mesh, tensor.placements
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    local = tensor.to_local()
    target = torch.empty(shape, dtype=dtype, device=device) if local.is_meta else local
    if target.numel():
        _fill(target, read(tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))))
    if target is local:
        return tensor
    stride = torch.empty(tensor.shape, device="meta").stride()
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
    write: bool = True,
    together: Together | None = None,
) -> None:
    """Write a model's ``tensors`` (by our names) as safetensors into the existing directory ``out_dir``.

    With ``source``: its names, shards, order and types, and a copy of the files beside the weights. ``dtype`` overrides
    the type of floating tensors (default: the source's, else the tensor's own). Sharded tensors are gathered one by
    one: every rank calls this with the same tensors, one of them with ``write``. Where groups of ranks hold different
    tensors of one model, ``together`` spans them all, and one rank of each group writes into the same files.
    """
    ours = dict(tensors)
    origin = Checkpoint(source) if isinstance(source, Path) else source
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in ours.items()}
    if together is not None:
        found = {name: shape for part in together.gather(found, "pp") for name, shape in part.items()}
    creates = write and (together is None or together.is_main)
    shapes = {name: shape for name, (_, shape) in found.items()}
    if origin is not None:
        weightmap = weightmap.settled(shapes, {name: entry.shape for name, entry in origin.entries.items()})
    pieces = {name: _pieces(weightmap, name, shape) for name, shape in shapes.items()}
    disk = {p.disk: (found[name][0], p.shape(shapes[name])) for name, held in pieces.items() for p in held}
    assert len(disk) == sum(map(len, pieces.values())), "two of our tensors map to one disk name"
    if origin is None:
        entries = _sharded(disk, dtype, _bytes(max_shard_size))
    else:
        entries = _like(origin, disk, weightmap, dtype)
    with ExitStack() as stack:
        writer = None
        metadata = origin.metadata if origin else {}
        if creates:
            writer = Writer(out_dir, entries, metadata, stack)
        if together is not None:
            together.barrier()
            if write and not creates:
                writer = Writer(out_dir, entries, metadata, stack, create=False)
        for name, tensor in ours.items():
            value = tensor.detach() if _plain(tensor) else gathered(tensor)
            if writer is not None:
                for piece in pieces[name]:
                    writer.put(piece.disk, piece.of(value))
        if origin is not None and writer is not None and creates:
            for left in entries.keys() - disk.keys():
                writer.put(left, origin.read(left))
    if creates:
        _write_index(out_dir, entries, origin)
        if origin is not None:
            copy_side_files(origin.path, out_dir, dtype)


def _pieces(weightmap: WeightMap, name: str, shape: tuple[int, ...]) -> list[Piece]:
    """The disk tensors of our tensor ``name``, tied copies included."""
    pieces = weightmap.pieces(name, shape)
    return [*pieces, *(replace(pieces[0], disk=copy) for copy in weightmap.copies(name))]


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor; a collective."""
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor), f"cannot save a {type(tensor).__name__}"
    whole = tensor.full_tensor().detach()
    assert isinstance(whole, Tensor)
    return whole


def copy_side_files(source: Path, out_dir: Path, dtype: torch.dtype | None = None) -> None:
    """Copy config, tokenizer, processor and chat template files; ``config.json`` then names ``dtype`` if given."""
    for pattern in SIDE_FILES:
        for file in sorted(source.glob(pattern)):
            if file.is_dir():
                shutil.copytree(file, out_dir / file.name, dirs_exist_ok=True)
            elif not file.name.endswith(".safetensors"):
                shutil.copyfile(file, out_dir / file.name)
    config = out_dir / "config.json"
    if dtype is not None and config.is_file():
        values = json.loads(config.read_text("utf-8"))
        name = str(dtype).removeprefix("torch.")
        for part in (values, *(value for value in values.values() if isinstance(value, dict))):
            part.update({key: name for key in ("dtype", "torch_dtype") if key in part})
        config.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _plain(tensor: Tensor) -> bool:
    """Whether ``tensor`` is an ordinary tensor (and torch.distributed need not be imported)."""
    return type(tensor) in (Tensor, nn.Parameter)


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


def _account(shapes: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint, weightmap: WeightMap) -> tuple[str, ...]:
    """UserError unless model and checkpoint hold the same tensors; disk names that the weight map leaves out."""
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
    found = [f"{len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names]
    if found:
        raise UserError(f"{checkpoint.path}: tensors do not fit config.json; {'; '.join(found)}")
    for copy, original in copies.items():
        if not _equal(checkpoint, copy, original):
            raise UserError(
                f"{checkpoint.path}: config.json ties the head to the embedding but {copy} differs from {original}; "
                "set tie_word_embeddings to false in config.json"
            )
    return left_out


def _some(names: Sequence[str], shown: int = 4) -> str:
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


def _equal(checkpoint: Checkpoint, first: str, second: str, rows: int = 8192) -> bool:
    """Whether two matrices on disk are equal, a stripe at a time."""
    one, two = checkpoint.entries[first], checkpoint.entries[second]
    if (one.shape, one.dtype) != (two.shape, two.dtype):
        return False
    stripes = ((slice(start, start + rows),) for start in range(0, one.shape[0], rows))
    return all(torch.equal(checkpoint.read(first, part), checkpoint.read(second, part)) for part in stripes)


Shape = tuple[torch.dtype, tuple[int, ...]]


def _wanted(found: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and found.is_floating_point else found


def _packed(shapes: Mapping[str, Shape], file: str) -> dict[str, Entry]:
    """Entries of one file. Wide types first, so that every tensor is aligned, as the safetensors library does."""
    entries, start = {}, 0
    for name in sorted(shapes, key=lambda name: (-shapes[name][0].itemsize, name)):
        dtype, shape = shapes[name]
        end = start + dtype.itemsize * torch.Size(shape).numel()
        entries[name] = Entry(file, dtype, shape, start, end)
        start = end
    return entries


def _like(
    origin: Checkpoint, shapes: Mapping[str, Shape], weightmap: WeightMap, dtype: torch.dtype | None
) -> dict[str, Entry]:
    """Where each disk tensor goes so that the result lies like ``origin``."""
    unknown = sorted(shapes.keys() - origin.entries.keys())
    lost = sorted(name for name in origin.entries.keys() - shapes.keys() if not weightmap.is_ignored(name))
    assert not unknown and not lost, f"model and {origin.path} differ: {_some(unknown)} {_some(lost)}"
    for name, (_, shape) in shapes.items():
        assert origin.entries[name].shape == shape, f"{name}: {shape} does not fit {origin.path}"
    types = {name: _wanted(entry.dtype, dtype) for name, entry in origin.entries.items()}
    if all(types[name] == entry.dtype for name, entry in origin.entries.items()):
        return dict(origin.entries)
    entries: dict[str, Entry] = {}
    for file in origin.metadata:
        held = {n: (types[n], entry.shape) for n, entry in origin.entries.items() if entry.file == file}
        entries |= _packed(held, file)
    return entries


def _sharded(shapes: Mapping[str, Shape], dtype: torch.dtype | None, limit: int) -> dict[str, Entry]:
    """Tensors in their order, cut into files of at most ``limit`` bytes (or one tensor)."""
    groups: list[dict[str, Shape]] = [{}]
    used = 0
    for name, (found, shape) in shapes.items():
        kept = _wanted(found, dtype)
        size = kept.itemsize * torch.Size(shape).numel()
        if groups[-1] and used + size > limit:
            groups.append({})
            used = 0
        groups[-1][name] = (kept, shape)
        used += size
    entries: dict[str, Entry] = {}
    for number, group in enumerate(groups, start=1):
        file = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        entries |= _packed(group, file)
    return entries


def _write_index(folder: Path, entries: Mapping[str, Entry], origin: Checkpoint | None) -> None:
    """``model.safetensors.index.json`` if there are several files; the source's own if nothing in it changed."""
    if {entry.file for entry in entries.values()} == {SINGLE} or (
        origin is not None and not (origin.path / INDEX).is_file()
    ):
        return
    if origin is not None and entries == origin.entries:
        shutil.copyfile(origin.path / INDEX, folder / INDEX)
        return
    total = sum(entry.end - entry.start for entry in entries.values())
    index = {"metadata": {"total_size": total}, "weight_map": {name: e.file for name, e in sorted(entries.items())}}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _bytes(size: int | str) -> int:
    """Bytes of "5GB", "200MB" or a number."""
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", size.strip(), re.IGNORECASE)
    if match is None:
        raise UserError(f"--max_shard_size {size!r}: expected a size such as 5GB or 500MB")
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)
