"""What a family's tensors are called on disk, and how they lie there, as rules that read in both directions.

A model in memory uses transformers' module names; a checkpoint may use older ones, hold one of our tensors in parts or
turned, leave out a tensor that equals another, or carry one that nobody needs. Six kinds of rule say so::

    Rename("model.visual.**", "visual.**")                               ours <-> disk; ** is the rest of the name
    Fuse(("layers.*.q.weight", "layers.*.k.weight"), "layers.*.qk.weight")    disk holds ours one behind the other
    Stack("layers.*.experts.gate_up_proj",                               our [E, 2I, H] is 2E matrices on disk
          ("layers.*.experts.#.gate_proj.weight", "layers.*.experts.#.up_proj.weight"))    # counts dimension 0
    Turn(("layers.*.experts.gate_up_proj", ...))                         disk swaps the last two dimensions
    Tie("model.embed_tokens.weight", "lm_head.weight")                   disk holds a second copy of our tensor
    ignored = ("model.layers.*.self_attn.rotary_emb.inv_freq",)          on disk, not in the model

Import reads the table from right to left, export from left to right, so the two cannot drift apart:
``inverse(forward(x)) == x`` for every ``x`` of our tensors. A tensor that no Fuse, Stack or Turn names is moved, never
looked at, and may be anything. The first rule that fits wins and a name that fits no rule is the same on both sides.
Fuses, Stacks and Turns speak our names; renames apply to what they give. :meth:`WeightMap.pieces` says the same piece
by piece, so that a reader who holds a slice of a tensor finds the bytes of that slice and no others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")
Shape = tuple[int, ...]


def _rewrite(source: str, target: str, name: str) -> str | None:
    """``name`` carried from pattern ``source`` to pattern ``target``; None if it does not fit."""
    if "*" in source.removesuffix("**"):
        found = _components(source, name)
        return None if found is None else _filled(target, found)
    if not source.endswith("**"):
        return target if name == source else None
    prefix = source[:-2]
    return target[:-2] + name[len(prefix) :] if name.startswith(prefix) else None


def _components(pattern: str, name: str) -> tuple[str, ...] | None:
    """What stands for each ``*`` (any component) and ``#`` (a number) of ``pattern`` in ``name``; None if no fit."""
    found = _expression(pattern).fullmatch(name)
    return None if found is None else found.groups()


@lru_cache(maxsize=512)  # experts make names by the ten thousand
def _expression(pattern: str) -> re.Pattern[str]:
    wild = re.escape(pattern).replace(r"\*\*", "(.+)").replace(r"\*", r"([^.]+)").replace(r"\#", r"(\d+)")
    return re.compile(wild)


def _filled(pattern: str, components: tuple[str, ...]) -> str:
    """``pattern`` with its wildcards replaced one after the other."""
    given = iter(components)
    return "".join(next(given) if part in ("**", "*", "#") else part for part in re.split(r"(\*\*|[*#])", pattern))


@dataclass(frozen=True, slots=True)
class Rename:
    """Our name is called ``disk`` there; both may end in ``**``, which stands for the same rest of the name.

    A ``*`` before it stands for one component, the same in both.
    """

    ours: str
    disk: str

    def __post_init__(self) -> None:
        same = self.ours.endswith("**") == self.disk.endswith("**") and self.ours.count("*") == self.disk.count("*")
        assert same, f"{self} has a wildcard on one side only"


@dataclass(frozen=True, slots=True)
class Fuse:
    """Our tensors ``ours``, all of one shape, lie on disk one behind the other along dimension 0, as ``disk``.

    ``*`` stands for one component, the same in all patterns.
    """

    ours: tuple[str, ...]
    disk: str


@dataclass(frozen=True, slots=True)
class Stack:
    """Our ``[E, F, ...]`` is ``E * len(parts)`` tensors ``[F / len(parts), ...]``: per index all parts, in order.

    ``*`` stands for one component, the same in all patterns; ``#`` behind them in ``parts`` for the index.
    """

    ours: str
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Turn:
    """On disk the last two dimensions of these tensors are swapped.

    There are checkpoints of one family that do it and others that do not, under the same names. Which it is shows in
    the shapes, and :meth:`WeightMap.settled` looks. A square tensor shows nothing, so tensors that are written by one
    hand belong into one rule, and any of them decides for all.
    """

    ours: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Tie:
    """The disk name ``copy`` holds the same values as our tensor ``ours`` (which also has its own disk name)."""

    ours: str
    copy: str


