"""Answer files of ``tessera infer --task``, and of Megatron-LM's generation script, judged by Megatron's rules.

``--input_path`` is a file, or what ``--output_path`` was: then every rank's and partition's file of the task belongs to
it. A question answered twice counts once, as in Megatron (which counts documents and infographics as often as they
occur). The known answers are in the files; captions and MMMU may be judged by another file of truths.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tessera.config.errors import UserError
from tessera.evaluate.files import listed, read_json
from tessera.evaluate.item import Benchmark, Item, unknown
from tessera.evaluate.tasks import BENCHMARKS
from tessera.evaluate.tasks.choice import same_words
from tessera.infer.tasks import TASKS, output_file

Line = dict[str, Any]
_REAL_WORLD = Benchmark("realworldqa@megatron", lambda path: [], same_words, about="photographs; answer files only")
JUDGES: Mapping[str, Benchmark] = {
    "captioning": BENCHMARKS["coco@megatron"],
    "TextVQA": BENCHMARKS["textvqa@megatron"],
    "VQAv2": BENCHMARKS["vqav2@megatron"],
    "ChartQA": BENCHMARKS["chartqa@megatron"],
    "InfoVQA": BENCHMARKS["infovqa@megatron"],
    "SPDocVQA": BENCHMARKS["docvqa@megatron"],
    "AI2D": BENCHMARKS["ai2d@megatron"],
    "OCRBench": BENCHMARKS["ocrbench@megatron"],
    "RealworldQA": _REAL_WORLD,
    "MathVista": BENCHMARKS["mathvista@megatron"],
    "MMMU": BENCHMARKS["mmmu@megatron"],
}
"""Who judges the answers of a task."""
REPEATED = ("InfoVQA", "SPDocVQA")


def answer_files(input_path: str, task: str) -> list[Path]:
    """The file ``input_path``, or all files that were written for it; UserError if there is none."""
    path = Path(input_path).expanduser()
    if path.is_file():
        return [path]
    pattern = str(output_file(glob.escape(input_path), task, 0, 0)).replace(
        "dprank=0-partition=0", "dprank=*-partition=*"
    )
    found = sorted(Path(name) for name in glob.glob(pattern))
    if not found:
        raise UserError(
            f"--input_path {input_path}: no such file, and no {Path(pattern).name} in {Path(pattern).parent}"
        )
    return found


def read_answers(task: str, input_path: str, truths: Path | None = None) -> tuple[Benchmark, list[tuple[Item, str]]]:
    """The judge of ``task``, and every question in the answer files with its answer.

    ``truths``: COCO's annotations for captions, or MMMU's ``answer_dict_val.json``. A line that cannot be read becomes
    an item with a problem. UserError if the files are another task's.
    """
    if task not in JUDGES:
        near = {name.lower(): name for name in TASKS}
        raise unknown("--task", task, sorted(near.values()))
    found: list[tuple[Item, str]] = []
    seen: set[str] = set()
    known = _truths(task, truths) if truths is not None else None
    for file in answer_files(input_path, task):
        for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            if not isinstance(line, dict):
                found.append((Item(f"{file.name}:{number}", {}, None, {}, "the line is not a JSON object"), ""))
                continue
            name = json.dumps(_field(line, "sample_id", file, number, task))
            if name in seen and task not in REPEATED:
                continue
            seen.add(name)
            found.append(_answered(task, line, file, number, known))
    if not found:
        raise UserError(f"--input_path {input_path}: holds no answers")
    return JUDGES[task], found


def _field(line: Line, key: str, file: Path, number: int, task: str) -> Any:
    if key not in line:
        raise UserError(f"{file}:{number}: no field {key!r}; was it written for --task {task}?")
    return line[key]


def _truths(task: str, path: Path) -> dict[str, Any]:
    """Known answers by question."""
    found = read_json(path)
    if task == "captioning" and isinstance(found, dict) and isinstance(found.get("annotations"), list):
        known: dict[str, Any] = {}
        for note in found["annotations"]:
            known.setdefault(str(note.get("image_id")), []).append(note.get("caption", ""))
        return known
    if task == "MMMU" and isinstance(found, dict):
        return {key: value.get("ground_truth") if isinstance(value, dict) else value for key, value in found.items()}
    raise UserError(f"{path}: not the truths of --task {task} (only captioning and MMMU read them from a file)")


def _answered(task: str, line: Line, file: Path, number: int, known: Mapping[str, Any] | None) -> tuple[Item, str]:
    spec = TASKS[task]
    answer = str(_field(line, "prediction" if task == "MMMU" else spec.answer, file, number, task) or "")
    gold: Any = known.get(str(line["sample_id"])) if known is not None else _field(line, spec.truth, file, number, task)
    meta = {"source": line.get("dataset_name"), "category": line.get("data_type")}
    make: Callable[[Any], Any] = {"MMMU": lambda g: g, "MathVista": lambda g: g}.get(task, listed)
    gold = make(gold)
    if task in ("MMMU", "MathVista"):
        by_letter = line.get("index2ans") or {}
        meta = {"choices": by_letter if task == "MMMU" else list(by_letter.values())}
        if task == "MMMU":
            meta["category"] = "_".join(str(line["sample_id"]).split("_")[1:-1])
            gold = gold if by_letter else [str(each) for each in listed(gold)]
    elif isinstance(gold, list):
        gold = [str(each) for each in gold]
    problem = None if gold not in (None, "", [], [""]) else "no answer is known"
    row = {"messages": [{"role": "user", "content": str(line.get("prompt", ""))}]}
    return Item(str(line["sample_id"]), row, gold, meta, problem), answer
