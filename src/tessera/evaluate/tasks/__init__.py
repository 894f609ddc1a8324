"""Benchmarks by name, ``benchmark@dialect``; a name without a dialect means the first one listed."""

from __future__ import annotations

from collections.abc import Mapping

from tessera.evaluate.item import Benchmark, unknown
from tessera.evaluate.tasks import vqa

BENCHMARKS: Mapping[str, Benchmark] = {found.name: found for found in (*vqa.BENCHMARKS,)}
"""Every benchmark in every dialect; of one benchmark the default dialect comes first."""


def find(name: str, flag: str = "--eval_datasets") -> Benchmark:
    """The benchmark called ``name``, in its default dialect unless one is named; UserError with the nearest names."""
    wanted = name.lower().replace("-", "_")
    for full, found in BENCHMARKS.items():
        if wanted in (full, full.partition("@")[0]):
            return found
    short = list(dict.fromkeys(full.partition("@")[0] for full in BENCHMARKS))
    raise unknown(flag, name, [full for full in BENCHMARKS] if "@" in name else short)
