"""Which Megatron tensors hold which of ours: a table that reads in both directions.

A :class:`Table` is made for one model and one dialect (see :mod:`tessera.weights.megatron.names`). Its names are
*canonical*: one tensor per layer, with the layer's global index; the experts of a layer in one tensor [E, ...]; norms
under the name Transformer Engine gives them. How files deviate from that (stacked layers, local indices, one tensor per
expert or per rank) is the formats' matter, not the table's.

Each :class:`Row` says how the tensor is tiled by ours, and how tensor ranks divide it. Making the table checks it:
every element of every one of our tensors has exactly one place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tessera.contract.shards import whole
from tessera.models.decoder import DecoderConfig
from tessera.weights.megatron.tiling import Shape, Tile, Tiling, inverted, overlapping, uncovered

Source = tuple[str, int, int]
"""Rows of one of our tensors: its name, the first row, how many."""


@dataclass(frozen=True, slots=True)
class Split:
    """How tensor ranks divide a tensor: dimension ``axis`` (None: every rank has all of it) in steps of ``unit``.

    ``blocks`` parts that lie one after the other (gate, up) are divided each for itself. ``experts``: dimension 0
    counts experts, which expert ranks divide among them. ``least``: only so much along ``axis`` need be there; what
    follows are empty heads, as many as make the number of heads a multiple of the ranks (0: all is needed).
    """

    axis: int | None = None
    unit: int = 1
    blocks: int = 1
    least: int = 0
    experts: bool = False


COPIED = Split()
COLUMNS = Split(0)
ROWS = Split(1)
GATED = Split(0, blocks=2)


@dataclass(frozen=True, slots=True)
class Row:
    """One Megatron tensor: what it is made of, how it is divided, and the decoder layer it belongs to, if any.

    ``last``: pipelines hold it on the last stage; else, without a layer, on the first.
    """

    tiling: Tiling
    split: Split = COPIED
    layer: int | None = None
    last: bool = False

    @property
    def shape(self) -> Shape:
        """Its global shape."""
        return self.tiling.shape


@dataclass(frozen=True, slots=True)
class Table:
    """All tensors of a model in one dialect.

    ``ours`` are the shapes of our tensors by our names, ``language`` is what precedes the decoder's names there,
    ``decoder`` its configuration (None: the checkpoint is a tower alone).
    """

    dialect: str
    ours: Mapping[str, Shape]
    rows: Mapping[str, Row]
    language: str
    decoder: DecoderConfig | None

    @property
    def layers(self) -> int:
        """Layers of the decoder, 0 if there is none."""
        return self.decoder.layers if self.decoder else 0

    @property
    def experts(self) -> int:
        """Experts of a sparse layer, 0 if there are none."""
        return self.decoder.moe.experts if self.decoder and self.decoder.moe else 0

    @property
    def sparse(self) -> frozenset[int]:
        """The layers that have experts."""
        return self.decoder.moe.layers if self.decoder and self.decoder.moe else frozenset()

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.decoder is not None and self.decoder.tied

    @property
    def tilings(self) -> dict[str, Tiling]:
        """Megatron's tensors in terms of ours."""
        return {name: row.tiling for name, row in self.rows.items()}

    @property
    def inverse(self) -> dict[str, Tiling]:
        """Our tensors in terms of Megatron's."""
        return inverted(self.tilings, self.ours)

    @property
    def embedding(self) -> str:
        """The token embedding."""
        return f"{self.language}embedding.word_embeddings.weight"

    @property
    def head(self) -> str:
        """The output layer, which is not there if it is the embedding."""
        return f"{self.language}output_layer.weight"

    def resized(self, sizes: Mapping[str, int]) -> Table:
        """The same with these tensors so long along the dimension that ranks divide; what is added is zero."""
        rows = dict(self.rows)
        for name, size in sizes.items():
            axis = rows[name].split.axis
            assert axis is not None, f"{name} is not divided"
            rows[name] = replace(rows[name], tiling=rows[name].tiling.resized(axis, size))
        return replace(self, rows=rows)

    def for_ranks(self, tp: int, vocabulary: int | None = None) -> Table:
        """The same with as many empty heads as ``tp`` ranks need, and a vocabulary of so many rows."""
        sizes = {}
        for name, row in self.rows.items():
            if row.split.least:
                step = row.split.unit * tp
                sizes[name] = -(-row.split.least // step) * step
        if vocabulary is not None:
            sizes |= {name: vocabulary for name in (self.embedding, self.head) if name in self.rows}
        return self.resized(sizes)


@dataclass(slots=True)
class Builder:
    """Collects the rows of a table; ``ours`` are our shapes."""

    ours: Mapping[str, Shape]
    rows: dict[str, Row] = field(default_factory=dict)

    def keep(
        self,
        theirs: str,
        ours: str,
        split: Split = COPIED,
        *,
        layer: int | None = None,
        last: bool = False,
        shape: Shape | None = None,
    ) -> None:
        """A tensor as it is, under another name; ``shape`` may leave out dimensions of extent 1 in front."""
        full = self.ours[ours]
        target = full if shape is None else shape
        self.add(theirs, Row(Tiling(target, (Tile(ours, whole(full), whole(target)),)), split, layer, last))

    def join(self, theirs: str, ours: Sequence[str], split: Split, *, layer: int | None = None) -> None:
        """Tensors one after the other along dimension 0."""
        self.interleave(theirs, [(name, 0, self.ours[name][0]) for name in ours], 1, split, layer=layer)

    def interleave(
        self, theirs: str, parts: Sequence[Source], groups: int, split: Split, *, layer: int | None = None
    ) -> None:
        """Rows of several tensors in turn: per group, so many of the first, of the second, ...

        A part is (name, first row, rows per group).
        """
        rest = self.ours[parts[0][0]][1:]
        tiles, at = [], 0
        for group in range(groups):
            for name, first, rows in parts:
                inside = (slice(first + group * rows, first + (group + 1) * rows), *whole(rest))
                tiles.append(Tile(name, inside, (slice(at, at + rows), *whole(rest))))
                at += rows
        self.add(theirs, Row(Tiling((at, *rest), tuple(tiles)), split, layer))

    def add(self, theirs: str, row: Row) -> None:
        """A row under its name."""
        assert theirs not in self.rows, f"two tensors would be called {theirs}"
        self.rows[theirs] = row

    def table(self, dialect: str, language: str, decoder: DecoderConfig | None) -> Table:
        """The finished table; every element of ours must have exactly one place."""
        table = Table(dialect, self.ours, self.rows, language, decoder)
        wrong = uncovered(table.inverse)
        assert not wrong, f"{dialect}: without a place, or with two: {wrong[:4]}"
        assert not any(overlapping(row.tiling.tiles) for row in self.rows.values()), f"{dialect}: tiles overlap"
        return table


def leaves(names: Iterable[str], prefix: str) -> list[str]:
    """Those of ``names`` below ``prefix``, without it."""
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
