"""A user's own questions: any dataset file, whose answers are judged by a rule with a name.

    tessera eval --model DIR --dataset rows.jsonl --scorer exact_match

The rows are those that training reads: a conversation that ends with the answer, or one column per question and answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import overload

from tessera.data.sample import BadRow, normalise
from tessera.data.sources import open_rows, parse_dataset_spec
from tessera.data.tables import Rows
from tessera.evaluate.item import Benchmark, Item, Scored, unknown


class OwnItems(Sequence[Item]):
    """The rows of a dataset as items; the last answer of a row is its truth."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        try:
            row = self._rows[index]
        except BadRow as error:
            return Item(str(index), {}, None, {}, str(error))
        name, meta = str(row.get("id", index)), {key: row[key] for key in ("category", "split") if row.get(key)}
        try:
            sample = normalise(row, need_answer=False)
        except BadRow as error:
            return Item(name, row, None, meta, str(error))
        problem = "no answer is known" if sample.answer is None else None
        return Item(name, row, sample.answer, meta, problem)


def _exact(item: Item, answer: str) -> Scored:
    return Scored(float(answer.split() == str(item.gold).split()), answer.strip())


def _contains(item: Item, answer: str) -> Scored:
    return Scored(float(" ".join(str(item.gold).lower().split()) in " ".join(answer.lower().split())), answer.strip())


SCORERS: Mapping[str, Callable[[Item, str], Scored]] = {"exact_match": _exact, "contains": _contains}
"""Rules by name."""


def benchmark(scorer: str, flag: str = "--scorer") -> Benchmark:
    """A benchmark over a user's rows that ``scorer`` judges; UserError with the nearest names if there is none."""
    if scorer not in SCORERS:
        raise unknown(flag, scorer, list(SCORERS))

    def items(path: Path) -> Sequence[Item]:
        return OwnItems(open_rows(parse_dataset_spec(str(path))))

    return Benchmark(f"{scorer}@own", items, SCORERS[scorer], max_new_tokens=512)
