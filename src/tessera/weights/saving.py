"""A model on its way to the disk, from the shards it consists of.

Names, shapes and types decide where every byte goes before any value is looked at, so each rank writes the boxes it
holds straight to their places: nothing is gathered, and a rank needs memory for one of its own pieces at a time. What
several ranks hold is written by one of them. A box of rows is one run of bytes; a column-split one is a run per row::

    rank 0  rows 0:4     ####----        rank 0  columns 0:3    ##-- ##-- ##-- ##--
    rank 1  rows 4:8     ----####        rank 1  columns 3:6    --## --## --## --##

:class:`Saving` is that plan together with this rank's values. It can be :meth:`~Saving.staged`, that is, its values
copied, and written later while training changes the model. Headers, index and the files beside the weights are the
main rank's. The bytes do not depend on the layout.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from tessera.config.errors import UserError
from tessera.contract.layout import ParallelLayout
from tessera.contract.shards import Part
from tessera.contract.weightmap import Piece, WeightMap
from tessera.weights import files
from tessera.weights.files import INDEX, SINGLE, Entry, Writer
from tessera.weights.shards import held, local, plain, speaks

if TYPE_CHECKING:
    from tessera.weights.hf import Checkpoint

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


class Ranks(Protocol):
    """The ranks that hold a model together; those of a pipeline hold different tensors."""

    @property
    def layout(self) -> ParallelLayout: ...

    @property
    def is_main(self) -> bool: ...

    @property
    def is_stage_main(self) -> bool: ...

    def at(self, axis: str) -> int: ...

    def gather(self, value: Any, axis: str | None = None) -> list[Any]: ...


@dataclass(frozen=True, slots=True)
class Share:
    """A region of one of our tensors, and its values."""

    part: Part
    values: Tensor


@dataclass(frozen=True, slots=True)
class Saving:
    """Where every tensor of a model goes (``entries``, ``pieces``), and what of it this rank writes (``shares``).

    ``creates``: it also writes headers, the index, what of ``origin`` is no part of the model, and its side files.
    """

    entries: Mapping[str, Entry]
    pieces: Mapping[str, Sequence[Piece]]
    shares: Mapping[str, Share]
    origin: Checkpoint | None
    dtype: torch.dtype | None
    creates: bool

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Tensor],
        weightmap: WeightMap,
        *,
        origin: Checkpoint | None = None,
        dtype: torch.dtype | None = None,
        max_shard_size: int = 5 * 10**9,
        ranks: Ranks | None = None,
        types: Mapping[str, torch.dtype] | None = None,
    ) -> Saving:
        """The plan for ``tensors``, by our names, some of them sharded over ``ranks`` (None: this process has all).

        Names, shards and types are those of ``origin`` if it is given; else types are those in ``types``, by our names,
        or the tensors' own. ``dtype`` overrides the type of floating ones. Every rank calls this with its own tensors;
        with a pipeline, stages tell each other the names of theirs.
        """
        known = types or {}
        found = {name: (known.get(name, tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
        stages, stage = [found], 0
        if ranks is not None and ranks.layout.pp > 1:
            stages, stage = ranks.gather(found, "pp"), ranks.at("pp")
        # What two stages hold (a tied embedding) is the first one's.
        first = {name: index for index in reversed(range(len(stages))) for name in stages[index]}
        every = {name: known for part in stages for name, known in part.items()}
        shapes = {name: shape for name, (_, shape) in every.items()}
        if origin is not None:
            weightmap = weightmap.settled(shapes, {name: entry.shape for name, entry in origin.entries.items()})
        pieces = {name: _pieces(weightmap, name, shape) for name, shape in shapes.items()}
        disk = {p.disk: (every[name][0], p.shape(shapes[name])) for name, parts in pieces.items() for p in parts}
        places = {(piece.disk, piece.before) for parts in pieces.values() for piece in parts}
        assert len(places) == sum(map(len, pieces.values())), "two of our tensors map to one disk name"
        if origin is None:
            entries = _sharded(disk, dtype, max_shard_size)
        else:
            entries = _like(origin, disk, weightmap, dtype)
        alone = ranks is None or ranks.is_stage_main
        shares = {
            name: Share(held(tensor), local(tensor))
            for name, tensor in tensors.items()
            if first[name] == stage and (alone if plain(tensor) else speaks(tensor))
        }
        return cls(entries, pieces, shares, origin, dtype, ranks is None or ranks.is_main)

    @classmethod
    def planned(
        cls,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        weightmap: WeightMap,
        *,
        origin: Checkpoint | None = None,
        dtype: torch.dtype | None = None,
        max_shard_size: int = 5 * 10**9,
    ) -> Saving:
        """The plan for tensors of these types and shapes, whose values :meth:`write` is given."""
        meta = {name: torch.empty(shape, dtype=found, device="meta") for name, (found, shape) in tensors.items()}
        return cls.of(meta, weightmap, origin=origin, dtype=dtype, max_shard_size=max_shard_size)

    def staged(self, copy: Callable[[str, Tensor], Tensor]) -> Saving:
        """The same with values that later changes of the model don't reach; ``copy`` makes them, by our names."""
        shares = {name: Share(share.part, copy(name, share.values)) for name, share in self.shares.items()}
        return replace(self, shares=shares)

    def write(
        self,
        out_dir: Path,
        values: Callable[[str], Iterable[tuple[Part, Tensor]]] | None = None,
        *,
        at_once: bool = False,
    ) -> None:
        """Write this rank's part into the existing, empty directory ``out_dir``; OSError if the disk refuses.

        If the plan has no values, ``values(name)`` yields regions of a tensor with theirs, all of it in the end; one
        region is held at a time, or (``at_once``) a few, of different tensors. Ranks don't wait for each other: the
        files are complete when all have returned.
        """
        with ExitStack() as stack:
            metadata = self.origin.metadata if self.origin else {}
            writer = Writer(out_dir, self.entries, metadata, stack, creates=self.creates)

            def write_tensor(name: str, own: Share) -> None:
                for share in [own] if values is None else starmap(Share, values(name)):
                    for piece in self.pieces[name]:
                        _put(writer, piece, share)

            tasks = (partial(write_tensor, name, own) for name, own in self.shares.items())
            if at_once:
                files.at_once(tasks)
            else:
                for task in tasks:
                    task()
            if self.origin is not None and self.creates:
                placed = {piece.disk for parts in self.pieces.values() for piece in parts}
                for left in self.entries.keys() - placed:
                    writer.put(left, self.origin.read(left))
        if self.creates:
            write_index(out_dir, self.entries, self.origin)
            if self.origin is not None:
                copy_side_files(self.origin.path, out_dir, self.dtype)