@dataclass(frozen=True, slots=True)
class Piece:
    """One disk tensor and the region of our tensor that it holds.

    ``index`` (None: all) is a place in dimension 0, which the disk tensor then lacks; ``start:end`` the range of
    dimension 1 it covers there; ``turned`` whether its last two dimensions are swapped. A disk tensor that
    holds several of ours has ``total`` rows (0: it is ours alone), and ours begin at row ``before``.
    """

    disk: str
    index: int | None = None
    start: int = 0
    end: int = 0
    turned: bool = False
    before: int = 0
    total: int = 0

    def of(self, ours: Tensor) -> Tensor:
        """The disk tensor, or our share of it, as a view of our whole tensor."""
        region = ours if self.index is None else ours[self.index, self.start : self.end]
        return region.transpose(-1, -2) if self.turned else region

    def overlap(self, part: tuple[slice, ...]) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
        """Where the slice ``part`` of our tensor meets this piece: (in the disk tensor, in ``part``); None if nowhere.

        What is read at the first place goes, ``turned`` or not, to the second.
        """
        if self.index is None:
            where = tuple(slice(0, cut.stop - cut.start) for cut in part)
            if self.total:
                first, *rest = part
                return (slice(self.before + first.start, self.before + first.stop), *rest), where
            return ((*part[:-2], part[-1], part[-2]) if self.turned else part), where
        first, rows, *rest = part
        low, high = max(rows.start, self.start), min(rows.stop, self.end)
        if not first.start <= self.index < first.stop or low >= high:
            return None
        at = self.index - first.start
        whole = [slice(0, cut.stop - cut.start) for cut in rest]
        inside = (slice(low - self.start, high - self.start), *rest)
        return inside, (slice(at, at + 1), slice(low - rows.start, high - rows.start), *whole)

    def shape(self, ours: Shape) -> Shape:
        """Shape of the disk tensor."""
        if self.total:
            return (self.total, *ours[1:])
        own = ours if self.index is None else (self.end - self.start, *ours[2:])
        return (*own[:-2], own[-1], own[-2]) if self.turned else own


