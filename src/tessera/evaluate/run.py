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
from dataclasses import replace
from pathlib import Path

from tessera.config.run import Run
from tessera.evaluate import answer_files, comparison, results, runner
from tessera.evaluate.asked import jobs_of, native
from tessera.evaluate.benchmark import evaluated, ticking
from tessera.evaluate.publish import publish
from tessera.evaluate.sources import answerer_of, model_name, with_generation
from tessera.evaluate.summary import screen
from tessera.parallel.mesh import Mesh
from tessera.parallel.watchdog import group_timeout

SAY_S = 30.0
"""Seconds between two lines about progress where there is no terminal."""


DAY_S = 86400.0
"""How long ranks wait for each other if ``--ddp_timeout`` says nothing."""


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
    # Ranks meet after hours, and one that fails ends the others without being waited for.
    patience = DAY_S if run.provenance["ddp_timeout"] == "default" else group_timeout(run.parallel.ddp_timeout)
    mesh = Mesh.from_env(timeout_s=patience)
    directory = evaluate(run, mesh)
    mesh.close()
    return directory


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
            for note in answerer.notes:
                print(f"note: {note}", file=sys.stderr)
            results.claim(directory, answerer.settings)
        mesh.barrier()
        outcomes = []
        memory = results.remembered(output, answerer.settings)
        for job, items in ((replace(job, directory=directory / job.name), items) for job, items in jobs):
            share = len(range(mesh.rank, runner.number_of(job, items), mesh.world))
            with ticking(job.name, share, speaks=mesh.is_main) as tick:
                outcome, told = evaluated(job, items, answerer, mesh, memory, tick=tick)
            if outcome is not None:
                print(told, flush=True)
                outcomes.append(outcome)
        if mesh.is_main:
            found = publish(directory, name, outcomes, answerer.settings)
            print(screen(name, found, str(directory)), flush=True)
        return directory
    finally:
        answerer.close()
