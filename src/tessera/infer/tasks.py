"""Benchmarks in their published files, asked and answered as Megatron-LM's multimodal scripts do it.

    tessera infer --task TextVQA --input_image_path IMAGES --gt_path TextVQA_0.5.1_val.json --output_path out/vlm

A task knows four things: where its questions are, which image belongs to which, the words around a question, and what
the answer is called in the output, one JSON object a line::

    out/vlm-TextVQA-dprank=0-partition=0.jsonl
    {"sample_id": 34602, "prompt": "what is the brand?\\n...", "answer": "nokia", "gt_answer": ["nokia", ...]}

Captioning takes every image of a folder, its number from its name, and its truths from COCO's ``annotations``. MMMU and
MathVista are folders of parquet files that hold the images; of MMMU's samples those named ``validation_*`` are asked,
each with its first image, as the benchmark's own single-image recipe does. All other tasks are a JSON file of questions
beside a folder of images. ``--num_partitions`` and ``--partition_id`` give each of several machines its part.
"""

from __future__ import annotations

import ast
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessera.config.errors import UserError
from tessera.data.tables import open_file
from tessera.infer.results import Results

FOLLOW = "Follow the user's instruction and answer questions."
ANSWER = "Answer the questions."
CALCULATE = "You are math expert. Use your math knowledge to calculate the answer."
SHORT = "\nAnswer the question using a single word or phrase."
SHORTER = "\nAnswer the question using a single word, phrase, or number."
LETTER = "Answer with the option's letter from the given choices directly."

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """One question: ``sample_id``, text, its image (a path, or bytes), what is known to be true, and further facts."""

    sample_id: Any
    question: str
    image: str | bytes
    truth: Any
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """How a benchmark is read (``images``, ``truths`` -> questions), asked and written; see the module docstring."""

    read: Callable[[Path, Path | None], Sequence[Asked]]
    system: str
    behind: str = ""
    answer: str = "answer"
    truth: str = "gt_answer"


def _json(path: Path | None) -> Any:
    if path is None:
        raise UserError("--gt_path is missing: this task reads its questions from a file", exit_code=2)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(f"--gt_path {path}: not a readable JSON file ({error})") from error


def _field(row: Any, key: str, path: Path | None) -> Any:
    if not isinstance(row, dict) or key not in row:
        raise UserError(
            f"--gt_path {path}: expected a list of objects with a field {key!r}; is it another task's file?"
        )
    return row[key]


def _image(folder: Path, name: Any) -> str:
    """The file called ``name``, or that with ``.jpg`` or ``.png`` behind it."""
    for file in (folder / str(name), folder / f"{name}.jpg", folder / f"{name}.png"):
        if file.is_file():
            return str(file)
    raise UserError(f"--input_image_path {folder}: no image {name}")


def questions(image: str, question: str, truth: str, sample: str | None = None) -> Callable[..., list[Asked]]:
    """A reader of a list of objects (or ``{"data": [...]}``) with these field names; ids are places if not given."""

    def read(images: Path, truths: Path | None) -> list[Asked]:
        rows = _json(truths)
        rows = rows.get("data", rows) if isinstance(rows, dict) else rows
        return [
            Asked(
                index if sample is None else _field(row, sample, truths),
                str(_field(row, question, truths)),
                _image(images, _field(row, image, truths)),
                row.get(truth, ""),
                {},
            )
            for index, row in enumerate(rows)
        ]

    return read


def captions(images: Path, truths: Path | None) -> list[Asked]:
    """Every file of the folder; COCO's names end in ``_000000123.jpg``, Flickr's are ``123.jpg``."""
    known = defaultdict(list)
    for found in _field(_json(truths), "annotations", truths):
        known[_field(found, "image_id", truths)].append(_field(found, "caption", truths))
    asked = []
    for file in sorted(path for path in images.iterdir() if path.is_file()):
        number = re.fullmatch(r"(?:.*_)?(\d+)", file.name.split(".")[0])
        if number is None:
            raise UserError(f"--input_image_path {images}: {file.name} does not end in the number of an image")
        key = int(number[1])
        question = "Give a brief description of this image in one sentence."
        asked.append(Asked(key, question, str(file), known.get(key, []), {}))
    return asked


