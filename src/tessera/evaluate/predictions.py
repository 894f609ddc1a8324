"""The answers of one benchmark as files that people and other scorers read.

    predictions.jsonl           everything about every item, in the benchmark's order
    predictions.tsv             VLMEvalKit's columns (index, question, answer, prediction, A, B, ..., category): its
                                own ``evaluate`` scores the file
    predictions-megatron.jsonl  what Megatron-LM's ``run_text_generation.py`` writes: its ``evaluate_*.py`` score it

A number that only its own author can compute is not worth much; these are so that others can compute it again.
"""

from __future__ import annotations

import csv
import io
import json
import string
from collections.abc import Mapping
from typing import Any

from tessera.data.sample import BadRow, normalise
from tessera.evaluate.results import PREDICTIONS, write_whole
from tessera.evaluate.runner import Outcome, Verdict, question_text

CAPTIONS = "CIDEr-D"
"""The metric of benchmarks whose answers are captions."""

TSV, MEGATRON = "predictions.tsv", "predictions-megatron.jsonl"
_FACTS = ("split", "category", "l2-category", "question_type", "answer_type")


def write(outcome: Outcome) -> None:
    """All three files, each whole or not at all."""
    directory = outcome.job.directory
    write_whole(
        directory / PREDICTIONS,
        "".join(_json(row_of(*pair)) for pair in zip(outcome.verdicts, outcome.together, strict=True)),
    )
    write_whole(directory / TSV, tsv(outcome))
    caption = outcome.job.benchmark.metric == CAPTIONS
    lines = (_json(megatron_row(verdict, caption=caption)) for verdict in outcome.verdicts)
    write_whole(directory / MEGATRON, "".join(lines))


def _json(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"


def row_of(verdict: Verdict, together: str | None = None) -> dict[str, Any]:
    """One line of ``predictions.jsonl``; ``row`` is the item's place, ``together`` what it stands or falls with."""
    item, line = verdict.item, verdict.line
    return {
        "id": item.id,
        "row": verdict.place,
        "question": question_text(item),
        "gold": item.gold,
        "answer": verdict.answer,
        "parsed": verdict.scored.parsed,
        "score": verdict.scored.score,
        "note": verdict.scored.note,
        "troubles": list(verdict.troubles),
        "reason": verdict.reason,
        "finish": "" if line is None else line.finish,
        "completion_tokens": 0 if line is None else line.completion_tokens,
        "images": image_names(verdict),
        "together": together,
        "meta": dict(item.meta),
    }


def image_names(verdict: Verdict) -> list[str | None]:
    """The paths of the item's images; None for one that lies inside the benchmark's file."""
    try:
        images = normalise(verdict.item.row, need_answer=False).images
    except BadRow:
        return []
    return [image if isinstance(image, str) and not image.startswith("data:") else None for image in images]


def tsv(outcome: Outcome) -> str:
    """The answers in VLMEvalKit's columns; only columns that hold something."""
    rows = [_vlmeval_row(verdict) for verdict in outcome.verdicts]
    used = {name for row in rows for name, value in row.items() if value not in ("", None)}
    columns = [
        name for name in ("index", "question", "answer", "prediction", *string.ascii_uppercase, *_FACTS) if name in used
    ]
    out = io.StringIO()
    writer = csv.writer(out, delimiter="\t", lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([row.get(name, "") for name in columns] for row in rows)
    return out.getvalue()


def _vlmeval_row(verdict: Verdict) -> dict[str, Any]:
    item, gold = verdict.item, verdict.item.gold
    row: dict[str, Any] = {
        "index": item.id,
        "question": question_text(item),
        "answer": json.dumps(gold, ensure_ascii=False) if isinstance(gold, list | dict) else gold,
        "prediction": verdict.answer or "",
    }
    row |= choices_of(item.meta)
    return row | {name: item.meta[name] for name in _FACTS if item.meta.get(name) not in (None, "")}


def choices_of(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The choices of a question by letter; empty if it has none."""
    for name in ("choices", "options", "index2ans"):
        found = meta.get(name)
        if isinstance(found, Mapping):
            return {str(letter): text for letter, text in found.items()}
        if isinstance(found, list | tuple):
            return dict(zip(string.ascii_uppercase, found, strict=False))
    return {}


def megatron_row(verdict: Verdict, *, caption: bool = False) -> dict[str, Any]:
    """The answer as Megatron-LM's scripts write it; multiple choice questions as for MMMU, captions as for COCO."""
    item, answer = verdict.item, (verdict.answer or "").strip()
    row: dict[str, Any] = {"sample_id": item.id, "prompt": question_text(item)}
    choices = choices_of(item.meta)
    if choices:
        kind = item.meta.get("question_type") or "multiple-choice"
        facts = {"index2ans": choices, "all_choices": list(choices), "question_type": kind}
        return {**row, "text": answer, "prediction": answer, "answer": item.gold, **facts}
    if caption:
        return {**row, "caption": answer, "ground_truth": item.gold}
    gold = item.gold if isinstance(item.gold, list) else [item.gold]
    return {**row, "answer": answer, "gt_answer": gold}
