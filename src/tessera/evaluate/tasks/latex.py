"""LaTeX-OCR: the formula in an image, as text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tessera.evaluate.files import Fields, Items, Layout, Source, open_rows
from tessera.evaluate.item import Benchmark, Item, Judged, Scored, mean
from tessera.evaluate.scorers import latex
from tessera.evaluate.tasks.asking import asked

QUERY = "Using LaTeX to perform OCR on the image."
LAYOUT = Layout(
    {
        "id": ("index", "id", "question_id"),
        "answer": ("text", "answer", "latex", "formula", "label", "latex_formula"),
        "image": ("image", "image_path", "filename"),
    },
    needed=("answer", "image"),
)
Cut = Callable[[str], list[str]]


def _items(path: Path) -> Items:
    def make(fields: Fields) -> Item:
        gold = fields.get("answer")
        return asked(fields, QUERY, None if gold is None else str(gold))

    return Items(Source(open_rows(path, "test"), LAYOUT), make)


def rule(cut: Cut) -> Callable[[Item, str], Scored]:
    """1 if the tokens are equal; the remark tells how far apart they are."""

    def score(item: Item, answer: str) -> Scored:
        said, true = cut(answer), cut(str(item.gold))
        near = latex.closeness([said], [true])
        return Scored(float(said == true), " ".join(said), "" if said == true else f"edit similarity {near:.3f}")

    return score


def total(cut: Cut) -> Callable[[Judged], dict[str, float]]:
    """``exact``, ``BLEU-4`` and ``edit``, 1 - sum of distances / sum of longer lengths."""

    def aggregate(judged: Judged) -> dict[str, float]:
        golds = [cut(str(item.gold or "")) for item, _ in judged]
        said = [(scored.parsed or "").split(" ") for _, scored in judged]
        return {"exact": mean(judged), "BLEU-4": latex.bleu4(said, golds), "edit": latex.closeness(said, golds)}

    return aggregate


BENCHMARKS = tuple(
    Benchmark(
        f"latexocr@{dialect}",
        _items,
        rule(cut),
        total(cut),
        metric="exact",
        about=f"formulas; {meaning}",
        max_new_tokens=512,
    )
    for dialect, cut, meaning in (
        ("im2markup", latex.spaced, "tokens are words, as the data set is written"),
        ("signs", latex.signs, "tokens are commands and characters, fences taken off"),
    )
)
