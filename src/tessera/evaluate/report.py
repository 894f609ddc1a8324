"""``report.html``: what a model can do, how sure that is, and what it gets wrong, on one page that needs nothing else.

From top to bottom: the score of every benchmark with its interval, its parts (categories, splits), what was wrong with
items or answers, and then the items themselves, wrong ones first, each with its pictures, its question, the truth, the
answer, and what the rule read in it. They can be filtered by benchmark, verdict, category and words.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from tessera.data.encode import located
from tessera.data.sample import BadRow, ImageRef, Slice, normalise
from tessera.evaluate.results import write_whole
from tessera.evaluate.runner import TROUBLES, Outcome, Verdict, question_text
from tessera.evaluate.summary import Summary
from tessera.observe.gallery import MAX_TEXT, data_uri, marked
from tessera.observe.page import box, missing, page, section, table, tile

REPORT = "report.html"
CARDS = 240
"""Most items on the page; of each benchmark an equal share, a fifth of it for items that are right."""
PICTURES = 4
LISTED = 40
ALIKE = 0.6
"""Similarity from which differences between truth and answer are marked."""

STYLE = """<style>
.bar { position: sticky; top: 0; background: var(--bg); padding: 8px 0; display: flex; gap: 8px; flex-wrap: wrap;
  align-items: center; z-index: 1 }
.bar select, .bar input { font: inherit; font-size: 13.5px; color: var(--ink); background: var(--card);
  border: 1px solid var(--edge); border-radius: 6px; padding: 4px 8px; max-width: 16em }
