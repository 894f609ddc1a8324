"""Benchmarks whose authors publish several files that belong together: these become one list of rows.

* VQAv2: ``*questions*.json`` and ``*annotations*.json``, by ``question_id``; images ``COCO_val2014_<12 digits>``;
* ChartQA: ``test_human.json`` and ``test_augmented.json`` in one folder;
* COCO captions: one file, whose ``annotations`` are joined to its ``images``; or Karpathy's ``sentences`` per image.

Anything else is a single file, or files that continue each other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tessera.config.errors import UserError
from tessera.data.tables import Rows
from tessera.evaluate.files import Given, open_rows, read_json


def vqa_pair(path: Path, split: str = "") -> Rows:
    """VQAv2's questions with their annotations; ``path`` is their folder, the questions' file, or any other layout."""
    if path.is_dir():
        asked = [file for file in sorted(path.glob("*.json")) if "question" in file.name.lower()]
        if len(asked) > 1:
            names = ", ".join(file.name for file in asked)
            raise UserError(f"{path}: holds several files of questions ({names}): name the one that is meant")
        if not asked:
            return open_rows(path, split)
    else:
        asked = [path] if path.suffix == ".json" and "question" in path.name.lower() else []
    if not asked:
        return open_rows(path, split)
    questions, known = read_json(asked[0]), _annotations(asked[0])
    subtype = questions.get("data_subtype") or (known or {}).get("data_subtype") or ""
    by_id = {found["question_id"]: found for found in (known or {}).get("annotations", [])}
    rows: list[dict[str, Any]] = []
    for question in _list(questions, "questions", asked[0]):
        image = question.get("image_id")
        name = f"{image:012d}" if isinstance(image, int) else str(image)
        row = {"image": f"COCO_{subtype}_{name}" if subtype else name, **question}
        found = by_id.get(question.get("question_id"), {})
        rows.append(row | {key: found[key] for key in ("answers", "answer_type", "question_type") if key in found})
    if not any("answers" in row for row in rows):
        raise UserError(f"{asked[0]}: no *annotations*.json with the answers to these questions is beside it")
    rows[0].setdefault("answers", [])
    return Given(str(asked[0]), asked[0].parent, rows)


def _annotations(questions: Path) -> Any:
    """The annotations that belong to a file of questions, by their common words; None if there are none."""
    found = [file for file in sorted(questions.parent.glob("*.json")) if "annotation" in file.name.lower()]
    for split in ("train2014", "val2014", "test2015", "test-dev2015"):
        if split in questions.name:
            found = [file for file in found if split in file.name]
    return read_json(found[0]) if len(found) == 1 else None


def _list(found: Any, key: str, path: Path) -> list[dict[str, Any]]:
    value = found.get(key) if isinstance(found, dict) else None
    if not isinstance(value, list) or not value or not all(isinstance(entry, dict) for entry in value):
        raise UserError(f"{path}: no list {key!r} of objects; is it another benchmark's file?")
    return value


def chart_folder(path: Path, split: str = "") -> Rows:
    """ChartQA's two files of a split as one; any other layout as it is."""
    files = [path / f"test_{kind}.json" for kind in ("human", "augmented")] if path.is_dir() else []
    if not any(file.is_file() for file in files):
        return open_rows(path, split)
    rows = [row | {"split": file.stem} for file in files if file.is_file() for row in read_json(file)]
    if not rows:
        raise UserError(f"{path}: holds no rows")
    return Given(str(path), path, rows)


def captions(path: Path, split: str = "") -> Rows:
    """Images with all their captions, from COCO's or Karpathy's json; any other layout as it is."""
    if path.suffix != ".json" or not path.is_file():
        return open_rows(path, split)
    found = read_json(path)
    if not isinstance(found, dict) or "images" not in found:
        return open_rows(path, split)
    images = _list(found, "images", path)
    rows: list[dict[str, Any]]
    if any("sentences" in image for image in images):
        chosen = [image for image in images if image.get("split") == "test"] or images
        rows = [
            {
                "id": image.get("cocoid", image.get("imgid", place)),
                "image": "/".join(part for part in (image.get("filepath"), image.get("filename")) if part),
                "answer": [sentence["raw"] for sentence in image.get("sentences", [])],
            }
            for place, image in enumerate(chosen)
        ]
    else:
        known: dict[Any, list[str]] = {}
        for note in _list(found, "annotations", path):
            known.setdefault(note.get("image_id"), []).append(str(note.get("caption", "")))
        rows = [
            {
                "id": image.get("id"),
                "image": image.get("file_name") or image.get("image") or str(image.get("id")),
                "answer": known.get(image.get("id"), []),
            }
            for image in images
        ]
    return Given(str(path), path.parent, rows)
