"""Questions with short free answers: TextVQA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tessera.data.sample import BadRow
from tessera.evaluate.files import Fields, Items, Layout, Source, listed, open_rows
from tessera.evaluate.item import Benchmark, Item, Scored
from tessera.evaluate.scorers import vqa

SHORT = "\nAnswer the question using a single word or phrase."
TEXTVQA = Layout(
    {
        "id": ("index", "question_id"),
        "question": ("question",),
        "answer": ("answer", "answers"),
        "image": ("image", "image_path", "image_id"),
    }
)


def asked(fields: Fields, text: str, gold: Any, meta: dict[str, Any] | None = None) -> Item:
    """The item that shows the row's pictures and asks ``text``; what the row lacks becomes its problem."""
    problem = None if gold not in (None, "", []) else "no answer is known"
    try:
        images = fields.images
    except BadRow as error:
        images, problem = [], str(error)
    content = "<image>" * len(images) + text
    return Item(
        fields.id, {"messages": [{"role": "user", "content": content}], "images": images}, gold, meta or {}, problem
    )


def _textvqa(path: Path) -> Items:
    source = Source(open_rows(path, "validation"), TEXTVQA)

    def make(fields: Fields) -> Item:
        return asked(
            fields, f"{fields.get('question', '')}{SHORT}", [str(gold) for gold in listed(fields.get("answer"))]
        )

    return Items(source, make)


def _official(item: Item, answer: str) -> Scored:
    return Scored(vqa.leave_one_out(answer, item.gold, "evalai"), answer.strip())


BENCHMARKS = (Benchmark("textvqa@official", _textvqa, _official, about="scene text, 10 people's answers"),)
