"""MathVista: mathematics in pictures.

The authors let a judge model extract what an answer says; :mod:`tessera.evaluate.scorers.mathvista` tells what is done
here instead.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tessera.evaluate.files import Fields, Items, Layout, Source, listed, open_rows
from tessera.evaluate.item import UNREAD, Benchmark, Item, Scored
from tessera.evaluate.scorers import mathvista
from tessera.evaluate.tasks.asking import asked, question_of
from tessera.infer.tasks import LETTER, TASKS

LAYOUT = Layout(
    {
        "id": ("index", "pid"),
        "question": ("question",),
        "query": ("query", "question"),
        "answer": ("answer",),
        "image": ("decoded_image", "image", "image_path"),
        "choices": ("choices",),
        "kind": ("answer_type",),
        "question_type": ("question_type",),
        "precision": ("precision",),
        "category": ("task",),
    },
    needed=("question", "answer", "image", "question_type", "kind"),
)


def _choices(fields: Fields) -> list[str]:
    return [str(choice) for choice in listed(fields.get("choices"))] if _chosen(fields) else []


def _chosen(fields: Fields) -> bool:
    return fields.get("question_type") == "multi_choice"


def _meta(fields: Fields) -> dict[str, Any]:
    described = fields.get("metadata")
    task = described.get("task") if isinstance(described, dict) else fields.get("category")
    precision = fields.get("precision")
    return {
        "choices": _choices(fields),
        "kind": fields.get("kind"),
        "precision": int(float(precision)) if precision is not None else 0,
        "category": task,
    }


def _ask(fields: Fields) -> Item:
    """The benchmark's own query: a hint about the form of the answer, the question, the choices."""
    return asked(fields, question_of(fields, "query"), fields.get("answer"), _meta(fields))


def _ask_megatron(fields: Fields) -> Item:
    choices, gold = _choices(fields), fields.get("answer")
    if choices:
        lettered = mathvista.lettered(choices)
        options = "".join(f"{letter}. {text}\n" for letter, text in lettered.items())
        question = f"{question_of(fields)}\n{options}{LETTER}"
        gold = next((letter for letter, text in lettered.items() if text == gold), gold)
    else:
        question = question_of(fields, "query").replace("Hint: ", "")
    return asked(fields, question, gold, _meta(fields), system=TASKS["MathVista"].system)


def _reader(make: Callable[[Fields], Item]) -> Callable[[Path], Items]:
    return lambda path: Items(Source(open_rows(path, "testmini"), LAYOUT), make)


def _scored(found: tuple[bool, str | None], note: str) -> Scored:
    right, said = found
    return Scored(float(right), said, f"{UNREAD}: {note}" if said is None else "")


def by_vlmevalkit(item: Item, answer: str) -> Scored:
    """VLMEvalKit's comparison, the answer taken as extracted; it never accepts a text or a list without choices."""
    meta = item.meta
    found = mathvista.vlmevalkit(answer, str(item.gold), meta["choices"], meta["kind"])
    return _scored(found, "only a judge model could read it")


def by_authors(item: Item, answer: str) -> Scored:
    """The authors' normalisation and comparison, the answer taken as extracted."""
    meta = item.meta
    found = mathvista.official(answer.strip(), str(item.gold), meta["choices"], meta["kind"], meta["precision"])
    return _scored(found, "only a judge model could read it")


def by_megatron(item: Item, answer: str) -> Scored:
    """Megatron's rule, which needs no judge."""
    gold = item.gold[0] if isinstance(item.gold, list) else item.gold
    right, said = mathvista.megatron(answer, str(gold), item.meta["choices"])
    note = f"{UNREAD}: the first choice is taken, as this dialect does" if said is None else ""
    return Scored(float(right), said, note)


BENCHMARKS = (
    Benchmark("mathvista@vlmevalkit", _reader(_ask), by_vlmevalkit, about="no judge model", max_new_tokens=1024),
    Benchmark("mathvista@official", _reader(_ask), by_authors, about="no judge model", max_new_tokens=1024),
    Benchmark("mathvista@megatron", _reader(_ask_megatron), by_megatron, about="by rule", max_new_tokens=1024),
)