def ocr_bench(images: Path, truths: Path | None) -> list[Asked]:
    """Questions of several kinds, which the score needs."""
    read = questions("image_path", "question", "answers")(images, truths)
    kinds = [{"dataset_name": row.get("dataset_name"), "data_type": row.get("type")} for row in _json(truths)]
    return [
        Asked(asked.sample_id, asked.question, asked.image, asked.truth, facts)
        for asked, facts in zip(read, kinds, strict=True)
    ]


def real_world(images: Path, truths: Path | None) -> list[Asked]:
    """Questions with or without choices; a sample's id is the number in its image's name."""
    asked = []
    for row in _json(truths):
        name, question = str(_field(row, "image", truths)), str(_field(row, "question", truths))
        if row.get("question_type") == "multi-choice":
            question += "\n" + "".join(f"{letter}. {text}\n" for letter, text in _lettered(row["choices"])) + LETTER
            truth = chr(ord("A") + row["correct_choice_index"])
        else:
            question, truth = question + SHORT, row["answer"]
        asked.append(Asked(int(Path(name).stem), question, _image(images, name), [truth], {}))
    return asked


def _lettered(choices: Sequence[Any]) -> list[tuple[str, str]]:
    return [(chr(ord("A") + index), str(choice)) for index, choice in enumerate(choices)]


def _tables(folder: Path, split: str) -> Iterator[Row]:
    """Rows of all parquet files below ``folder`` whose names begin with ``split`` (of all, if none does)."""
    files = sorted(folder.rglob("*.parquet"))
    files = [file for file in files if file.name.startswith(split)] or files
    if not files:
        raise UserError(f"--input_image_path {folder}: holds no parquet files")
    for file in files:
        rows = open_file(file)
        yield from (rows[index] for index in range(len(rows)))


def _pixels(value: Any, folder: Path, sample: Any) -> str | bytes:
    found = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
    if not isinstance(found, str | bytes):
        raise UserError(f"--input_image_path {folder}: sample {sample} holds no image")
    return found


def mmmu(images: Path, truths: Path | None) -> list[Asked]:
    """One folder per subject; ``options`` is a list or the text of one."""
    asked = []
    for row in _tables(images, "validation"):
        sample = str(row["id"])
        if not sample.startswith("val"):
            continue
        options = row.get("options") or []
        options = ast.literal_eval(options) if isinstance(options, str) else list(options)
        facts = {key: row.get(key) for key in ("question_type", "field", "subfield")}
        question = str(row["question"])
        if row["question_type"] == "multiple-choice":
            pairs = _lettered(options)
            question += "\n" + "".join(f"({letter}) {text}\n" for letter, text in pairs) + "\n" + LETTER
            facts |= {"index2ans": dict(pairs), "all_choices": [letter for letter, _ in pairs]}
        else:
            question += SHORT
        image = _pixels(row.get("image_1"), images, sample)
        asked.append(Asked(sample, untagged(question), image, row.get("answer"), facts))
    return asked


def untagged(text: str) -> str:
    """``text`` without MMMU's ``<image 1>`` marks, which stand where a reader would look at the picture.

    A mark that takes part in a sentence becomes words; one that only points at the picture goes away.
    """
    text = text.strip()
    mark = "<image 1>"
    first = text.partition("\n")[0].strip()
    if first == mark:
        text = text.replace(mark, "Answer the question in the image.", 1)
    text = re.sub(rf":\s?{mark}", " in the image. ", text)
    text = re.sub(rf"([.?])\s?{mark}", r"\1", text)
    text = re.sub(rf"^{mark} (?=[A-Z])", "", text)
    text = re.sub(rf"^{mark} ", "The image ", text)
    text = re.sub(rf"^{mark}|\n{mark}|\({mark}\)|(?<=\(\)){mark}", "", text)
    text = re.sub(rf"(?<= ){mark}|{mark}(?=\?)", "the image", text)
    return re.sub(r"<image \d>", "", text.replace(mark, ". ")).strip()


