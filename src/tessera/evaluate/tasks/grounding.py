"""RefCOCO, RefCOCO+ and RefCOCOg: where is what a sentence describes? Right if the boxes overlap by half.

The dialect says in which words a model is asked and what the numbers in its answer count:

* ``ref``: ``<ref>sentence</ref>``, thousandths of width and height;
* ``json``: "in JSON format", thousandths;
* ``json_pixels``: "in JSON format", pixels of the image as the model saw it;
* ``vlmevalkit``: the file's own question, the unit guessed from the size of the numbers.

What size a model saw is its processor's business: whoever runs the model puts it into ``meta["seen"]`` as (width,
height). Without it the usual resizing is assumed: multiples of 28 pixels, between 56 x 56 and 12,845,056 in all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tessera.data.media import probe
from tessera.data.sample import BadRow
from tessera.data.tables import Rows
from tessera.evaluate.files import Fields, Items, Layout, Source, column_names, listed, open_rows, values_of
from tessera.evaluate.item import UNREAD, Benchmark, Item, Judged, Scored, accuracy, groups, mean
from tessera.evaluate.scorers import boxes
from tessera.evaluate.tasks.asking import asked

FACTOR, MIN_PIXELS, MAX_PIXELS = 28, 56 * 56, 12_845_056
THRESHOLD = 0.5
ASK: Mapping[str, str] = {
    "ref": "Please provide the bounding box coordinate of the region this sentence describes: <ref>{}</ref>",
    "json": 'Locate every object that matches the description "{}" in the image. '
    "Report bbox coordinates in JSON format.",
    "json_pixels": "Locate {}, output its bbox coordinates using JSON format.",
}
LAYOUT = Layout(
    {
        "id": ("index", "id", "question_id", "ref_id"),
        "sentence": ("sent", "expression", "sentence", "ref"),
        "answer": ("bbox", "bbox_x1", "x1", "box", "answer"),
        "image": ("image", "image_path", "file_name"),
        "split": ("split", "dataset"),
    },
    needed=("sentence", "answer", "image"),
)
LISTED = replace(LAYOUT, columns={**LAYOUT.columns, "sentence": ("answer",)})
ASKED = replace(LAYOUT, columns={**LAYOUT.columns, "sentence": ("question",)})


def corners(fields: Fields, *, sized: bool) -> boxes.Box | None:
    """The known box as x1, y1, x2, y2; ``sized`` boxes are x, y, width, height."""
    for names in (("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2"), ("x1", "y1", "x2", "y2")):
        values = [fields.row.get(name) for name in names]
        if all(value not in (None, "") for value in values):
            break
    else:
        values = listed(fields.get("answer"))
    try:
        x1, y1, x2, y2 = (float(str(value)) for value in values)
    except (TypeError, ValueError):
        return None
    return (x1, y1, x1 + x2, y1 + y2) if sized else (x1, y1, x2, y2)


def size_of(fields: Fields) -> tuple[int, int]:
    """(width, height) of the image, from the row or the image's header; BadRow if neither tells."""
    try:
        return int(float(fields.row["width"])), int(float(fields.row["height"]))
    except (KeyError, TypeError, ValueError):
        high, wide = probe(fields.images[0])
        return wide, high


def _reader(dialect: str) -> Callable[[Path], Items]:
    def read(path: Path) -> Items:
        rows = open_rows(path, "val")
        sized = _sized(rows)
        own = dialect == "vlmevalkit" and not sized and "question" in column_names(rows)
        source = Source(rows, LISTED if sized else ASKED if own else LAYOUT)

        def make(fields: Fields) -> Item:
            meta: dict[str, Any] = {}
            gold, problem = corners(fields, sized=sized), None
            try:
                meta["size"] = size_of(fields)
            except BadRow as error:
                problem = str(error)
            words = str(fields.get("sentence", "")) if own else _sentence_prompt(dialect, fields)
            item = asked(fields, words, gold, meta)
            if fields.get("sentence") is None:
                problem = "no sentence"
            wrong = item.problem or problem
            return Item(_name(fields, sized), item.row, gold, item.meta, wrong)

        if not sized:
            return Items(source, make)
        counts = [len(listed(value)) or 1 for value in values_of(source.rows, "answer")]
        kept = [at for at, count in enumerate(counts) for _ in range(count)]
        return Items(source, make, kept, [turn for count in counts for turn in range(count)])

    return read


def _sized(rows: Rows) -> bool:
    """Whether a row holds a list of sentences and a box as COCO writes it, with width and height."""
    names = column_names(rows)
    return "bbox" in names and "answer" in names and not {"sent", "expression", "ref"} & set(names)


def _name(fields: Fields, sized: bool) -> str:
    return f"{fields.id}/{fields.turn}" if sized else fields.id


def _sentence_prompt(dialect: str, fields: Fields) -> str:
    sentences = listed(fields.get("sentence")) or [""]
    sentence = str(sentences[fields.turn] if fields.turn < len(sentences) else sentences[0])
    return ASK[dialect if dialect in ASK else "ref"].format(sentence)


def _rule(frame: str | None) -> Callable[[Item, str], Scored]:
    """The rule for boxes in ``frame``; None guesses it as VLMEvalKit does."""

    def score(item: Item, answer: str) -> Scored:
        box = boxes.first_box(answer) if frame else boxes.vlmevalkit_box(answer)
        if box is None:
            return Scored(0.0, None, f"{UNREAD}: no box")
        wide, high = item.meta["size"]
        seen = item.meta.get("seen") or (_usual(wide, high) if frame == "pixels" else (wide, high))
        found = boxes.to_image(box, frame, (wide, high), seen) if frame else boxes.guessed(box, (wide, high))
        shared = boxes.overlap(found, item.gold)
        text = ", ".join(f"{value:.1f}" for value in found)
        return Scored(float(shared >= THRESHOLD), f"[{text}]", f"IoU {shared:.3f}")

    return score


def _usual(wide: int, high: int) -> tuple[int, int]:
    """(width, height) after the usual resizing; an image too narrow for it stays as it is."""
    from tessera.models.geometry import MAX_ASPECT, smart_resize

    if min(wide, high) <= 0 or max(wide, high) > MAX_ASPECT * min(wide, high):
        return wide, high
    down, across = smart_resize(high, wide, FACTOR, MIN_PIXELS, MAX_PIXELS)
    return across, down


def average(judged: Judged) -> dict[str, float]:
    """VLMEvalKit's number: the mean over splits of their accuracies, and these."""
    parts = groups(judged, "split")
    out = accuracy(judged)
    return out | ({"accuracy": sum(map(mean, parts.values())) / len(parts)} if parts else {})


BENCHMARKS = tuple(
    Benchmark(
        f"{name}@{dialect}",
        _reader(dialect),
        _rule(frame),
        average if dialect == "vlmevalkit" else accuracy,
        about=f"boxes for sentences; IoU >= 0.5; numbers are {meaning}",
        max_new_tokens=128,
    )
    for name in ("refcoco", "refcoco+", "refcocog")
    for dialect, frame, meaning in (
        ("ref", "thousand", "thousandths"),
        ("json", "thousand", "thousandths"),
        ("json_pixels", "pixels", "pixels of the resized image"),
        ("vlmevalkit", None, "whatever their size suggests"),
    )
)
