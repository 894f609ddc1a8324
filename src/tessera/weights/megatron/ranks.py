"""How the ranks of a Megatron job divide a model among them.

A rank has three coordinates: tensor ``tp``, pipeline ``pp`` and expert ``ep``. Of a tensor that is divided along a
dimension, tensor rank ``r`` of four holds, plain and gated (gate above up, each divided for itself)::

    plain   |  0  |  1  |  2  |  3  |           gated   | 0 | 1 | 2 | 3 || 0 | 1 | 2 | 3 |

Expert ranks divide dimension 0 of the experts; within an expert, tensor ranks divide as elsewhere (or not at all, if
the job's expert tensor size is 1). Pipeline stages hold consecutive layers of the decoder; what stands before it is on
the first stage, the final norm and the head on the last, and of tied embeddings both have a copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tessera.config.errors import UserError
from tessera.contract.shards import whole
from tessera.weights.megatron.table import Row, Split, Table
from tessera.weights.megatron.tiling import Tile, Tiling


@dataclass(frozen=True, slots=True)
class Ranks:
    """Sizes of a job. ``etp`` is the tensor size within experts (None: as elsewhere), ``stages`` the layers of each
    pipeline stage (None: equally many)."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int | None = None
    stages: tuple[int, ...] | None = None

    @property
    def expert_tp(self) -> int:
        """Ranks that divide one expert."""
        return self.tp if self.etp is None else self.etp

    def layers(self, count: int) -> list[range]:
        """The layers of each stage; UserError if they cannot be cut like that."""
        if self.stages is not None:
            if len(self.stages) != self.pp or sum(self.stages) != count or min(self.stages) < 1:
                raise UserError(
                    f"layers per stage {list(self.stages)}: expected {self.pp} numbers that add up to {count} layers"
                )
            sizes = list(self.stages)
        elif count % self.pp:
            raise UserError(f"--target_pipeline_parallel_size {self.pp}: does not divide the {count} layers")
        else:
            sizes = [count // self.pp] * self.pp
        ends = [sum(sizes[: at + 1]) for at in range(self.pp)]
        return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]

    def check(self, table: Table) -> None:
        """UserError, naming the flag, if these ranks cannot divide the model."""
        if min(self.tp, self.pp, self.ep) < 1:
            raise UserError("--target_*_parallel_size: must be at least 1")
        self.layers(table.layers)
        if self.ep > 1 and not table.experts:
            raise UserError(f"--target_expert_parallel_size {self.ep}: the model has no experts")
        if table.experts % self.ep:
            raise UserError(f"--target_expert_parallel_size {self.ep}: does not divide the {table.experts} experts")
        if self.expert_tp not in (1, self.tp):
            raise UserError(f"expert tensor parallel size {self.expert_tp}: must be 1 or the tensor parallel size")
        for name, row in table.rows.items():
            tp = self.expert_tp if row.split.experts else self.tp
            axis = row.split.axis
            if axis is not None and row.shape[axis] % (row.split.unit * row.split.blocks * tp):
                units = row.shape[axis] // row.split.unit // row.split.blocks
                hint = "; give --make_vocab_size_divisible_by" if name in (table.embedding, table.head) else ""
                raise UserError(
                    f"--target_tensor_parallel_size {tp}: does not divide {name} ({units} rows or heads){hint}"
                )

    def stage_of(self, row: Row, table: Table) -> int:
        """The pipeline stage that holds a tensor."""
        if row.layer is None:
            return self.pp - 1 if row.last else 0
        return next(at for at, layers in enumerate(self.layers(table.layers)) if row.layer in layers)


def shard(name: str, row: Row, ranks: Ranks, tp: int, ep: int) -> Tiling:
    """What tensor rank ``tp`` and expert rank ``ep`` hold of the tensor ``name``, in terms of the whole."""
    split, shape = row.split, row.shape
    tiles = [(whole(shape), whole(shape))]
    if split.axis is not None:
        count = ranks.expert_tp if split.experts else ranks.tp
        tiles = list(_strips(shape[split.axis], split, count, tp % count, split.axis, shape))
    if split.experts:
        per = shape[0] // ranks.ep
        mine, local = slice(ep * per, (ep + 1) * per), slice(0, per)
        tiles = [((mine, *inside[1:]), (local, *where[1:])) for inside, where in tiles]
    ends = tuple(max(where[at].stop for _, where in tiles) for at in range(len(shape)))
    return Tiling(ends, tuple(Tile(name, inside, where) for inside, where in tiles))


def _strips(
    size: int, split: Split, count: int, rank: int, axis: int, shape: Sequence[int]
) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Per block, the strip of it that ``rank`` of ``count`` holds: where in the whole, where in the shard."""
    block = size // split.blocks
    per = block // count
    for at in range(split.blocks):
        inside, where = list(whole(tuple(shape))), list(whole(tuple(shape)))
        inside[axis] = slice(at * block + rank * per, at * block + (rank + 1) * per)
        where[axis] = slice(at * per, (at + 1) * per)
        yield tuple(inside), tuple(where)
