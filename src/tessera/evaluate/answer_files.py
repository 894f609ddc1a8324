"""``tessera eval --input_path``: scores of answers that ``tessera infer --task`` (or Megatron-LM) wrote.

    out/nvlm-TextVQA-dprank=0-partition=0.jsonl  out/nvlm-TextVQA-dprank=0-partition=1.jsonl  ...

The files hold questions, answers and truths, so nothing else is needed: no model, no images, no benchmark. Parts of one
task are read as one, in the order of their partitions; a question that occurs in two of them counts once. The rules are
those of Megatron-LM's ``evaluate_*.py`` (dialect ``megatron``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tessera.config.errors import UserError
from tessera.config.run import Run
from tessera.evaluate import tasks
from tessera.evaluate.item import Item
from tessera.evaluate.publish import publish
from tessera.evaluate.results import Line
from tessera.evaluate.runner import Job, Outcome, verdict_of
from tessera.infer.tasks import TASKS

_NAME = re.compile(r"(?P<stem>.*)-(?P<task>[A-Za-z0-9]+)-dprank=(?P<rank>\d+)-partition=(?P<part>\d+)\.jsonl?$")
DIALECTS: Mapping[str, str] = {
    "captioning": "coco_caption@megatron",
    "TextVQA": "textvqa@megatron",
    "VQAv2": "vqav2@megatron",
    "ChartQA": "chartqa@megatron",
    "InfoVQA": "infovqa@megatron",
    "SPDocVQA": "docvqa@megatron",
    "AI2D": "ai2d@megatron",
    "OCRBench": "ocrbench@megatron",
    "RealworldQA": "realworldqa@megatron",
    "MathVista": "mathvista@megatron",
    "MMMU": "mmmu@megatron",
}
"""The rule for every task of ``tessera infer``."""


def main(run: Run) -> Path | None:
    """Score the files of ``--input_path``; the directory of the results, None for a dry run."""
    assert run.evaluate.input_path is not None
    path = Path(run.evaluate.input_path).expanduser()
    found = answer_files(path, run.infer.task)
    output = Path(run.evaluate.eval_output_dir).expanduser()
    name = path.stem if path.is_file() else path.resolve().name
    directory = output / re.sub(r"[^\w.@+-]+", "-", name)
    outcomes = []
    for task, files in found.items():
        benchmark = tasks.find(DIALECTS[task], "--task")
        rows = list(_rows(files))
        job = Job(task, benchmark, path, directory / task)
        if run.dry_run:
            print(f"would score {len(rows)} answers of {task} in {len(files)} files as {benchmark.name}")
        else:
            outcomes.append(judged(job, rows[: run.evaluate.eval_limit], TASKS[task].answer, TASKS[task].truth))
    if run.dry_run:
        return None
    directory.mkdir(parents=True, exist_ok=True)
    publish(directory, name, outcomes, {"input_path": str(path)})
    return directory


def answer_files(path: Path, task: str | None = None) -> dict[str, list[Path]]:
    """The files of answers at ``path`` by task, in the order of their parts; UserError if there are none.

    ``task`` chooses among several, and says what a file is whose name does not.
    """
    if not path.exists():
        raise UserError(f"--input_path {path}: no such file or directory")
    files = (
        [path] if path.is_file() else [file for file in sorted(path.iterdir()) if file.suffix in (".jsonl", ".json")]
    )
    named: dict[str, list[tuple[int, int, Path]]] = {}
    for file in files:
        match = _NAME.match(file.name)
        kind = match["task"] if match is not None and match["task"] in TASKS else None
        if kind is None and task is not None and (match is None or path.is_file()):
            kind = task
        if kind is not None and task in (None, kind):
            order = (int(match["part"]), int(match["rank"])) if match is not None else (0, 0)
            named.setdefault(kind, []).append((*order, file))
    if not named:
        wanted = task or "*"
        raise UserError(
            f"--input_path {path}: holds no answers (NAME-{wanted}-dprank=0-partition=0.jsonl); give --task if the "
            "file is called otherwise"
        )
    return {kind: [file for *_, file in sorted(held)] for kind, held in named.items()}


def _rows(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """The answers in ``files``, each question once."""
    seen: set[str] = set()
    for file in files:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise UserError(f"--input_path {file}: line {number} is not JSON ({error})") from None
                if not isinstance(row, dict):
                    raise UserError(f"--input_path {file}: line {number} is not an object")
                name = str(row.get("sample_id", f"{file.name} {number}"))
                if name not in seen:
                    seen.add(name)
                    yield row


def judged(job: Job, rows: Sequence[Mapping[str, Any]], answer: str, truth: str) -> Outcome:
    """The verdicts over these answers; ``answer`` and ``truth`` are what the fields are called."""
    if not rows:
        raise UserError(f"--input_path {job.path}: holds no answers to {job.name}")
    if not any(answer in row for row in rows):
        raise UserError(
            f"--input_path {job.path}: no field {answer!r} with the answer to {job.name} "
            f"(it has {', '.join(rows[0])}); is it another task's file?"
        )
    verdicts = []
    for place, row in enumerate(rows):
        item = item_of(place, row, truth, known=(answer, "prediction"))
        said = row.get(answer)
        text = said[0] if isinstance(said, list) and said else said
        line = None if text is None else Line(item.id, "", str(text), "stop")
        verdicts.append(verdict_of(job.benchmark, place, item, line))
    metrics = job.benchmark.aggregate([(verdict.item, verdict.scored) for verdict in verdicts])
    return Outcome(job, verdicts, metrics, len(rows))


def item_of(place: int, row: Mapping[str, Any], truth: str, known: Sequence[str]) -> Item:
    """The question of one line: its truth is in field ``truth``, its other fields are facts about it."""
    asked = {"messages": [{"role": "user", "content": str(row.get("prompt", ""))}]}
    facts = {name: value for name, value in row.items() if name not in (*known, truth, "prompt", "sample_id")}
    if "index2ans" in facts:
        facts["choices"] = facts["index2ans"]
    gold = row.get(truth)
    problem = None if gold not in (None, [], "") else f"no field {truth!r} with the truth"
    return Item(str(row.get("sample_id", place)), asked, gold, facts, problem)
