"""Benchmarks are read from their published files, asked in NVLM's words, and answered in its format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tessera.cli import main
from tessera.config.errors import UserError
from tessera.infer.tasks import TaskRows, untagged
from tests.models import make_model_dir
from tests.toys import make_images

LETTER = "Answer with the option's letter from the given choices directly."


def images(folder: Path, *names: str) -> Path:
    made = make_images(folder / "made", [(64, 48)] * len(names))
    for source, name in zip(made, names, strict=True):
        shutil.move(source, folder / name)
    shutil.rmtree(folder / "made")
    return folder


def rows(name: str, tmp_path: Path, truths: Any, files: tuple[str, ...], **part: int) -> TaskRows:
    path = tmp_path / ("truths.jsonl" if name == "AI2D" else "truths.json")
    path.write_text("\n".join(map(json.dumps, truths)) if name == "AI2D" else json.dumps(truths))
    return TaskRows(name, images(tmp_path / "images", *files), path, **part)


def asked(found: TaskRows, index: int) -> str:
    system, user = found[index]["messages"]
    assert system["role"] == "system" and user["content"].startswith("<image>\n")
    return str(user["content"].removeprefix("<image>\n"))


def test_captioning_takes_every_image_and_its_number(tmp_path: Path) -> None:
    files = ("COCO_val2014_000000000139.jpg", "285.jpg")
    truths = {"annotations": [{"image_id": 139, "caption": c} for c in ("a room", "a table")]}
    found = rows("captioning", tmp_path, truths, files)
    lines = [found.line(index, f" text {index}\n") for index in range(2)]
    assert [line["sample_id"] for line in lines] == [285, 139]
    assert lines[1]["caption"] == "text 1" and lines[1]["ground_truth"] == ["a room", "a table"]
    assert lines[0]["ground_truth"] == []
    assert asked(found, 0) == "Give a brief description of this image in one sentence."


@pytest.mark.parametrize(
    ("name", "row", "file", "sample", "question", "truth"),
    [
        ("TextVQA", {"image_id": "ab", "question_id": 7, "question": "brand?", "answers": ["n", "m"]}, "ab.jpg", 7,
         "brand?\nAnswer the question using a single word, phrase, or number.", ["n", "m"]),
        ("VQAv2", {"image": "x.png", "question_id": 8, "question": "how many?", "answer": ["2"]}, "x.png", 8,
         "how many?\nAnswer the question using a single word or phrase.", ["2"]),
        ("ChartQA", {"imgname": "c.png", "query": "max?", "label": "14"}, "c.png", 0,
         "max?\nAnswer the question using a single word or phrase.", ["14"]),
        ("InfoVQA", {"image_local_name": "i.jpg", "questionId": 3, "question": "q", "answers": ["a"]}, "i.jpg", 3,
         "q\nAnswer the question using a single word, phrase, or number.", ["a"]),
        ("SPDocVQA", {"image": "d", "questionId": 4, "question": "q", "answers": ["a"]}, "d.png", 4,
         "q\nAnswer the question using a single word, phrase, or number.", ["a"]),
        ("AI2D", {"image": "k.jpg", "question_id": 5, "question": "q", "answer": "B"}, "k.jpg", 5, "q", ["B"]),
        ("OCRBench", {"image_path": "o.jpg", "question": "q", "answers": ["w"], "dataset_name": "svt",
                      "type": "Regular"}, "o.jpg", 0, "q", ["w"]),
        ("RealworldQA", {"image": "12.webp", "question": "q", "question_type": "multi-choice", "choices": ["u", "v"],
                         "correct_choice_index": 1}, "12.webp", 12, "q\nA. u\nB. v\n" + LETTER, ["B"]),
    ],
)  # fmt: skip
def test_questions_of_a_file(
    tmp_path: Path, name: str, row: Any, file: str, sample: int, question: str, truth: Any
) -> None:
    found = rows(name, tmp_path, {"data": [row]} if name == "SPDocVQA" else [row], (file,))
    assert asked(found, 0) == question and found[0]["images"] == [str(tmp_path / "images" / file)]
    line = found.line(0, "an answer ")
    assert (line["sample_id"], line["prompt"], line["answer"], line["gt_answer"]) == (
        sample, question, "an answer", truth
    )  # fmt: skip
    assert name != "OCRBench" or (line["dataset_name"], line["data_type"]) == ("svt", "Regular")


def parquet(path: Path, row: dict[str, Any]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)


def mmmu_dir(folder: Path) -> Path:
    picture = Path(make_images(folder / "made", [(64, 48)])[0]).read_bytes()
    shutil.rmtree(folder / "made")
    common = {"image_1": {"bytes": picture, "path": "1.png"}, "field": "F", "subfield": "S", "answer": "A"}
    chosen = {"question": "See <image 1>. Which?", "options": "['one', \"it's\"]", "question_type": "multiple-choice"}
    free = {"question": "Sum of <image 1>?", "options": "[]", "question_type": "open"}
    parquet(folder / "Art" / "validation-00000-of-00001.parquet", {"id": "validation_Art_1", **chosen, **common})
    parquet(folder / "Art" / "dev-00000-of-00001.parquet", {"id": "dev_Art_1", **chosen, **common})
    parquet(folder / "Math" / "validation-00000-of-00001.parquet", {"id": "validation_Math_2", **free, **common})
    return folder


def test_mmmu_asks_the_validation_samples(tmp_path: Path) -> None:
    found = TaskRows("MMMU", mmmu_dir(tmp_path), None)
    assert len(found) == 2
    assert asked(found, 0) == f"See the image. Which?\n(A) one\n(B) it's\n\n{LETTER}"
    assert asked(found, 1) == "Sum of the image?\nAnswer the question using a single word or phrase."
    line = found.line(0, "B")
    assert line["sample_id"] == "validation_Art_1" and line["text"] == line["prediction"] == "B"
    assert line["index2ans"] == {"A": "one", "B": "it's"} and line["all_choices"] == ["A", "B"]
    assert (line["question_type"], line["field"], line["subfield"]) == ("multiple-choice", "F", "S")


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("<image 1>", "Answer the question in the image."),
        ("What is shown:<image 1>", "What is shown in the image."),
        ("Look at it. <image 1> What is it?", "Look at it. What is it?"),
        ("<image 1> Which is it?", "Which is it?"),
        ("<image 1> shows what?", "The image shows what?"),
        ("Which?<image 1>", "Which?"),
        ("What of <image 1> is red?", "What of the image is red?"),
        ("Is it (<image 1>) red, <image 2>?", "Is it  red, ?"),
    ],
)
def test_marks_become_words(text: str, plain: str) -> None:
    assert untagged(text) == plain


def test_math_vista(tmp_path: Path) -> None:
    image = {"bytes": Path(make_images(tmp_path / "made", [(32, 32)])[0]).read_bytes()}
    common = {"pid": "1", "decoded_image": image, "answer": "3", "query": "Hint: Give a number.\nQuestion: q"}
    chosen = {"question": "q", "question_type": "multi_choice", "choices": ["2", "3"], **common}
    parquet(tmp_path / "m" / "testmini-0.parquet", chosen)
    found = TaskRows("MathVista", tmp_path / "m", None)
    assert asked(found, 0) == f"q\nA. 2\nB. 3\n{LETTER}" and found.line(0, "x")["gt_answer"] == ["B"]
    parquet(tmp_path / "n" / "testmini-0.parquet", {**chosen, "question_type": "free_form"})
    assert asked(TaskRows("MathVista", tmp_path / "n", None), 0) == "Give a number.\nQuestion: q"


def test_parts_cover_everything_once(tmp_path: Path) -> None:
    truths = [{"image_id": "a", "question_id": n, "question": str(n), "answers": []} for n in range(11)]
    rows("TextVQA", tmp_path, truths, ("a.jpg",))
    folder, file = tmp_path / "images", tmp_path / "truths.json"
    parts = [TaskRows("TextVQA", folder, file, part=part, parts=3) for part in range(3)]
    assert [part.line(i, "")["sample_id"] for part in parts for i in range(len(part))] == list(range(11))
    second = TaskRows("TextVQA", folder, file, part=1, parts=3, size=2)
    assert [second.line(i, "")["sample_id"] for i in range(len(second))] == [2, 3]


def test_through_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(make_model_dir(tmp_path / "model", "qwen2_5_vl"))
    folder = images(tmp_path / "images", "COCO_val2014_000000000139.jpg", "COCO_val2014_000000000285.jpg")
    truths = tmp_path / "coco.json"
    truths.write_text(json.dumps({"annotations": [{"image_id": 139, "caption": "a room"}]}))
    words = ["infer", "--model", model, "--task", "captioning", "--input_image_path", str(folder), "--gt_path"]
    words += [str(truths), "--output_path", str(tmp_path / "out" / "nvlm"), "--out_seq_length", "4"]
    words += ["--temperature", "0", "--torch_dtype", "float32"]
    assert main(words) == 0, capsys.readouterr().err
    path = tmp_path / "out" / "nvlm-captioning-dprank=0-partition=0.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["sample_id"] for line in lines] == [139, 285]
    assert set(lines[0]) == {"sample_id", "prompt", "caption", "ground_truth"} and lines[0]["ground_truth"] == [
        "a room"
    ]
    assert main(words) != 0 and "never overwritten" in capsys.readouterr().err


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = images(tmp_path / "images", "a.jpg")
    wrong = tmp_path / "truths.json"
    wrong.write_text(json.dumps([{"image_id": "b", "question": "q", "question_id": 1}]))
    with pytest.raises(UserError, match="no image b"):
        TaskRows("TextVQA", folder, wrong)
    with pytest.raises(UserError, match="field 'imgname'|field 'query'"):
        TaskRows("ChartQA", folder, wrong)
    with pytest.raises(UserError, match="gt_path is missing"):
        TaskRows("AI2D", folder, None)
    with pytest.raises(UserError, match="not a readable JSON"):
        TaskRows("VQAv2", folder, folder / "a.jpg")
    with pytest.raises(UserError, match="no such directory"):
        TaskRows("MMMU", tmp_path / "absent", None)
    with pytest.raises(UserError, match="does not end in the number"):
        TaskRows("captioning", folder, _truths(tmp_path))
    model = str(make_model_dir(tmp_path / "model", "qwen2_5_vl"))
    assert main(["infer", "--model", model, "--task", "MMMU"]) == 2
    assert "needs --input_image_path" in capsys.readouterr().err


def _truths(folder: Path) -> Path:
    path = folder / "coco.json"
    path.write_text(json.dumps({"annotations": []}))
    return path