@dataclass(frozen=True, slots=True)
class WeightMap:
    """Rules between our names and disk names; see the module docstring.

    In ``ignored``, ``*`` is one component and ``**`` any number of them.
    """

    renames: tuple[Rename, ...] = ()
    ties: tuple[Tie, ...] = ()
    ignored: tuple[str, ...] = ()
    stacks: tuple[Stack, ...] = ()
    turns: tuple[Turn, ...] = ()
    fuses: tuple[Fuse, ...] = ()

    def to_disk(self, name: str) -> str:
        """What our tensor ``name`` is called on disk; of a stacked one, what its first part is called."""
        fused = self._fuse(name)
        if fused is not None:
            return self._renamed(fused[1])
        rule = self._stack(name)
        if rule is not None:
            stack, components = rule
            return self._renamed(_filled(stack.parts[0], (*components, "0")))
        return self._renamed(name)

    def to_ours(self, name: str) -> str:
        """What the tensor ``name`` on disk is called, or belongs to, in the model; the first, if it is several."""
        return self._owners(name)[0]

    def _owners(self, name: str) -> tuple[str, ...]:
        """Our tensors of which the disk tensor ``name`` holds something, in the order in which they lie."""
        plain = self._restored(name)
        for fuse in self.fuses:
            found = _components(fuse.disk, plain)
            if found is not None:
                return tuple(_filled(ours, found) for ours in fuse.ours)
        for stack in self.stacks:
            for part in stack.parts:
                found = _components(part, plain)
                if found is not None:
                    return (_filled(stack.ours, found[:-1]),)
        return (plain,)

    def is_ignored(self, name: str) -> bool:
        """Whether the disk tensor ``name`` is known to have no counterpart in the model."""
        return any(_components(pattern, name) is not None for pattern in self.ignored)

    def pieces(self, name: str, shape: Shape) -> tuple[Piece, ...]:
        """The disk tensors that hold our tensor ``name`` of this shape, without tied copies."""
        fused = self._fuse(name)
        if fused is not None:
            place, disk, count = fused
            return (Piece(self._renamed(disk), before=place * shape[0], total=count * shape[0]),)
        rule = self._stack(name)
        if rule is None:
            return (Piece(self._renamed(name), turned=self._turned(name)),)
        stack, components = rule
        assert len(shape) > 1 and shape[1] % len(stack.parts) == 0, f"{name} {shape} cannot be cut as {stack}"
        size = shape[1] // len(stack.parts)
        return tuple(
            Piece(self._renamed(_filled(part, (*components, str(index)))), index, at * size, (at + 1) * size)
            for index in range(shape[0])
            for at, part in enumerate(stack.parts)
        )

    def copies(self, name: str) -> tuple[str, ...]:
        """Disk names that hold our tensor ``name`` a second time."""
        return tuple(tie.copy for tie in self.ties if tie.ours == name)

    def settled(self, ours: Mapping[str, Shape], disk: Mapping[str, Shape]) -> WeightMap:
        """This map without the turns that a checkpoint of these shapes does not make."""
        return replace(self, turns=tuple(turn for turn in self.turns if not self._lies_as_ours(turn, ours, disk)))

    def forward(self, ours: Mapping[str, T]) -> dict[str, T]:
        """Our names to disk names, tied copies included. Values are views where a rule cuts or turns them."""
        disk: dict[str, T] = {}
        fused: dict[tuple[str, int], dict[int, Tensor]] = {}
        for name, value in ours.items():
            share = self._fuse(name)
            if share is not None:
                assert isinstance(value, Tensor), f"{name}: only tensors can be fused"
                place, name, count = share
                fused.setdefault((self._renamed(name), count), {})[place] = value
                continue
            if self._stack(name) is None and not self._turned(name):
                held = {self._renamed(name): value}
            else:
                assert isinstance(value, Tensor), f"{name}: only tensors can be cut or turned"
                pieces = self.pieces(name, tuple(value.shape))
                held = {piece.disk: cast(T, piece.of(value)) for piece in pieces}
            assert not disk.keys() & held.keys(), f"two of our tensors map to one disk name: {sorted(held)[0]}"
            disk |= held
        for (name, count), shares in fused.items():
            assert name not in disk, f"two of our tensors map to one disk name: {name}"
            assert len(shares) == count, f"{name}: parts are missing"
            disk[name] = cast(T, torch.cat([shares[place] for place in sorted(shares)]))
        return disk | {copy: disk[self._renamed(name)] for name in ours for copy in self.copies(name)}

    def inverse(self, disk: Mapping[str, T]) -> dict[str, T]:
        """Disk names to our names, without tied copies and ignored tensors; parts are put together."""
        copies = {tie.copy for tie in self.ties}
        kept = {name: value for name, value in disk.items() if name not in copies and not self.is_ignored(name)}
        groups: dict[str, dict[str, T]] = {}
        ours: dict[str, T] = {}
        for name, value in kept.items():
            first, *others = self._owners(name)
            if others:
                assert isinstance(value, Tensor), f"{name}: only tensors can be fused"
                shares = value.chunk(1 + len(others))
                ours |= {owner: cast(T, share) for owner, share in zip((first, *others), shares, strict=True)}
            else:
                groups.setdefault(first, {})[name] = value
        for name, held in groups.items():
            if self._stack(name) is not None:
                ours[name] = cast(T, self._joined(name, held))
                continue
            assert len(held) == 1, f"two disk tensors map to one of our names: {name}"
            (value,) = held.values()
            if self._turned(name):
                assert isinstance(value, Tensor), f"{name}: only tensors can be turned"
                value = cast(T, value.transpose(-1, -2))
            ours[name] = value
        return ours

    def _joined(self, name: str, held: Mapping[str, object]) -> Tensor:
        """The stacked tensor ``name`` from its disk tensors."""
        rule = self._stack(name)
        assert rule is not None
        stack, components = rule
        parts = len(stack.parts)
        count, missing = divmod(len(held), parts)
        names = [_filled(part, (*components, str(i))) for i in range(count) for part in stack.parts]
        values = [held.get(self._renamed(part)) for part in names]
        assert not missing and all(isinstance(value, Tensor) for value in values), f"{name}: parts are missing"
        tensors = [value for value in values if isinstance(value, Tensor)]
        return torch.stack([torch.cat(tensors[i : i + parts]) for i in range(0, len(tensors), parts)])

    def _renamed(self, name: str) -> str:
        for rule in self.renames:
            found = _rewrite(rule.ours, rule.disk, name)
            if found is not None:
                return found
        return name

    def _restored(self, name: str) -> str:
        for rule in self.renames:
            found = _rewrite(rule.disk, rule.ours, name)
            if found is not None:
                return found
        return name

    def _stack(self, name: str) -> tuple[Stack, tuple[str, ...]] | None:
        for stack in self.stacks:
            found = _components(stack.ours, name)
            if found is not None:
                return stack, found
        return None

    def _fuse(self, name: str) -> tuple[int, str, int] | None:
        """(its place, what holds it under our names, how many share that) of the fused tensor ``name``."""
        for fuse in self.fuses:
            for place, pattern in enumerate(fuse.ours):
                found = _components(pattern, name)
                if found is not None:
                    return place, _filled(fuse.disk, found), len(fuse.ours)
        return None

    def _turned(self, name: str) -> bool:
        return any(_components(pattern, name) is not None for turn in self.turns for pattern in turn.ours)

    def _lies_as_ours(self, turn: Turn, ours: Mapping[str, Shape], disk: Mapping[str, Shape]) -> bool:
        """Whether some tensor of the rule has our shape on disk, and would not have it turned."""
        for name, shape in ours.items():
            named = any(_components(pattern, name) is not None for pattern in turn.ours)
            if named and shape[-1] != shape[-2] and disk.get(self._renamed(name)) == shape:
                return True
        return False
