"""``tessera eval --compare A B``: is B better, or was it luck?

Two evaluations are compared over the items that both have, item by item (``evaluate/bootstrap.py``). A difference whose
interval does not contain zero is one that another sample of questions would have shown as well; with several
benchmarks, one in twenty does so by chance, which is why every ``p`` is shown and none is called a success.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessera.config.errors import UserError
from tessera.evaluate.bootstrap import Paired, paired
from tessera.evaluate.results import PREDICTIONS, SUMMARY, read_json

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One benchmark of one evaluation, read from disk: its figures, and its predictions by item."""

    name: str
    directory: Path
    summary: Mapping[str, Any]
    rows: Mapping[str, Row]


@dataclass(frozen=True, slots=True)
class Difference:
    """One benchmark in two evaluations; ``test`` is over the ``common`` items."""

    name: str
    first: Evaluated
    second: Evaluated
    common: Sequence[str]
    test: Paired

    @property
    def scale(self) -> float:
        """What scores are multiplied by where they are shown."""
        return float(self.first.summary["scale"])

    @property
    def changed(self) -> list[str]:
        """The items whose score changed, those that became worse first, most changed first."""

        def change(item: str) -> float:
            return score_of(self.second.rows[item]) - score_of(self.first.rows[item])

        return sorted((item for item in self.common if change(item)), key=change)


def score_of(row: Row) -> float:
    """The score of a prediction; 0 where it could not be judged."""
    return float(row.get("score") or 0.0)


def read(path: Path, flag: str = "--compare") -> dict[str, Evaluated]:
    """The benchmarks of the evaluation in ``path`` (a model's directory, or that of one benchmark)."""
    if path.name == PREDICTIONS:
        path = path.parent
    if not path.is_dir():
        raise UserError(f"{flag} {path}: no such directory; name one that tessera eval wrote")
    files = [path / PREDICTIONS] if (path / PREDICTIONS).is_file() else sorted(path.glob(f"*/{PREDICTIONS}"))
    found = {}
    for file in files:
        summary = read_json(file.parent / SUMMARY)
        if summary is None:
            raise UserError(f"{flag} {path}: {file.parent} has no {SUMMARY}; run its tessera eval to the end")
        rows = _rows(file)
        found[str(summary["name"])] = Evaluated(str(summary["name"]), file.parent, summary, rows)
    if not found:
        raise UserError(f"{flag} {path}: holds no {PREDICTIONS}; is it a directory that tessera eval wrote?")
    return found


def _rows(file: Path) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    try:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                rows.setdefault(str(row["id"]), row)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a file of predictions ({error})") from None
    return rows


def compare(first: Path, second: Path) -> list[Difference]:
    """The benchmarks that both evaluations have, compared; UserError if there is none, or they were scored unlike."""
    one, two = read(first), read(second)
    differences = []
    for name in (name for name in one if name in two):
        a, b = one[name], two[name]
        if a.summary["benchmark"] != b.summary["benchmark"]:
            raise UserError(
                f"--compare: {name} was scored as {a.summary['benchmark']} in {first} and as "
                f"{b.summary['benchmark']} in {second}; evaluate one of them again"
            )
        common = [item for item in a.rows if item in b.rows]
        if common:
            scores = (_units(held.rows, common) for held in (a, b))
            differences.append(Difference(name, a, b, common, paired(*scores)))
    if not differences:
        raise UserError(f"--compare {first} {second}: no common items (there {', '.join(one)}; here {', '.join(two)})")
    return differences


def _units(rows: Mapping[str, Row], common: Sequence[str]) -> list[float]:
    """The mean score of the items of each group that stands or falls together, in a fixed order."""
    found: dict[str, list[float]] = {}
    for item in common:
        found.setdefault(str(rows[item].get("together", item)), []).append(score_of(rows[item]))
    return [sum(scores) / len(scores) for scores in found.values()]


def table(differences: Sequence[Difference]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows of the table of differences."""
    head = ("benchmark", "items", "A", "B", "B - A", "95 %", "p", "test", "better", "worse")
    rows = []
    for found in differences:
        test, scale = found.test, found.scale
        means = [sum(_units(held.rows, found.common)) / test.n for held in (found.first, found.second)]
        rows.append(
            (
                found.name,
                f"{test.n:,}",
                *(f"{mean * scale:.2f}" for mean in means),
                f"{test.difference * scale:+.2f}",
                f"[{test.interval.low * scale:+.1f}, {test.interval.high * scale:+.1f}]",
                f"{test.p:.2g}" if test.p < 0.1 else f"{test.p:.2f}",
                "McNemar, exact" if test.exact else "bootstrap",
                f"{test.better:,}",
                f"{test.worse:,}",
            )
        )
    return head, rows


def screen(differences: Sequence[Difference], first: Path, second: Path) -> str:
    """The comparison on one screen."""
    head, rows = table(differences)
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [f"A  {first}", f"B  {second}"]
    for row in (head, *rows):
        lines.append(
            "  ".join(
                cell.ljust(w) if at == 0 else cell.rjust(w)
                for at, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )
    for found in differences:
        own = [held.summary["metric"] for held in (found.first,) if not held.summary["is_mean"]]
        if own:
            lines.append(f"{found.name}: compared by the items' own scores; its {own[0]} is no mean of them")
        missing = len(found.first.rows) + len(found.second.rows) - 2 * len(found.common)
        if missing:
            lines.append(f"{found.name}: {missing:,} items are in one of the two only and were left out")
    return "\n".join(lines)