def math_vista(images: Path, truths: Path | None) -> list[Asked]:
    """Questions with choices are asked by letter, others with the hint that the benchmark brings."""
    asked = []
    for row in _tables(images, "testmini"):
        choices, answer = list(row.get("choices") or []), row.get("answer")
        facts: Row = {"question_type": row["question_type"], "index2ans": {}, "all_choices": []}
        if row["question_type"] == "multi_choice":
            pairs = _lettered(choices)
            question = str(row["question"]) + "\n" + "".join(f"{letter}. {text}\n" for letter, text in pairs) + LETTER
            facts |= {"index2ans": dict(pairs), "all_choices": [letter for letter, _ in pairs]}
            answer = chr(ord("A") + choices.index(answer)) if answer in choices else answer
        else:
            question = str(row["query"]).replace("Hint: ", "")
        asked.append(Asked(row["pid"], question, _pixels(row["decoded_image"], images, row["pid"]), answer, facts))
    return asked


TASKS: Mapping[str, Task] = {
    "captioning": Task(captions, ANSWER, answer="caption", truth="ground_truth"),
    "TextVQA": Task(questions("image_id", "question", "answers", "question_id"), FOLLOW, SHORTER),
    "VQAv2": Task(questions("image", "question", "answer", "question_id"), FOLLOW, SHORT),
    "ChartQA": Task(questions("imgname", "query", "label"), FOLLOW, SHORT),
    "InfoVQA": Task(questions("image_local_name", "question", "answers", "questionId"), FOLLOW, SHORTER),
    "SPDocVQA": Task(questions("image", "question", "answers", "questionId"), FOLLOW, SHORTER),
    "AI2D": Task(questions("image", "question", "answer", "question_id"), FOLLOW),
    "OCRBench": Task(ocr_bench, FOLLOW),
    "RealworldQA": Task(real_world, FOLLOW),
    "MathVista": Task(math_vista, CALCULATE),
    "MMMU": Task(mmmu, ANSWER, answer="text", truth="answer"),
}
"""Tasks by the name that ``--task`` takes."""


class TaskRows:
    """The questions of a task as rows of a dataset; :meth:`line` is what is written about an answered one."""

    base = None

    def __init__(
        self, name: str, images: Path, truths: Path | None, *, part: int = 0, parts: int = 0, size: int = 0
    ) -> None:
        """Part ``part`` of ``parts`` (0: everything), each of ``size`` questions, or of equal shares if that is 0."""
        if not images.is_dir():
            raise UserError(f"--input_image_path {images}: no such directory")
        self.name, self.task = name, TASKS[name]
        asked = self.task.read(images, truths)
        if parts:
            bounds = [int(len(asked) * at / parts) for at in range(parts + 1)]
            asked = asked[part * size : (part + 1) * size] if size else asked[bounds[part] : bounds[part + 1]]
        if not asked:
            raise UserError(f"--task {name}: no questions in {truths or images}")
        self._asked = asked

    def __len__(self) -> int:
        return len(self._asked)

    def __getitem__(self, index: int) -> Row:
        asked = self._asked[index]
        turns = [
            {"role": "system", "content": self.task.system},
            {"role": "user", "content": f"<image>\n{asked.question}{self.task.behind}"},
        ]
        image = {"bytes": asked.image} if isinstance(asked.image, bytes) else asked.image
        return {"messages": turns, "images": [image], "place": index}

    def line(self, index: int, response: str) -> Row:
        """The object written for question ``index`` and the model's answer."""
        asked, task = self._asked[index], self.task
        truth = [asked.truth] if task.truth == "gt_answer" and isinstance(asked.truth, str) else asked.truth
        out = {"sample_id": asked.sample_id, "prompt": asked.question + task.behind, task.answer: response.strip()}
        if task.answer == "text":
            out["prediction"] = response.strip()
        return {**out, task.truth: truth, **asked.facts}


class TaskResults(Results):
    """Writes the answers to the questions of ``rows`` in the form of their task."""

    def __init__(self, path: Path, rows: TaskRows) -> None:
        super().__init__(path)
        self._rows = rows

    def write(self, row: Mapping[str, Any]) -> None:
        """Append the answer in a result ``row`` of one of the questions."""
        self.put(self._rows.line(row["place"], row["response"]))


def output_file(output_path: str, task: str, rank: int, part: int) -> Path:
    """Where the answers go: ``--output_path`` is the beginning of the file's name."""
    return Path(f"{output_path}-{task}-dprank={rank}-partition={part}.jsonl").expanduser()
