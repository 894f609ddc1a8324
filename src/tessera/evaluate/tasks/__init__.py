"""Benchmarks by name, ``benchmark@dialect``; a name without a dialect means the first one listed."""

from __future__ import annotations

from collections.abc import Mapping

from tessera.evaluate.item import Benchmark, unknown
from tessera.evaluate.tasks import captions, choice, grounding, latex, mathvista, vqa, yes_no

BENCHMARKS: Mapping[str, Benchmark] = {
    found.name: found
    for module in (choice, mathvista, vqa, yes_no, captions, grounding, latex)
    for found in module.BENCHMARKS
}
"""Every benchmark in every dialect; of one benchmark the default dialect comes first."""
ALIASES: Mapping[str, str] = {
    "refcoco_plus": "refcoco+",
    "latex_ocr": "latexocr",
    "spdocvqa": "docvqa",
    "infographicvqa": "infovqa",
    "coco_caption": "coco",
    "flickr": "flickr30k",
}


def find(name: str, flag: str = "--eval_datasets") -> Benchmark:
    """The benchmark called ``name``, in its default dialect unless one is named; UserError with the nearest names."""
    wanted, at, dialect = name.lower().replace("-", "_").partition("@")
    wanted = ALIASES.get(wanted, wanted) + at + dialect
    for full, found in BENCHMARKS.items():
        if wanted in (full, full.partition("@")[0]):
            return found
    short = list(dict.fromkeys(full.partition("@")[0] for full in BENCHMARKS))
    if at and wanted.partition("@")[0] in short:
        short = [full for full in BENCHMARKS if full.partition("@")[0] == wanted.partition("@")[0]]
    raise unknown(flag, name, short)
