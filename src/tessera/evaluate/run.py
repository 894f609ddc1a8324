"""``tessera eval``: benchmarks asked of a model or a server, answers of earlier runs scored, two evaluations compared.

    tessera eval --model DIR --eval_datasets MMMU=MMMU_DEV_VAL.tsv ChartQA=chartqa/
    tessera eval --eval_url http://127.0.0.1:8000 --eval_datasets MMMU=MMMU_DEV_VAL.tsv
    tessera eval --input_path out/nvlm-TextVQA-dprank=0-partition=0.jsonl
    tessera eval --compare eval_output/base eval_output/tuned

Every rank answers its share of the items into a file of its own; rank 0 then judges all of them. Nothing but these
files is shared, so a run goes on from whatever they hold (``evaluate/results.py``).
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tessera.config.run import Run
from tessera.evaluate import answer_files, comparison, results, runner
from tessera.evaluate.answerer import Answerer
from tessera.evaluate.asked import jobs_of, native
from tessera.evaluate.item import Item
from tessera.evaluate.publish import publish
from tessera.evaluate.runner import Counts, Job, Outcome
from tessera.evaluate.sources import answerer_of, model_name, with_generation
from tessera.observe.progress import Progress, format_time
from tessera.parallel.mesh import Mesh
from tessera.parallel.watchdog import group_timeout

SAY_S = 30.0
"""Seconds between two lines about progress where there is no terminal."""


def main(run: Run) -> Path | None:
    """Evaluate as ``run`` says; the directory of the results, None for a dry run or another program's."""
    if run.evaluate.compare:
        first, second = (Path(name).expanduser() for name in run.evaluate.compare)
        return comparison.main(first, second, Path(run.evaluate.eval_output_dir), dry=run.dry_run)
    if run.evaluate.input_path is not None:
        return answer_files.main(run)
    if not native(run):
        from tessera.evaluate import evalscope

        return evalscope.main(run)
    run = with_generation(run)
    mesh = Mesh.from_env(timeout_s=group_timeout(run.parallel.ddp_timeout))
    try:
        return evaluate(run, mesh)
    finally:
        mesh.close()


def evaluate(run: Run, mesh: Mesh) -> Path | None:
    """Ask and score every benchmark of ``run``; the directory of the results, None for a dry run."""
    # Files are looked at before weights are read, so that a wrong path is told at once.
    jobs = [(job, runner.wanted(job)) for job in jobs_of(run, Path())]
    if run.dry_run:
        for job, items in jobs:
            print(f"would ask {runner.number_of(job, items)} of {len(items)} questions of {job.name} in {job.path}")
        return None
    answerer = answerer_of(run)
    try:
        name = model_name(run, answerer)
        output = Path(run.evaluate.eval_output_dir).expanduser()
        directory = output / re.sub(r"[^\w.@+-]+", "-", name)
        if mesh.is_main:
            results.claim(directory, answerer.settings)
        mesh.barrier()
        outcomes = []
        memory = results.remembered(output, answerer.settings)
        for job, items in ((_placed(job, directory), items) for job, items in jobs):
            outcome = _one(job, items, answerer, mesh, memory)
            outcomes += [outcome] if outcome else []
        if mesh.is_main:
            publish(directory, name, outcomes, answerer.settings)
        return directory
    finally:
        answerer.close()


def _placed(job: Job, directory: Path) -> Job:
    return replace(job, directory=directory / job.name)


def _one(job: Job, items: Sequence[Item], answerer: Answerer, mesh: Mesh, memory: Mapping[str, Any]) -> Outcome | None:
    """Answer this rank's share of a benchmark; all of it, judged, on rank 0."""
    total = runner.number_of(job, items)
    with results.Answers(job.directory, mesh.rank) as store:
        share = len(range(mesh.rank, total, mesh.world))
        with ticking(job.name, share, speaks=mesh.is_main) as tick:
            counts = runner.answer(
                job, items, answerer, store, rank=mesh.rank, world=mesh.world, memory=memory, tick=tick
            )
    sums = [int(value) for value in mesh.sum([counts.resumed, counts.remembered, counts.asked, counts.tokens])]
    mesh.barrier()
    if not mesh.is_main:
        return None
    print(_told(job, total, sums, counts), flush=True)
    with results.Answers(job.directory, mesh.rank) as store:
        return runner.judge(job, items, store.lines)


def _told(job: Job, total: int, sums: Sequence[int], counts: Counts) -> str:
    resumed, remembered, asked, tokens = sums
    parts = [f"{asked:,} asked"]
    parts += [f"{resumed:,} answered before"] if resumed else []
    parts += [f"{remembered:,} known from other questions"] if remembered else []
    rate = f", {tokens / counts.seconds:,.0f} tokens/s" if asked and counts.seconds else ""
    return f"{job.name}: {total:,} questions, {', '.join(parts)} in {format_time(counts.seconds)}{rate}"


@contextmanager
def ticking(label: str, total: int, *, speaks: bool) -> Iterator[Any]:
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
