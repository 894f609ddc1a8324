"""Where every tensor went: a table whose sums must come out.

Putting weights together by name, and passing over names that do not occur on the other side, gives a model that loads
and has learnt nothing in half of its layers. So nothing is passed over here. Each tensor of each part is either placed
or left out for a reason that is given, and each tensor of the new model either comes from a part or is said to be new;
a tensor for which neither holds stops the composition. Names that differ in numbers only share a line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import prod

from tessera.config.errors import UserError
from tessera.contract.weightmap import Piece
from tessera.observe.cost import human_count
from tessera.recipes.parts import GROUPS, Composition, Part
from tessera.weights.files import Entry
from tessera.weights.saving import some

HEAD = ("source", "destination", "tensors", "parameters", "how")


@dataclass(frozen=True, slots=True)
class Row:
    """Tensors of one pattern: names there and here (empty: nowhere), how many, how large, and what became of them."""

    source: str
    destination: str
    tensors: int
    parameters: int
    how: str


@dataclass(frozen=True, slots=True)
class Account:
    """All rows, and the sums: source tensors ``placed`` and ``left``, new tensors ``sourced`` and ``fresh``."""

    rows: tuple[Row, ...]
    placed: int
    left: int
    sourced: int
    fresh: int

    def lines(self) -> list[str]:
        """The table as text, one line per row."""
        counts = ((row, f"{row.tensors:,}", human_count(row.parameters)) for row in self.rows)
        cells = [HEAD, *((row.source, row.destination, *both, row.how) for row, *both in counts)]
        widths = [max(len(row[at]) for row in cells) for at in range(4)]
        out = []
        for source, destination, tensors, parameters, how in cells:
            names = f"{source:<{widths[0]}}  {destination:<{widths[1]}}"
            out.append(f"{names}  {tensors:>{widths[2]}}  {parameters:>{widths[3]}}  {how}".rstrip())
        return [*out, self.summary()]

    def summary(self) -> str:
        """The sums in one line."""
        return (
            f"{self.placed + self.left:,} source tensors: {self.placed:,} placed, {self.left:,} left out; "
            f"{self.sourced + self.fresh:,} tensors written: {self.sourced:,} sourced, {self.fresh:,} initialised"
        )


def account(made: Composition, parts: Sequence[Part]) -> Account:
    """What becomes of every tensor; UserError if one is neither placed nor left out for a reason."""
    rows, taken, sourced, fresh = _placed(made, parts)
    for part in parts:
        rows += _left_out(part, taken[id(part)], parts)
    left = sum(len(part.source.checkpoint.names) - len(taken[id(part)]) for part in parts)
    return Account(tuple(_grouped(rows)), sum(map(len, taken.values())), left, sourced, fresh)


def _placed(made: Composition, parts: Sequence[Part]) -> tuple[list[Row], dict[int, set[str]], int, int]:
    """Rows of the new model's tensors, the disk tensors taken from each part, and how many were sourced and fresh."""
    rows, taken, sourced, fresh = [], {id(part): set[str]() for part in parts}, 0, 0
    for name, shape in made.shapes.items():
        origin = made.origins[name]
        here = made.weightmap.pieces(name, shape)
        if origin is None:
            rows += [Row("", piece.disk, 1, prod(piece.shape(shape)), "initialised") for piece in here]
            fresh += len(here)
            continue
        there = origin.part.pieces(origin.name)
        taken[id(origin.part)].update(piece.disk for piece in there)
        sourced += len(here)
        how = _how(there, here)
        if origin.more:
            how += f", {origin.more} more rows initialised as the mean of {made.known:,}"
        rows.append(Row(f"{origin.part.label}: {_joined(there)}", _joined(here), len(here), prod(shape), how))
    return rows, taken, sourced, fresh


def _how(there: Sequence[Piece], here: Sequence[Piece]) -> str:
    """How the pieces on one disk become those on the other."""
    turned = there[0].turned != here[0].turned
    if len(there) == len(here):
        return "placed, transposed" if turned else "placed"
    parts = f"{len(there)} tensors each" if len(there) > 1 else "1 tensor each"
    return f"{'stacked' if len(there) > len(here) else 'cut'} from {parts}{', transposed' if turned else ''}"


def _left_out(part: Part, taken: set[str], parts: Sequence[Part]) -> list[Row]:
    """Rows of what of ``part`` was not taken, with the reasons."""
    giving = {group: GROUPS[group] for other in parts for group in other.groups}
    copies = {tie.copy: part.weightmap.to_disk(tie.ours) for tie in part.weightmap.ties}
    reasons: dict[tuple[str, str], list[str]] = {}
    lost = []
    for name in part.source.checkpoint.names:
        if name in taken:
            continue
        if name in copies:
            why = f"a copy of {copies[name]}"
        elif part.weightmap.is_ignored(name):
            why = "follows from config.json"
        else:
            group = part.source.plan.groups.of(part.weightmap.to_ours(name))
            lost += [name] if group in part.groups else []
            why = f"{giving[group]} gives it" if group in giving else "the aligner is initialised"
        reasons.setdefault((why, name.split(".")[0]), []).append(name)
    if lost:
        raise UserError(f"{part.source.path}: {len(lost)} tensors have no place in the new model: {some(sorted(lost))}")
    entries = part.source.checkpoint.entries
    return [
        Row(f"{part.label}: {_common(names)}", "", len(names), _size(entries, names), f"left out: {why}")
        for (why, _), names in reasons.items()
    ]


def _size(entries: Mapping[str, Entry], names: Iterable[str]) -> int:
    return sum(prod(entries[name].shape) for name in names)


def _common(names: Sequence[str]) -> str:
    """The first components that ``names`` share; one name as it is."""
    if len(names) == 1:
        return names[0]
    columns = zip(*(name.split(".") for name in names), strict=False)
    return ".".join([*(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)), "**"])


def _joined(pieces: Iterable[Piece]) -> str:
    """The patterns of these disk tensors, the first two in full."""
    patterns = list(dict.fromkeys(_pattern(piece.disk) for piece in pieces))
    return patterns[0] if len(patterns) == 1 else " + ".join([patterns[0], *(p.split(".")[-2] for p in patterns[1:])])


def _pattern(name: str) -> str:
    """``name`` with a star for every number that is a component of its own."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _grouped(rows: Iterable[Row]) -> list[Row]:
    """Rows of the same patterns and the same fate as one, in order of appearance."""
    sums: dict[tuple[str, str, str], tuple[int, int]] = {}
    for row in rows:
        key = (row.source, _pattern(row.destination), row.how)
        tensors, parameters = sums.get(key, (0, 0))
        sums[key] = (tensors + row.tensors, parameters + row.parameters)
    return [Row(source, there, *counts, how) for (source, there, how), counts in sums.items()]
