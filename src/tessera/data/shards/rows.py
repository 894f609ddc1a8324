"""The samples of many shards as rows by number, like those of any other file.

Row ``i`` is sample ``j`` of shard ``s``, found by bisection over the shards' sizes. Because any row can be read alone,
the order of training is the same index arithmetic as for a jsonl file: no shuffle buffer, no shard that belongs to one
worker, and nothing to restore but a position. Images are not read with their row; they are slices of the shard.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from tessera.data.shards.fields import Fields
from tessera.data.shards.forms import Form, Row
from tessera.data.shards.index import Shard


class Samples:
    """Rows called ``name`` from ``shards``, made by ``form``; ``names`` are the shards' names for people.

    ``without`` are samples left out, as (shard number, key).
    """

    def __init__(
        self,
        name: str,
        shards: Sequence[Shard],
        names: Sequence[str],
        form: Form,
        without: Collection[tuple[int, str]] = (),
    ) -> None:
        self.name, self._shards, self._names, self._form = name, list(shards), list(names), form
        self._ends = np.cumsum([0, *(len(shard) for shard in shards)]).tolist()[1:]
        self._kept: np.ndarray | None = None
        if without:
            dropped = set(without)
            # Only the shards that lose samples are looked through.
            hit = {number for number, _ in dropped}
            out = [
                (self._ends[number - 1] if number else 0) + index
                for number in sorted(hit)
                for index in range(len(self._shards[number]))
                if (number, self._shards[number].key(index)) in dropped
            ]
            self._kept = np.setdiff1d(np.arange(self._ends[-1] if self._ends else 0, dtype=np.int64), out)

    @property
    def base(self) -> Path | None:
        """None: what belongs to a sample lies in its shard."""
        return None

    def __len__(self) -> int:
        if self._kept is not None:
            return len(self._kept)
        return int(self._ends[-1]) if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        shard, inside = self._at(index)
        return self._form(Fields(self._shards[shard].path, self._shards[shard].sample(inside).parts))

    def place(self, index: int) -> str:
        """Shard and key of a row."""
        shard, inside = self._at(index)
        return f"{self._names[shard]}: {self._shards[shard].key(inside) or f'sample {inside}'}"

    def key(self, index: int) -> str:
        """The key of a row's sample, empty where it cannot be told."""
        shard, inside = self._at(index)
        return self._shards[shard].key(inside)

    def _at(self, index: int) -> tuple[int, int]:
        if self._kept is not None:
            index = int(self._kept[index])
        shard = bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)
