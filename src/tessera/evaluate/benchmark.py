"""One benchmark over all ranks: each answers its share, rank 0 judges everything.

Ranks share nothing but the files of answers; between answering and judging they wait for each other once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from tessera.evaluate import results, runner
from tessera.evaluate.answerer import Answerer
from tessera.evaluate.item import Item
from tessera.evaluate.results import Line
from tessera.evaluate.runner import Job, Outcome
from tessera.observe.progress import Progress, format_time
from tessera.parallel.mesh import Mesh

SAY_S = 30.0
"""Seconds between two lines about progress where there is no terminal."""


def evaluated(
    job: Job,
    items: Sequence[Item],
    answerer: Answerer,
    mesh: Mesh,
    memory: Mapping[str, Line] | None = None,
    *,
    tick: Callable[[], None] = lambda: None,
) -> tuple[Outcome | None, str]:
    """The verdicts over all items on rank 0, None elsewhere; and where the answers came from, in a sentence.

    ``memory`` holds answers to other questions by key, ``tick`` is called once per item. Every rank has to call it.
    """
    total = runner.number_of(job, items)
    with results.Answers(job.directory, mesh.rank) as store:
        counts = runner.answer(job, items, answerer, store, rank=mesh.rank, world=mesh.world, memory=memory, tick=tick)
    found = [counts.resumed, counts.remembered, counts.asked, counts.tokens]
    resumed, remembered, asked, tokens = (int(value) for value in mesh.sum(found))
    mesh.barrier()
    if not mesh.is_main:
        return None, ""
    parts = [f"{asked:,} asked"]
    parts += [f"{resumed:,} answered before"] if resumed else []
    parts += [f"{remembered:,} known from other questions"] if remembered else []
    rate = f", {tokens / counts.seconds:,.0f} tokens/s" if asked and counts.seconds else ""
    told = f"{job.name}: {total:,} questions, {', '.join(parts)} in {format_time(counts.seconds)}{rate}"
    return runner.judge(job, items, {line.id: line for line in results.read_answers(store.directory)}), told


@contextmanager
def ticking(label: str, total: int, *, speaks: bool) -> Iterator[Callable[[], None]]:
    """What to call once per item: moves a bar on a terminal, prints a line now and then elsewhere."""
    started = said = time.monotonic()
    done = 0
    silent = not speaks or sys.stderr.isatty()
    with Progress(label, total, visible=None if speaks else False) as bar:

        def tick() -> None:
            nonlocal done, said
            done += 1
            bar.advance()
            now = time.monotonic()
            if not silent and now - said > SAY_S and done < total:
                said = now
                left = (now - started) / done * (total - done)
                print(f"{label}: {done:,} of {total:,}, {format_time(left)} to go", flush=True)

        yield tick
