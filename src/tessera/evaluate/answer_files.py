"""``tessera eval --input_path``: scores of answers that ``tessera infer --task`` (or Megatron-LM) wrote.

    out/nvlm-TextVQA-dprank=0-partition=0.jsonl  out/nvlm-TextVQA-dprank=0-partition=1.jsonl  ...

``--input_path`` is one file, what ``--output_path`` was (``out/nvlm``), or the directory (``out``). The files hold
questions, answers and truths, so nothing else is needed: no model, no images, no benchmark. Parts of one task are read
as one. The rules are those of Megatron-LM's ``evaluate_*.py`` (``evaluate/tasks/answers.py``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tessera.config.errors import UserError
from tessera.config.run import Run
from tessera.evaluate.item import Item
from tessera.evaluate.publish import publish
from tessera.evaluate.results import Line
from tessera.evaluate.runner import Job, Outcome, outcome_of, verdict_of
from tessera.evaluate.summary import screen
from tessera.evaluate.tasks.answers import JUDGES, read_answers

_NAME = re.compile(r"(?P<stem>.*)-(?P<task>[A-Za-z0-9]+)-dprank=\d+-partition=\d+\.jsonl")


def main(run: Run) -> Path | None:
    """Score the files of ``--input_path``; the directory of the results, None for a dry run."""
    given, truths = run.evaluate.input_path, run.infer.gt_path
    assert given is not None
    path = Path(given).expanduser()
    name = path.stem if path.is_file() else path.resolve().name
    directory = Path(run.evaluate.eval_output_dir).expanduser() / re.sub(r"[^\w.@=+-]+", "-", name)
    outcomes = []
    for label, task, place in found_at(path, run.infer.task):
        benchmark, pairs = read_answers(task, place, None if truths is None else Path(truths).expanduser())
        pairs = pairs[: run.evaluate.eval_limit]
        if run.dry_run:
            print(f"would score {len(pairs)} answers to {task} in {place} as {benchmark.name}")
        else:
            outcomes.append(judged(Job(label, benchmark, path, directory / label), pairs))
    if run.dry_run:
        return None
    directory.mkdir(parents=True, exist_ok=True)
    found = publish(directory, name, outcomes, {"input_path": str(path)})
    print(screen(name, found, str(directory)), flush=True)
    return directory


def found_at(path: Path, task: str | None) -> list[tuple[str, str, str]]:
    """(name, task, ``input_path`` of ``read_answers``) of every task whose answers are at ``path``.

    ``task`` chooses among several, and says what a file is whose name does not. UserError if there are none.
    """
    if path.is_file():
        match = _NAME.fullmatch(path.name)
        kind = task or (match["task"] if match is not None and match["task"] in JUDGES else None)
        if kind is None:
            raise UserError(f"--input_path {path}: its name does not say which task it answers; give --task")
        return [(kind, kind, str(path))]
    folder = path if path.is_dir() else path.parent
    stems = {}
    for file in sorted(folder.glob("*-dprank=*-partition=*.jsonl")):
        match = _NAME.fullmatch(file.name)
        if match is None or match["task"] not in JUDGES or task not in (None, match["task"]):
            continue
        if path.is_dir() or match["stem"] == path.name:
            stems[match["stem"], match["task"]] = str(folder / match["stem"])
    if not stems:
        what = "no such file or directory, and no" if not path.exists() else "holds no"
        raise UserError(f"--input_path {path}: {what} answers (NAME-{task or 'TASK'}-dprank=0-partition=0.jsonl)")
    several = len({stem for stem, _ in stems}) > 1
    return [(f"{stem}-{kind}" if several else kind, kind, place) for (stem, kind), place in stems.items()]


def judged(job: Job, pairs: Sequence[tuple[Item, str]]) -> Outcome:
    """The verdicts over these items and their answers."""
    verdicts = []
    for place, (item, answer) in enumerate(pairs):
        line = Line(item.id, "", answer, "stop")
        verdicts.append(verdict_of(job.benchmark, place, item, line))
    return outcome_of(job, verdicts, len(pairs))
