"""Answer files of ``tessera infer --task`` are judged as Megatron does; datasets of one's own by named scorers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tessera.config.errors import UserError
from tessera.data.sample import normalise
from tessera.evaluate.item import Item, Scored
from tessera.evaluate.tasks.answers import JUDGES, read_answers
from tessera.evaluate.tasks.own import SCORERS, find_scorer
from tessera.infer.tasks import TASKS
from tests.toys import make_images

LINES: dict[str, tuple[list[dict[str, Any]], float]] = {
    "TextVQA": ([{"answer": "Nokia.", "gt_answer": ["nokia"] * 2 + ["x"] * 8}], 2 / 3),
    "VQAv2": ([{"answer": "two", "gt_answer": ["2"] * 10}], 1.0),
    "ChartQA": ([{"answer": "104", "gt_answer": ["100%"]}, {"answer": "106", "gt_answer": ["100"]}], 0.5),
    "InfoVQA": ([{"answer": "abxx", "gt_answer": ["abcd"]}, {"answer": "abcd", "gt_answer": ["abcd"]}], 0.5),
    "SPDocVQA": ([{"answer": "abcd", "gt_answer": ["abce", "abcd"]}], 1.0),
    "AI2D": ([{"answer": "B.", "gt_answer": ["B"]}, {"answer": "C", "gt_answer": ["B"]}], 0.5),
    "RealworldQA": ([{"answer": "Left", "gt_answer": ["left"]}], 1.0),
    "OCRBench": ([{"answer": "stop here", "gt_answer": ["STOP", "here"], "data_type": "t", "dataset_name": "d"}], 2.0),
    "MathVista": (
        [
            {"answer": "(B)", "gt_answer": ["B"], "question_type": "multi_choice", "index2ans": {"A": "1", "B": "2"}},
            {"answer": "the answer is 3", "gt_answer": ["3"], "question_type": "free_form", "index2ans": {}},
        ],
        1.0,
    ),
    "MMMU": (
        [
            {"text": "B)", "prediction": "B)", "answer": "B", "index2ans": {"A": "x", "B": "y"}},
            {"text": "?", "prediction": "?", "answer": "A", "index2ans": {"A": "x", "B": "y"}},
            {"text": "so x = 3.50", "prediction": "so x = 3.50", "answer": "['3.5', '7/2']"},
            {"text": "4", "prediction": "4", "answer": "3"},
        ],
        0.75,
    ),
}


def write(path: Path, lines: list[dict[str, Any]], start: int = 0) -> Path:
    numbered = ({"sample_id": start + at, "prompt": "?", **line} for at, line in enumerate(lines))
    path.write_text("".join(json.dumps(line) + "\n" for line in numbered))
    return path


@pytest.mark.parametrize("task", LINES)
def test_a_tasks_answers(task: str, tmp_path: Path) -> None:
    lines, mean = LINES[task]
    judge, found = read_answers(task, str(write(tmp_path / "a.jsonl", lines)))
    judged = [(item, judge.judge(item, answer)) for item, answer in found]
    assert judge.aggregate(judged)["accuracy"] == pytest.approx(mean, abs=1e-9)


def test_every_task_of_infer_has_its_judge() -> None:
    assert set(JUDGES) == set(TASKS) == {*LINES, "captioning"}


def test_a_guess_is_told(tmp_path: Path) -> None:
    judge, found = read_answers("MMMU", str(write(tmp_path / "a.jsonl", LINES["MMMU"][0])))
    notes = [judge.judge(item, answer) for item, answer in found]
    assert [scored.unread for scored in notes] == [False, True, False, False]


def test_captions_with_and_without_truths(tmp_path: Path) -> None:
    lines = [
        {"caption": "A dog runs.", "ground_truth": ["a dog runs", "the dog"]},
        {"caption": "x", "ground_truth": ["a cat"]},
    ]
    path = str(write(tmp_path / "a.jsonl", lines))
    judge, found = read_answers("captioning", path)
    first = judge.aggregate([(item, judge.judge(item, answer)) for item, answer in found])
    notes = [{"image_id": at, "caption": caption} for at, line in enumerate(lines) for caption in line["ground_truth"]]
    (tmp_path / "gt.json").write_text(json.dumps({"annotations": notes}))
    _, again = read_answers("captioning", path, tmp_path / "gt.json")
    assert judge.aggregate([(item, judge.judge(item, answer)) for item, answer in again]) == first
    assert first["CIDEr-D"] > 0 and first["BLEU-1"] == pytest.approx(0.75 * math.exp(-0.25)), (
        "4 words where 5 were wanted"
    )
    with pytest.raises(UserError, match=r"gt\.json: not the truths of --task TextVQA"):
        read_answers("TextVQA", path, tmp_path / "gt.json")


def test_files_of_ranks_and_partitions_belong_together(tmp_path: Path) -> None:
    line = LINES["VQAv2"][0][0]
    for rank, part, start in ((0, 0, 0), (1, 0, 2), (0, 1, 2)):
        write(tmp_path / f"out-VQAv2-dprank={rank}-partition={part}.jsonl", [line, line], start)
    write(tmp_path / "out-TextVQA-dprank=0-partition=0.jsonl", [line] * 9)
    _, found = read_answers("VQAv2", str(tmp_path / "out"))
    assert [item.id for item, _ in found] == ["0", "1", "2", "3"], "a question answered twice counts once"


def test_bad_lines_count_and_wrong_files_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*LINES["VQAv2"][0], {"answer": "x", "gt_answer": []}])
    with path.open("a") as file:
        file.write('{"sample_id": 9, "ans')
    judge, found = read_answers("VQAv2", str(path))
    assert [item.problem for item, _ in found] == [None, "no answer is known", "the line is not a JSON object"]
    assert judge.aggregate([(item, judge.judge(item, answer)) for item, answer in found])["accuracy"] == 1 / 3
    with pytest.raises(UserError, match=r"a\.jsonl:1: no field 'caption'; was it written for --task captioning"):
        read_answers("captioning", str(path))
    with pytest.raises(UserError, match=r"no such file, and no nothing-VQAv2-dprank=\*-partition=\*\.jsonl in"):
        read_answers("VQAv2", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="did you mean VQAv2"):
        read_answers("VQA", str(path))


OWN: dict[str, list[tuple[str, str, float]]] = {
    "exact": [("a  b", "a b", 1), ("A b", "a b", 0)],
    "contains": [("It says STOP.", "stop", 1), ("go", "stop", 0), ("x y", '["z", "x"]', 1)],
    "vqa": [("The two.", "2", 1), ("3", "2", 0)],
    "relaxed": [("104", "100", 1), ("106", "100", 0)],
    "anls": [("abcd", "abce", 0.75), ("zz", "abcd", 0)],
    "choice": [("B", "B", 1), ("the dog", "B", 1), ("A", "B. dog", 0), ("dunno", "A", 0)],
    "yes_no": [("Yes, there is", "yes", 1), ("maybe", "no", 0)],
    "box": [("[0,0,10,10]", "[[0, 0, 10, 8]]", 1), ("[0,0,10,10]", "(5,5),(20,20)", 0), ("none", "[0,0,1,1]", 0)],
    "latex": [("x  ^ { 2 }", "x ^ { 2 }", 1), ("x ^ 2", "x ^ { 2 }", 0)],
}


@pytest.mark.parametrize("name", OWN)
def test_a_dataset_of_ones_own(name: str, tmp_path: Path) -> None:
    image = make_images(tmp_path / "images", [(32, 32)])[0]
    rows = [
        {
            "messages": [
                {"role": "user", "content": "<image>Which?\nA. cat\nB. dog"},
                {"role": "assistant", "content": gold},
            ],
            "images": [str(Path(image).relative_to(tmp_path))],
        }
        for _, gold, _ in OWN[name]
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"nothing": 1}]))
    found = find_scorer(name)
    items = found.items(tmp_path / "own.jsonl")
    assert len(items) == len(rows) + 1
    judged: list[tuple[Item, Scored]] = []
    for item, (answer, _, score) in zip(items, OWN[name], strict=False):
        sample = normalise(item.row, need_answer=False)
        assert sample.messages[-1].role == "user" and sample.images == (str(image),), "the known answer is not shown"
        judged.append((item, found.judge(item, answer)))
        assert judged[-1][1].score == score, (answer, judged[-1])
    last = items[len(rows)]
    assert last.problem is not None and "no known columns" in last.problem
    judged.append((last, found.judge(last, "")))
    mean = sum(score for _, _, score in OWN[name]) / (len(rows) + 1)
    assert found.aggregate(judged)[found.metric] == pytest.approx(mean)


def test_captions_of_ones_own(tmp_path: Path) -> None:
    row = {"query": "Describe.", "response": json.dumps(["a dog runs", "the dog"])}
    (tmp_path / "own.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "response": "a cat"}) + "\n")
    found = find_scorer("caption")
    judged = [(item, found.judge(item, "A dog runs.")) for item in found.items(tmp_path / "own.jsonl")]
    assert [item.gold for item, _ in judged] == [["a dog runs", "the dog"], ["a cat"]]
    assert found.aggregate(judged)["CIDEr-D"] > 0


def test_an_unknown_scorer() -> None:
    assert set(SCORERS) == {*OWN, "caption"}
    with pytest.raises(UserError, match="--scorer exakt: unknown; did you mean exact"):
        find_scorer("exakt")
