"""POPE: is there an object in the image? Three thirds ask for random, popular and adversarial absent objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tessera.evaluate.files import Fields, Items, Layout, Source, open_rows
from tessera.evaluate.item import UNREAD, Aggregate, Benchmark, Item, Judged, Scored, groups, mean
from tessera.evaluate.scorers import yes_no
from tessera.evaluate.tasks.asking import SHORT, asked, question_of

LAYOUT = Layout(
    {
        "id": ("index", "question_id", "id"),
        "question": ("question", "text"),
        "answer": ("answer", "label"),
        "image": ("image", "image_path"),
    }
)


def _reader(behind: str) -> Callable[[Path], Items]:
    def make(fields: Fields) -> Item:
        gold = str(fields.get("answer", "")).strip().capitalize()
        return asked(fields, question_of(fields) + behind, gold)

    return lambda path: Items(Source(open_rows(path, "test"), LAYOUT), make)


def by_vlmevalkit(item: Item, answer: str) -> Scored:
    """Right if the answer has the known one of the two words and not the other."""
    said = yes_no.said(answer)
    return Scored(float(said == item.gold), said, "" if said else f"{UNREAD}: neither yes nor no, or both")


def by_pope(item: Item, answer: str) -> Scored:
    """POPE's script: whatever does not deny in its first sentence says yes."""
    said = yes_no.said_pope(answer)
    return Scored(float(said == item.gold), said)


def figures(judged: Judged) -> dict[str, float]:
    """``f1``, ``precision`` ... of yes, and ``accuracy``, over all and for every category."""
    out = _figures(judged)
    parts = groups(judged, "category")
    for name, found in parts.items() if len(parts) > 1 else ():
        out |= {f"{key}/{name}": value for key, value in _figures(found).items() if key in ("f1", "accuracy")}
    return out


def _figures(judged: Judged) -> dict[str, float]:
    pairs = [(item.gold == "Yes", scored.parsed == "Yes") for item, scored in judged]
    return yes_no.detection(pairs) | {"accuracy": mean(judged)}


def figures_vlmevalkit(judged: Judged) -> dict[str, float]:
    """The same, where a question of several categories (``adversarial,popular``) counts in each, and so in all."""
    return figures(
        [
            (replace(item, meta={**item.meta, "category": name}), scored)
            for item, scored in judged
            for name in str(item.meta.get("category", "")).split(",")
        ]
    )


def _pope(dialect: str, behind: str, score: Callable[[Item, str], Scored], total: Aggregate) -> Benchmark:
    return Benchmark(
        f"pope@{dialect}",
        _reader(behind),
        score,
        total,
        metric="f1",
        about="objects that are not there; F1 of yes",
        max_new_tokens=32,
    )


BENCHMARKS = (
    _pope("vlmevalkit", "", by_vlmevalkit, figures_vlmevalkit),
    _pope("official", SHORT, by_pope, figures),
)