.card.worse .badge { background: var(--badbg); color: var(--bad) }
.card.better .badge { background: var(--goodbg); color: var(--good) }
.card.part .badge { background: var(--warnbg); color: var(--warn) } .card[hidden] { display: none }
.card .question { white-space: pre-wrap; max-height: 14em; overflow-y: auto }
.card .id { float: right; color: var(--soft); font-size: 12px } .pictures img { max-height: 200px }
.whisker { display: block; width: 160px; height: 12px } .whisker line { stroke: var(--c0); stroke-width: 2 }
.whisker circle { fill: var(--c0) } .whisker rect { fill: var(--edge) }
</style>"""
SCRIPT = """<script>
const bar = document.querySelector('.bar'), cards = [...document.querySelectorAll('.gallery .card')];
if (bar) bar.addEventListener('input', () => {
  const [name, verdict, part] = [...bar.querySelectorAll('select')].map(s => s.value);
  const words = bar.querySelector('input').value.toLowerCase().split(/\\s+/).filter(Boolean);
  let shown = 0;
  for (const card of cards) {
    const text = card.textContent.toLowerCase(), data = card.dataset;
    const on = (!name || data.name === name) && (!verdict || data.verdict === verdict || data.trouble === verdict)
      && (!part || data.part === part) && words.every(word => text.includes(word));
    card.hidden = !on; shown += on;
  }
  bar.querySelector('output').textContent = shown + ' of ' + cards.length;
});
</script>"""


@dataclass(frozen=True, slots=True)
class Card:
    """One item as it is shown; ``verdict`` is right, wrong, part (between the two) or open, ``rows`` what is said."""

    name: str
    id: str
    verdict: str
    badge: str
    question: str
    rows: Sequence[tuple[str, str]]
    pictures: Sequence[str]
    part: str = ""
    trouble: str = ""

    def html(self) -> str:
        """The card; ``rows`` and ``pictures`` are HTML already, everything else is escaped."""
        e = html.escape
        data = f'data-name="{e(self.name)}" data-verdict="{e(self.verdict)}" data-part="{e(self.part)}"'
        rows = "".join(f"<dt>{e(label)}</dt><dd>{text}</dd>" for label, text in self.rows)
        question = f'<p class="question">{e(self.question[:MAX_TEXT])}</p>' if self.question else ""
        pictures = f'<div class="pictures">{"".join(self.pictures)}</div>' if self.pictures else ""
        return (
            f'<article class="card {e(self.verdict)}" {data} data-trouble="{e(self.trouble)}">{pictures}'
            f'<div class="text"><span class="badge">{e(self.badge)}</span>'
            f'<span class="id">{e(self.name)} · {e(self.id)}</span>{question}<dl>{rows}</dl></div></article>'
        )


def write(
    path: Path, model: str, outcomes: Sequence[Outcome], summaries: Sequence[Summary], facts: Iterable[Sequence[str]]
) -> Path:
    """Write the page of these benchmarks to ``path``; ``facts`` are rows about the evaluation itself."""
    cards = [card for outcome in outcomes for card in cards_of(outcome, CARDS // max(1, len(outcomes)))]
    figures = "".join(tile(found.shown(found.value), _caption(found)) for found in summaries)
    body = [
        STYLE,
        f'<header><h1>{html.escape(model)}</h1><p class="sub">tessera eval</p>',
        f'<div class="tiles">{figures}</div></header>',
        section("Benchmarks", scores(summaries)),
        section("Parts", _columns(parts(found) for found in summaries)),
        section("What was wrong", _columns(troubles(outcome) for outcome in outcomes)),
        section("Items, errors first", gallery(cards, sum(len(outcome.verdicts) for outcome in outcomes))),
        section("The evaluation", box("Settings", table((), facts))),
        SCRIPT,
    ]
    write_whole(path, page(f"{model} · evaluation", [part for part in body if part]))
    return path


def _columns(blocks: Iterable[str]) -> str:
    inner = "".join(blocks)
    return f'<div class="cols">{inner}</div>' if inner else ""


def _caption(found: Summary) -> str:
    return " ".join(part for part in (found.name, found.metric, found.range(found.interval)) if part)


def scores(summaries: Sequence[Summary]) -> str:
    """The table of benchmarks."""
    head = ("benchmark", "scored as", "metric", "score", "95 %", "items", "remarks")
    rows = []
    for found in summaries:
        remarks = [] if found.is_mean else ["no mean over items"]
        remarks += [f"the first {found.n:,} of {found.total:,}"] if found.n < found.total else []
        rows.append(
            (
                found.name,
                found.benchmark,
                found.metric,
                found.shown(found.value),
                found.range(found.interval) or "-",
                f"{found.n:,}",
                ", ".join(remarks),
            )
        )
    more = [
        box(
            f"{found.name}: all metrics",
            table((), [(name, found.shown(value)) for name, value in found.metrics.items() if "/" not in name]),
        )
        for found in summaries
        if sum("/" not in name for name in found.metrics) > 1
    ]
    inner = f'<div class="cols">{"".join(more)}</div>' if more else ""
    return f'<div class="box">{table(head, rows, numeric=(3, 4, 5))}</div>{inner}'


def parts(found: Summary) -> str:
    """One table per fact that a benchmark is broken down by, its interval drawn."""
    tables = []
    for field in dict.fromkeys(part.field for part in found.parts):
        rows = "".join(
            f"<tr><td>{html.escape(part.name)}</td><td class=num>{part.n:,}</td>"
            f"<td class=num>{found.shown(part.score)}</td><td>{_whisker(part.score, part.interval)}</td></tr>"
            for part in found.parts
            if part.field == field
        )
        names = f"<th>{html.escape(field)}</th><th class=num>items</th><th class=num>score</th><th>0 to 1</th>"
        head = f"<thead><tr>{names}</tr></thead>"
        tables.append(box(f"{found.name} by {field}", f"<table>{head}<tbody>{rows}</tbody></table>"))
    return "".join(tables)


def _whisker(value: float, interval: Any) -> str:
    """A score between 0 and 1 and its interval as a picture."""

    def at(score: float) -> float:
        return round(4 + 152 * min(1.0, max(0.0, score)), 1)

    low, high = (interval.low, interval.high) if interval else (value, value)
    return (
        '<svg class="whisker" viewBox="0 0 160 12" aria-hidden="true"><rect x="4" y="5.5" width="152" height="1"/>'
        f'<line x1="{at(low)}" y1="6" x2="{at(high)}" y2="6"/><circle cx="{at(value)}" cy="6" r="3.5"/></svg>'
    )


def troubles(outcome: Outcome) -> str:
    """What was wrong with items and answers: counted, and the first of each kind listed."""
    counts = outcome.troubles
    if not counts:
        return ""
    blocks = [
        table(("what", "items"), [(TROUBLES[kind], f"{count:,}") for kind, count in counts.items()], numeric=(1,))
    ]
    rows = [
        (verdict.item.id, ", ".join(TROUBLES[kind] for kind in verdict.troubles), verdict.reason or verdict.scored.note)
        for verdict in outcome.verdicts
        if verdict.troubles
    ]
    listing = table(("item", "what", "why"), rows[:LISTED])
    blocks.append(
        f"<details><summary>the first {min(LISTED, len(rows))} of {len(rows):,} items</summary>{listing}</details>"
    )
    return box(outcome.job.name, "".join(blocks))


def cards_of(outcome: Outcome, most: int) -> list[Card]:
    """At most ``most`` items: wrong ones first, the lowest scores in front, then a few that are right."""

    def score(verdict: Verdict) -> float:
        return verdict.scored.score or 0.0

    best = max((score(verdict) for verdict in outcome.verdicts), default=1.0) or 1.0
    wrong = sorted((v for v in outcome.verdicts if score(v) < best or score(v) == 0.0), key=score)
    right = [v for v in outcome.verdicts if score(v) == best and score(v) > 0.0]
    spared = min(len(right), max(1, most // 5))
    chosen = [*wrong[: most - spared], *right]
    return [_card(outcome, verdict) for verdict in chosen[:most]]


def _card(outcome: Outcome, verdict: Verdict) -> Card:
    job, item, value = outcome.job, verdict.item, verdict.scored.score
    kind = "open" if value is None else "right" if value >= 1.0 else "wrong" if value == 0.0 else "part"
    badge = {"open": "not judged", "right": "right", "wrong": "wrong", "part": f"score {value or 0.0:.3g}"}[kind]
    gold, answer = gold_text(item.gold), verdict.answer
    shown_gold, shown_answer = html.escape(gold[:MAX_TEXT]), html.escape((answer or "")[:MAX_TEXT])
    if kind in ("wrong", "part") and answer and isinstance(item.gold, str) and alike(gold, answer):
        shown_gold, shown_answer = marked(gold[:MAX_TEXT], answer[:MAX_TEXT])
    rows = [
        ("truth", shown_gold or "<i>none</i>"),
        ("answer", shown_answer or f"<i>{'empty' if answer is not None else 'none'}</i>"),
    ]
    parsed, note = verdict.scored.parsed, verdict.reason or verdict.scored.note
    if parsed is not None and parsed != (answer or "").strip():
        rows.append(("read as", html.escape(parsed[:MAX_TEXT])))
    rows += [("note", html.escape(note[:MAX_TEXT]))] if note else []
    part = str(item.meta.get("category") or item.meta.get("split") or "")
    trouble = "trouble" if verdict.troubles else ""
    pictures = [picture(image) for image in images_of(item.row, job.base)[:PICTURES]]
    return Card(job.name, item.id, kind, badge, question_text(item), rows, pictures, part, trouble)


def alike(gold: str, answer: str) -> bool:
    """Whether two texts are near enough for their differences to say something."""
    near = SequenceMatcher(None, gold[:MAX_TEXT], answer[:MAX_TEXT], autojunk=False)
    return len(gold) > 3 and near.quick_ratio() > ALIKE and near.ratio() > ALIKE


def gold_text(gold: Any) -> str:
    """A truth as text; several accepted ones on lines of their own, each once."""
    if isinstance(gold, list | tuple):
        return "\n".join(dict.fromkeys(str(one) for one in gold))
    return "" if gold is None else str(gold)


def images_of(row: Any, base: Path) -> list[ImageRef]:
    """The images of a row; none if it cannot be read."""
    try:
        return [located(image, base) for image in normalise(row, need_answer=False).images]
    except BadRow:
        return []


def picture(image: ImageRef) -> str:
    """An image as HTML, shrunk and inside the page, or why it is not shown."""
    if isinstance(image, Slice):
        with open(image.file, "rb") as file:
            file.seek(image.offset)
            image = file.read(image.size)
    name = image if isinstance(image, str) else "data:;base64," + base64.b64encode(image).decode("ascii")
    short = "an image" if name.startswith("data:") else name
    try:
        uri = data_uri(name, [Path.cwd()])
    except (OSError, ValueError) as error:
        return f'<p class="missing">{html.escape(short)}: {html.escape(str(error)[:200])}</p>'
    return f'<img src="{uri}" alt="{html.escape(Path(short).name)}" loading="lazy">'


def gallery(cards: Sequence[Card], total: int) -> str:
    """The cards under a bar that filters them."""
    if not cards:
        return missing("No items.")
    names = list(dict.fromkeys(card.name for card in cards))
    parts_held = sorted({card.part for card in cards if card.part})
    kinds = [
        (kind, text) for kind, text in VERDICTS.items() if any(kind in (card.verdict, card.trouble) for card in cards)
    ]
    bars = [
        _select("all benchmarks", [(name, name) for name in names]),
        _select("all verdicts", kinds),
        _select("all categories", [(name, name) for name in parts_held]),
        '<input type="search" placeholder="words" aria-label="words">',
        f'<output class="note">{len(cards)} of {len(cards)}</output>',
        f'<span class="note">shown of {total:,} items</span>',
    ]
    inner = "".join(card.html() for card in cards)
    return f'<div class="bar">{"".join(bars)}</div><div class="gallery">{inner}</div>'


VERDICTS = {
    "wrong": "wrong",
    "part": "in part",
    "right": "right",
    "open": "not judged",
    "trouble": "something was wrong",
    "worse": "became worse",
    "better": "became better",
}
"""What cards can be filtered by."""


def _select(title: str, options: Sequence[tuple[str, str]]) -> str:
    held = "".join(f'<option value="{html.escape(value)}">{html.escape(text)}</option>' for value, text in options)
    return f'<select aria-label="{title}"><option value="">{title}</option>{held}</select>'