def _put(writer: Writer, piece: Piece, share: Share) -> None:
    """Write what of the disk tensor ``piece`` lies in ``share``."""
    found = piece.overlap(share.part)
    if found is not None:
        inside, where = found
        value = share.values[where].reshape([cut.stop - cut.start for cut in where][-len(inside) :])
        writer.put(piece.disk, value.transpose(-1, -2) if piece.turned else value, inside)


def _pieces(weightmap: WeightMap, name: str, shape: tuple[int, ...]) -> list[Piece]:
    """The disk tensors of our tensor ``name``, tied copies included."""
    pieces = weightmap.pieces(name, shape)
    return [*pieces, *(replace(pieces[0], disk=copy) for copy in weightmap.copies(name))]


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


def some(names: Sequence[str], shown: int = 4) -> str:
    """The first of ``names``, and how many more there are."""
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


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
    assert not unknown and not lost, f"model and {origin.path} differ: {some(unknown)} {some(lost)}"
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


def write_index(folder: Path, entries: Mapping[str, Entry], origin: Checkpoint | None) -> None:
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


def bytes_of(size: int | str) -> int:
    """Bytes of "5GB", "200MB" or a number."""
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", size.strip(), re.IGNORECASE)
    if match is None:
        raise UserError(f"--max_shard_size {size!r}: expected a size such as 5GB or 500MB")
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)
