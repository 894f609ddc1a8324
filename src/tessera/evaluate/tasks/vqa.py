"""Questions with short free answers: TextVQA, VQAv2, ChartQA, DocVQA, InfoVQA, OCRBench."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tessera.evaluate.files import Fields, Items, Layout, Source, listed, open_rows
from tessera.evaluate.item import Benchmark, Item, Judged, Scored, groups, mean
from tessera.evaluate.scorers import vqa
from tessera.evaluate.tasks.asking import SHORT, asked, question_of
from tessera.evaluate.tasks.published import chart_folder, vqa_pair
from tessera.infer.tasks import TASKS

TEXTVQA = Layout(
    {
        "id": ("index", "question_id"),
        "question": ("question",),
        "answer": ("answer", "answers"),
        "image": ("image", "image_path", "image_id"),
    }
)
VQAV2 = Layout(
    {
        "id": ("index", "question_id"),
        "question": ("question",),
        "answer": ("answers", "answer"),
        "image": ("image", "image_path"),
        "category": ("answer_type", "category"),
    }
)
CHARTQA = Layout(
    {
        "id": ("index", "id"),
        "question": ("question", "query"),
        "answer": ("answer", "label"),
        "image": ("image", "image_path", "imgname"),
        "split": ("split", "type", "human_or_machine"),
    }
)
DOCUMENTS = Layout(
    {
        "id": ("index", "questionId", "question_id"),
        "question": ("question",),
        "answer": ("answer", "answers"),
        "image": ("image", "image_path", "image_local_name"),
    }
)
OCRBENCH = Layout(
    {
        "id": ("index", "id"),
        "question": ("question",),
        "answer": ("answer", "answers"),
        "image": ("image", "image_path"),
        "category": ("category", "question_type", "type"),
        "source": ("dataset", "dataset_name"),
    }
)


def texts(value: Any) -> list[str]:
    """Known answers as texts: a list, the text of one, VQAv2's ``{"answer": ...}`` objects, or a single answer."""
    return [str(each["answer"] if isinstance(each, Mapping) else each) for each in listed(value)]


def _reader(
    layout: Layout, split: str, task: str | None, opened: Callable[[Path, str], Any] = open_rows
) -> Callable[[Path], Items]:
    """A reader that asks as VLMEvalKit does, or with the words of Megatron's ``task``."""

    def read(path: Path) -> Items:
        source = Source(opened(path, split), layout)

        def make(fields: Fields) -> Item:
            meta = {"source": fields.get("source")}
            gold = texts(fields.get("answer"))
            behind = TASKS[task].behind if task else ("" if layout is OCRBENCH else SHORT)
            system = TASKS[task].system if task else None
            return asked(fields, question_of(fields) + behind, gold, meta, system=system)

        return Items(source, make)

    return read


def _rule(judge: Callable[[str, Sequence[str]], float]) -> Callable[[Item, str], Scored]:
    return lambda item, answer: Scored(judge(answer, item.gold), answer.strip())


def _best(judge: Callable[[str, str], float]) -> Callable[[str, Sequence[str]], float]:
    return lambda answer, golds: max(judge(answer, gold) for gold in golds)


def _official(style: str) -> Callable[[str, Sequence[str]], float]:
    return lambda answer, golds: vqa.leave_one_out(answer, golds, style)


FORMULAS = ("Handwritten Mathematical Expression Recognition", "HME100k")


def _formula(item: Item) -> bool:
    return item.meta.get("category") == FORMULAS[0] or item.meta.get("source") == FORMULAS[1]


def ocr_hits(item: Item, answer: str) -> Scored:
    """OCRBench: 1 if any of the known texts occurs in the answer."""
    return Scored(float(any(vqa.reads(answer, gold, formula=_formula(item)) for gold in item.gold)), answer.strip())


def ocr_hits_megatron(item: Item, answer: str) -> Scored:
    """Megatron's OCRBench: a point for *every* known text that occurs, so an item may score more than 1."""
    formula = item.meta.get("source") == FORMULAS[1]
    hits = sum(vqa.reads(answer, gold, formula=formula) for gold in item.gold)
    return Scored(float(hits), answer.strip(), f"{hits} points" if hits > 1 else "")


def ocr_total(judged: Judged) -> dict[str, float]:
    """``score``, the points (1000 at most, for the whole benchmark), their mean, and the points of each kind."""
    parts = groups(judged, "category")
    points = {f"score/{name}": sum(scored.score or 0.0 for _, scored in found) for name, found in parts.items()}
    return {"accuracy": mean(judged), "score": sum(scored.score or 0.0 for _, scored in judged)} | points


def _both(
    name: str, layout: Layout, split: str, task: str, about: str, **rules: Callable[..., float]
) -> list[Benchmark]:
    """A benchmark in each dialect of ``rules``; ``megatron`` asks with the words of its ``task``."""
    opened = {"VQAv2": vqa_pair, "ChartQA": chart_folder}.get(task, open_rows)
    return [
        Benchmark(
            f"{name}@{dialect}",
            _reader(layout, split, task if dialect == "megatron" else None, opened),
            _rule(rule),
            about=about,
            max_new_tokens=32,
        )
        for dialect, rule in rules.items()
    ]


BENCHMARKS = (
    *_both(
        "textvqa",
        TEXTVQA,
        "validation",
        "TextVQA",
        "text in scenes; the answers of 10 people",
        official=_official("evalai"),
        vlmevalkit=_official("vlmevalkit"),
        megatron=vqa.agreement,
    ),
    *_both(
        "vqav2",
        VQAV2,
        "validation",
        "VQAv2",
        "questions about photographs; the answers of 10 people",
        official=_official("vqa"),
        vlmevalkit=_official("vlmevalkit"),
        megatron=vqa.agreement,
    ),
    *_both(
        "chartqa",
        CHARTQA,
        "test",
        "ChartQA",
        "charts; numbers within 5 %",
        official=_best(vqa.relaxed),
        megatron=_best(vqa.relaxed_megatron),
    ),
    *_both(
        "docvqa", DOCUMENTS, "validation", "SPDocVQA", "documents; ANLS", official=vqa.anls, megatron=vqa.anls_megatron
    ),
    *_both(
        "infovqa",
        DOCUMENTS,
        "validation",
        "InfoVQA",
        "infographics; ANLS",
        official=vqa.anls,
        megatron=vqa.anls_megatron,
    ),
    Benchmark(
        "ocrbench@official",
        _reader(OCRBENCH, "test", None),
        ocr_hits,
        ocr_total,
        about="reading of many kinds; the known text occurs in the answer",
        max_new_tokens=128,
    ),
    Benchmark(
        "ocrbench@megatron",
        _reader(OCRBENCH, "test", "OCRBench"),
        ocr_hits_megatron,
        ocr_total,
        about="the same, a point for each known text that occurs",
        max_new_tokens=128,
    ),
)
