"""Captions of photographs: COCO and Flickr30k, against five people's captions each.

``official`` cuts words as the COCO evaluation does; ``megatron`` drops a final full stop and upper case first, which
changes little; ``vlmevalkit`` does not cut at all: its words end at spaces, and punctuation and case count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tessera.evaluate.files import Fields, Items, Layout, Source, in_split
from tessera.evaluate.item import Benchmark, Item, Judged, Scored
from tessera.evaluate.scorers import captions
from tessera.evaluate.tasks.asking import asked, question_of
from tessera.evaluate.tasks.published import captions as published
from tessera.evaluate.tasks.vqa import texts
from tessera.infer.tasks import ANSWER

LAYOUT = Layout(
    {
        "id": ("index", "id", "question_id", "img_id"),
        "question": ("question",),
        "answer": ("answer", "answers", "caption", "captions"),
        "image": ("image", "image_path", "file_name", "filename"),
    },
    needed=("answer", "image"),
)
ONE_SENTENCE = "Provide a one-sentence caption for the provided image."
BRIEF = "Give a brief description of this image in one sentence."
GENERAL = (
    "Please describe this image in general. Directly provide the description, "
    'do not include prefix like "This image depicts". '
)
Cut = Callable[[str], list[str]]


def _reader(dialect: str, split: str) -> Callable[[Path], Items]:
    def make(fields: Fields) -> Item:
        gold = texts(fields.get("answer"))
        if dialect == "megatron":
            return asked(fields, BRIEF, gold, system=ANSWER)
        own = question_of(fields) if dialect == "vlmevalkit" else ""
        return asked(fields, own or {"vlmevalkit": GENERAL}.get(dialect, ONE_SENTENCE), gold)

    def read(path: Path) -> Items:
        source = Source(published(path, split), LAYOUT)
        return Items(source, make, in_split(source, ("test", "val", "validation")))

    return read


def kept(item: Item, answer: str) -> Scored:
    """The caption; what it is worth is known when all captions are."""
    return Scored(None, answer)


def _bare(text: str) -> list[str]:
    return captions.words(text.rstrip(".").lower())


def _cut_all(judged: Judged, cut: Cut, cut_gold: Cut) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Words of answers and references; without references (a bad row) an empty one, which nothing matches."""
    answers = [cut(scored.parsed or "") for _, scored in judged]
    return answers, [[cut_gold(gold) for gold in item.gold or [""]] for item, _ in judged]


def _total(cut: Cut, cut_gold: Cut, rouge_cut: Cut | None) -> Callable[[Judged], dict[str, float]]:
    def total(judged: Judged) -> dict[str, float]:
        if not judged:
            return {"CIDEr-D": 0.0}
        answers, references = _cut_all(judged, cut, cut_gold)
        scores = captions.cider_d(answers, references)
        out = {"CIDEr-D": sum(scores) / len(scores)}
        out |= {f"BLEU-{at}": value for at, value in enumerate(captions.bleu(answers, references), 1)}
        if rouge_cut is not None:
            answers, references = _cut_all(judged, rouge_cut, rouge_cut)
        rouge = [captions.rouge_l(answer, golds) for answer, golds in zip(answers, references, strict=True)]
        return out | {"ROUGE-L": sum(rouge) / len(rouge)}

    return total


def _settled(cut: Cut, cut_gold: Cut) -> Callable[[Judged], list[Scored]]:
    def settled(judged: Judged) -> list[Scored]:
        scores: Sequence[float] = captions.cider_d(*_cut_all(judged, cut, cut_gold))
        return [replace(scored, score=score) for (_, scored), score in zip(judged, scores, strict=True)]

    return settled


CUTS: Mapping[str, tuple[Cut, Cut, Cut | None]] = {
    "official": (captions.words, captions.words, None),
    "megatron": (_bare, captions.words, None),
    "vlmevalkit": (lambda text: text.split(), lambda text: text.split(), lambda text: text.split(" ")),
}
"""How each dialect cuts answers and references, and both for ROUGE-L where that differs."""


def _caption(name: str, dialect: str, split: str, about: str) -> Benchmark:
    cut, cut_gold, rouge = CUTS[dialect]
    return Benchmark(
        f"{name}@{dialect}",
        _reader(dialect, split),
        kept,
        _total(cut, cut_gold, rouge),
        _settled(cut, cut_gold),
        metric="CIDEr-D",
        about=about,
        max_new_tokens=64,
    )


BENCHMARKS = tuple(
    _caption(name, dialect, split, f"captions of {whose} photographs")
    for name, split, whose in (("coco", "val", "COCO's"), ("flickr30k", "test", "Flickr30k's"))
    for dialect in ("official", "vlmevalkit", "megatron")
)
