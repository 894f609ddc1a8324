"""``compare.html``: the table of differences, and the items whose score changed, those that became worse first.

Pictures come from the files that the predictions name; for benchmarks that hold their pictures inside, the benchmark's
own file is opened again if it is still where it was.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tessera.config.errors import UserError
from tessera.evaluate import tasks
from tessera.evaluate.compare import Difference, Row, compare, score_of, screen, table
from tessera.evaluate.item import Item
from tessera.evaluate.report import SCRIPT, STYLE, Card, gallery, gold_text, images_of, picture
from tessera.evaluate.results import write_whole
from tessera.observe.gallery import MAX_TEXT
from tessera.observe.page import box, page, section
from tessera.observe.page import table as html_table

PAGE = "compare.html"
CARDS = 200
PICTURES = 2


def main(first: Path, second: Path, output: Path, *, dry: bool = False) -> Path | None:
    """Compare two evaluations, print the table and write the page into ``output``; its path."""
    differences = compare(first, second)
    print(screen(differences, first, second), flush=True)
    if dry:
        return None
    output = output.expanduser()
    output.mkdir(parents=True, exist_ok=True)
    target = output / PAGE
    write_whole(target, build(differences, first, second))
    print(target, flush=True)
    return target


def build(differences: Sequence[Difference], first: Path, second: Path) -> str:
    """The page as text."""
    share = CARDS // len(differences)
    cards = [card for found in differences for card in cards_of(found, share)]
    head, rows = table(differences)
    named = f'<p class="sub">A {html.escape(str(first))}<br>B {html.escape(str(second))}</p>'
    body = [
        STYLE,
        f"<header><h1>{html.escape(second.name)} against {html.escape(first.name)}</h1>{named}</header>",
        section(
            "Differences",
            box("B against A", html_table(head, rows, numeric=(1, 2, 3, 4, 5, 6, 8, 9))),
            _notes(differences),
        ),
        section("Items whose score changed, worse first", gallery(cards, sum(len(d.changed) for d in differences))),
        SCRIPT,
    ]
    return page(f"{second.name} against {first.name}", [part for part in body if part])


def _notes(differences: Sequence[Difference]) -> str:
    text = (
        "B - A is over the items that both have, with the middle 95 % of what other samples of questions would have "
        "shown. p is the probability of a difference as large if there were none."
    )
    if len(differences) > 1:
        text += f" Of {len(differences)} comparisons one in twenty has p < 0.05 by chance."
    return f'<p class="note">{html.escape(text)}</p>'


def cards_of(found: Difference, most: int) -> list[Card]:
    """At most ``most`` of the items that changed: the worst, and the best."""
    changed = found.changed
    shown = changed if len(changed) <= most else [*changed[: most - most // 3], *changed[-(most // 3) :]]
    items = _items(found, shown)
    return [_card(found, name, items.get(name)) for name in shown]


def _items(found: Difference, names: Sequence[str]) -> dict[str, Item]:
    """The items of these predictions from the benchmark's own file, where their pictures are not files."""
    rows = found.first.rows
    wanted = {name: rows[name] for name in names if None in rows[name].get("images", [])}
    path = Path(str(found.first.summary.get("path", "")))
    if not wanted or not path.exists():
        return {}
    try:
        items = tasks.find(found.first.summary["benchmark"]).items(path)
    except UserError:
        return {}
    held = {name: items[int(row["row"])] for name, row in wanted.items() if int(row["row"]) < len(items)}
    return {name: item for name, item in held.items() if item.id == name}


def _card(found: Difference, name: str, item: Item | None) -> Card:
    a, b = found.first.rows[name], found.second.rows[name]
    one, two = score_of(a), score_of(b)
    kind, badge = ("better", "became better") if two > one else ("worse", "became worse")
    rows = [
        ("truth", html.escape(gold_text(a.get("gold"))[:MAX_TEXT])),
        ("A", _said(a, one)),
        ("B", _said(b, two)),
    ]
    part = str(a.get("meta", {}).get("category") or "")
    return Card(found.name, name, kind, badge, str(a.get("question", "")), rows, _pictures(a, item), part)


def _said(row: Row, score: float) -> str:
    answer = row.get("answer")
    text = html.escape(str(answer)[:MAX_TEXT]) if answer else f"<i>{'none' if answer is None else 'empty'}</i>"
    return f"{text} <span class=note>({score:.3g})</span>"


def _pictures(row: Row, item: Item | None) -> list[str]:
    if item is not None:
        return [picture(image) for image in images_of(item.row, Path())[:PICTURES]]
    images: list[Any] = row.get("images", [])
    return [picture(image) for image in images[:PICTURES] if isinstance(image, str)]
