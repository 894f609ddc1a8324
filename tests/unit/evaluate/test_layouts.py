"""Benchmarks in the layouts that their authors publish: what is asked, what is known, and in whose words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tessera.config.errors import UserError
from tessera.evaluate.item import Item
from tessera.evaluate.tasks import BENCHMARKS, find
from tessera.infer.tasks import TaskRows
from tests.toys import make_images
from tests.unit.evaluate.test_files import asked, picture, shown, text, write_parquet, write_tsv
from tests.unit.evaluate.test_oracles import cases

pytest.importorskip("pyarrow", reason="parquet layouts need pyarrow")


@pytest.mark.parametrize("case", cases("prompts", 12), ids=lambda case: str(case["name"]))
def test_words_and_pictures_are_vlmevalkits(case: dict[str, Any], tmp_path: Path) -> None:
    held = [picture(tmp_path, place) for place in range(2)]
    coded = [text(data) for data in held]
    rows = []
    for row in case["rows"]:
        place = row["image"]
        if not isinstance(place, str):
            place = coded[place] if isinstance(place, int) else str([coded[at] for at in place])
        rows.append({**row, "image": place})
    items = find(case["name"]).items(write_tsv(tmp_path / case["file"], rows))
    assert len(items) == len(case["prompts"])
    for item, prompt in zip(items, case["prompts"], strict=True):
        assert asked(item) == prompt["content"]
        seen = [shown(item, at) for at in range(len(item.row["images"]))]
        assert [held.index(data[:-900]) for data in seen] == prompt["pictures"]


def image_at(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    Path(make_images(path.parent / "made", [(32, 32)])[0]).rename(path)


def struct(tmp_path: Path, place: int = 0) -> dict[str, Any]:
    return {"bytes": picture(tmp_path, place), "path": "x.png"}


MMMU = {"id": "validation_Art_1", "question": "<image 1> Who?", "options": "['Ada', 'Bob']", "answer": "B",
        "question_type": "multiple-choice", "field": "Art", "subfield": "Painting", "image_2": None}  # fmt: skip
PARQUET: dict[str, tuple[Mapping[str, Any], str, Any]] = {
    "mmmu": (MMMU, "Question: <image> Who?\nOptions:\nA. Ada\nB. Bob\nPlease select", "B"),
    "mmmu@official": (MMMU, "<image> Who?\n(A) Ada\n(B) Bob\n\nAnswer with the option's letter", "B"),
    "mmbench": ({"index": 1, "question": "Who?", "hint": "nan?", "A": "x", "B": "y", "answer": "A", "category": "ocr"},
                "<image>Hint: nan?\nQuestion: Who?\nOptions:\nA. x\nB. y\n", "A"),
    "mmstar": ({"index": 0, "question": "Who?\nOptions: A: red, B: dark red, C: x", "answer": "B", "category": "c"},
               "<image>Question: Who?\nOptions:\nA. red\nB. dark red\nC. x\nPlease", "B"),
    "ai2d": ({"question": "Which?", "options": ["leaf", "root"], "answer": "1"},
             "<image>Question: Which?\nOptions:\nA. leaf\nB. root\n", "B"),
    "textvqa": ({"question_id": 1, "question": "what?", "answers": ["n", "m"], "image_id": "none"}, "<image>what?\n",
                ["n", "m"]),
    "vqav2": ({"question_id": 1, "question": "what?", "multiple_choice_answer": "a", "answer_type": "other",
               "answers": [{"answer": "n", "answer_id": 1}, {"answer": "m", "answer_id": 2}]}, "<image>what?\n",
              ["n", "m"]),
    "chartqa": ({"type": "human_test", "question": "max?", "answer": "14"}, "<image>max?\n", ["14"]),
    "docvqa": ({"questionId": "4", "question": "date?", "answers": ["May"], "docId": 3}, "<image>date?\n", ["May"]),
    "ocrbench": ({"dataset": "HME100k", "question": "read", "question_type": "Digit String Recognition",
                  "answer": ["1", "2"]}, "<image>read", ["1", "2"]),
    "pope": ({"question_id": "1", "question": "dog?", "answer": "no", "category": "random"}, "<image>dog?", "No"),
    "coco": ({"question_id": "1.jpg", "question": "Caption?", "answer": ["a dog", "the dog"]}, "<image>Provide a one-",
             ["a dog", "the dog"]),
    "flickr30k": ({"caption": ["a dog", "the dog"], "img_id": "1", "split": "test"}, "<image>Provide a one-",
                  ["a dog", "the dog"]),
    "latexocr": ({"text": "x ^ { 2 }"}, "<image>Using LaTeX to perform OCR on the image.", "x ^ { 2 }"),
    "mathvista": ({"pid": "1", "question": "How many?", "query": "Hint: an integer\nQuestion: How many?",
                   "choices": None, "precision": None, "answer": "3", "question_type": "free_form",
                   "answer_type": "integer", "metadata": {"task": "geometry"}},
                  "<image>Hint: an integer\nQuestion: How many?", "3"),
    "refcoco": ({"question_id": "9", "question": "Describe", "answer": ["left dog", "dog"],
                 "bbox": [10.0, 4.0, 20.0, 9.0]},
                "<image>Please provide the bounding box coordinate of the region this sentence describes: <ref>left d",
                (10.0, 4.0, 30.0, 13.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", PARQUET)
def test_parquet_as_the_hub_has_it(name: str, tmp_path: Path) -> None:
    row, question, gold = PARQUET[name]
    column = {"mmmu": "image_1", "mathvista": "decoded_image"}.get(name.split("@")[0], "image")
    path = write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [{**row, column: struct(tmp_path)}])
    found = find(name)
    item = found.items(path.parent)[0]
    assert question in asked(item) and item.gold == gold and shown(item) == picture(tmp_path)
    answer = {"refcoco": "[[156, 83, 468, 270]]"}.get(name, gold[0] if isinstance(gold, list) else str(gold))
    judged = found.judge(item, answer)
    assert judged.score in (1.0, None) or name in ("textvqa", "vqav2"), judged
    out = found.aggregate([(item, judged)])
    assert found.metric in out and len(found.settle([(item, judged)])) == 1
    assert found.judge(item, "").score in (0.0, None)


def test_every_benchmark_is_read_in_some_layout_here() -> None:
    assert {name.split("@")[0] for name in BENCHMARKS} - {"infovqa", "refcoco+", "refcocog"} == {
        name.split("@")[0] for name in PARQUET
    }


def test_a_row_of_several_sentences_asks_each(tmp_path: Path) -> None:
    row = {"question_id": "9", "answer": ["left dog", "dog"], "bbox": [10.0, 4.0, 20.0, 9.0], "image": struct(tmp_path)}
    items = find("refcoco@json").items(write_parquet(tmp_path / "val.parquet", [row, {**row, "question_id": "10"}]))
    assert [item.id for item in items] == ["9/0", "9/1", "10/0", "10/1"]
    assert 'matches the description "dog"' in asked(items[1])
    assert [item.id for item in items[1:3]] == ["9/1", "10/0"]


def test_boxes_in_named_frames(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "images", [(640, 480)])
    row = {"image": Path(folder[0]).name, "sent": "dog", "bbox": [160, 120, 320, 240], "width": 640, "height": 480}
    (tmp_path / "refcoco_val.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "bbox": "?"}) + "\n")
    frames = {"ref": "<box>[[250, 250, 500, 500]]</box>", "json": '```json\n[{"bbox_2d": [250, 250, 500, 500]}]\n```',
              "json_pixels": '{"bbox_2d": [161, 118, 322, 238], "label": "dog"}'}  # fmt: skip
    for dialect, answer in frames.items():
        found = find(f"refcoco@{dialect}")
        items = found.items(tmp_path / "refcoco_val.jsonl")
        assert "dog" in asked(items[0]) and found.judge(items[0], answer).score == 1.0
        assert found.judge(items[0], "(1,2),(3,4)").score == 0.0
        assert found.judge(items[0], "nowhere").unread
        assert items[1].problem == "no answer is known"
    wrong = find("refcoco@ref").judge(
        find("refcoco@ref").items(tmp_path / "refcoco_val.jsonl")[0], frames["json_pixels"]
    )
    assert wrong.score == 0.0, "a frame must not be guessed"
    found = find("refcoco@json_pixels")
    [item, _] = found.items(tmp_path / "refcoco_val.jsonl")
    seen = Item(item.id, item.row, item.gold, {**item.meta, "seen": (320, 240)})
    assert found.judge(seen, "[80, 60, 160, 120]").note == "IoU 1.000"


def test_vqav2_in_two_files(tmp_path: Path) -> None:
    image_at(tmp_path / "val2014" / "COCO_val2014_000000000042.jpg")
    questions = [
        {"question_id": 420, "image_id": 42, "question": "Where?"},
        {"question_id": 421, "image_id": 42, "question": "?"},
    ]
    known = [
        {"question_id": 420, "answer_type": "other", "answers": [{"answer": "here", "answer_id": i} for i in range(10)]}
    ]
    name = "v2_OpenEnded_mscoco_val2014_questions.json"
    (tmp_path / name).write_text(json.dumps({"data_subtype": "val2014", "questions": questions}))
    (tmp_path / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": known}))
    for path in (tmp_path, tmp_path / name):
        items = find("vqav2").items(path)
        assert asked(items[0]).startswith("<image>Where?\n") and items[0].gold == ["here"] * 10
        assert find("vqav2").judge(items[0], "Here.").score == 1.0
        assert items[1].problem == "no answer is known"


def test_chartqa_in_two_files(tmp_path: Path) -> None:
    image_at(tmp_path / "png" / "a.png")
    for kind, label in (("human", "1"), ("augmented", "200")):
        (tmp_path / f"test_{kind}.json").write_text(json.dumps([{"imgname": "a.png", "query": "max?", "label": label}]))
    found = find("chartqa")
    judged = [(item, found.judge(item, "209")) for item in found.items(tmp_path)]
    assert found.aggregate(judged) == {"accuracy": 0.5, "accuracy/test_augmented": 1.0, "accuracy/test_human": 0.0}


def test_captions_in_cocos_and_karpathys_json(tmp_path: Path) -> None:
    for number in (42, 43):
        image_at(tmp_path / "val2014" / f"{number}.jpg")
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in (42, 43)]
    notes = [{"image_id": 42, "caption": f"a {word}"} for word in ("dog", "cat")]
    (tmp_path / "captions_val2014.json").write_text(json.dumps({"images": images, "annotations": notes}))
    items = find("coco").items(tmp_path / "captions_val2014.json")
    assert [item.gold for item in items] == [["a dog", "a cat"], []] and items[1].problem == "no answer is known"
    sentences = [{"raw": "a dog"}]
    image = {"filepath": "val2014", "filename": "42.jpg", "sentences": sentences}
    karpathy = [{**image, "cocoid": 42, "split": "test"}, {**image, "cocoid": 43, "split": "train"}]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": karpathy}))
    items = find("coco").items(tmp_path / "dataset_coco.json")
    assert len(items) == 1 and items[0].id == "42" and asked(items[0])


def test_pope_in_lines_called_json(tmp_path: Path) -> None:
    image_at(tmp_path / "val2014" / "x.jpg")
    lines = [
        {"question_id": i, "image": "x.jpg", "text": "Is there a dog?", "label": label}
        for i, label in ((1, "yes"), (2, "no"))
    ]
    (tmp_path / "coco_pope_random.json").write_text("\n".join(map(json.dumps, lines)))
    items = find("pope@official").items(tmp_path / "coco_pope_random.json")
    assert [item.gold for item in items] == ["Yes", "No"] and asked(items[0]).startswith("<image>Is there a dog?")


def test_only_validation_questions_of_mmmu_are_asked(tmp_path: Path) -> None:
    image = text(picture(tmp_path))
    row = {"question": "?", "answer": "A", "A": "x", "B": "y", "image": image}
    rows = [{"index": f"{split}_Art_1", "split": split, **row} for split in ("dev", "validation")]
    items = find("mmmu").items(write_tsv(tmp_path / "MMMU_DEV_VAL.tsv", rows))
    assert [item.id for item in items] == ["validation_Art_1"] and items[0].meta["category"] == "Art"


def test_a_mark_without_its_picture(tmp_path: Path) -> None:
    row = {
        "index": "validation_Art_1",
        "question": "<image 3>?",
        "answer": "A",
        "A": "x",
        "image": text(picture(tmp_path)),
    }
    [item] = find("mmmu").items(write_tsv(tmp_path / "a.tsv", [row]))
    assert item.problem == "mentions image 3, has 1"


@pytest.mark.parametrize("name", ["MMMU", "MathVista"])
def test_megatrons_words_are_those_of_infer(name: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]]
    if name == "MMMU":
        free = {"options": "[]", "answer": "3.5", "question_type": "open", "question": "How many in <image 1>?"}
        rows = [
            {**MMMU, "image_1": struct(tmp_path)},
            {**MMMU, **free, "id": "validation_Math_2", "image_1": struct(tmp_path, 1)},
        ]
        path = tmp_path / "Art" / "validation-00000.parquet"
    else:
        base = {**PARQUET["mathvista"][0], "decoded_image": struct(tmp_path)}
        rows = [{**base, "choices": []}, {**base, "question_type": "multi_choice", "choices": ["3", "4"]}]
        path = tmp_path / "Art" / "testmini.parquet"
    write_parquet(path, rows)
    theirs, ours = TaskRows(name, path.parent, None), find(f"{name}@megatron").items(path.parent)
    assert len(theirs) == len(ours) == 2
    for at in range(2):
        assert ours[at].row["messages"] == theirs[at]["messages"] and ours[at].row["images"] == theirs[at]["images"]


@pytest.mark.parametrize(
    ("name", "benchmark", "row"),
    [
        ("TextVQA", "textvqa", {"image_id": "a", "question_id": 7, "question": "brand?", "answers": ["n", "m"]}),
        ("VQAv2", "vqav2", {"image": "a.png", "question_id": 8, "question": "how many?", "answer": ["2"]}),
        ("ChartQA", "chartqa", {"imgname": "a.png", "query": "max?", "label": "14"}),
        ("InfoVQA", "infovqa", {"image_local_name": "a.png", "question": "who?", "answers": ["x"], "questionId": 3}),
        ("SPDocVQA", "docvqa", {"image": "a.png", "question": "who?", "answers": ["x"], "questionId": 3}),
        ("AI2D", "ai2d", {"image": "a.png", "question": "Which?\nA. x\nB. y\nAnswer", "answer": "B", "question_id": 3}),
        (
            "OCRBench",
            "ocrbench",
            {"image_path": "a.png", "question": "read", "answers": ["x"], "type": "t", "dataset_name": "d"},
        ),
    ],
)
def test_megatrons_own_files_are_asked_as_infer_asks(name: str, benchmark: str, row: Any, tmp_path: Path) -> None:
    image_at(tmp_path / "a.png")
    (tmp_path / "truths.json").write_text(json.dumps([row]))
    theirs = TaskRows(name, tmp_path, tmp_path / "truths.json")
    [ours] = find(f"{benchmark}@megatron").items(tmp_path / "truths.json")
    assert ours.row["messages"] == theirs[0]["messages"] and ours.row["images"] == theirs[0]["images"]
    known = theirs.line(0, "x")["gt_answer"]
    assert (ours.gold if isinstance(ours.gold, list) else [ours.gold]) == known


def test_a_box_in_a_row_never_becomes_a_question(tmp_path: Path) -> None:
    """VLMEvalKit's tsv has no column for the sentence alone, and its ``answer`` is the box."""
    row = {"index": 1, "question": "Find the dog.", "answer": "[160, 120, 320, 240]", "image": text(picture(tmp_path)),
           "width": 640, "height": 480, "split": "RefCOCO_val"}  # fmt: skip
    path = write_tsv(tmp_path / "RefCOCO.tsv", [row, {**row, "index": 2, "question": ""}])
    found = find("refcoco@vlmevalkit")
    items = found.items(path)
    assert asked(items[0]) == "<image>Find the dog." and found.judge(items[0], "[250, 250, 500, 500]").score == 1.0
    assert items[1].problem == "no sentence"
    with pytest.raises(UserError, match=r"RefCOCO\.tsv: no column sent or expression .* with the sentence"):
        find("refcoco@json").items(path)


def test_a_row_without_choices(tmp_path: Path) -> None:
    row = {"index": 1, "question": "Which?", "answer": "A", "image": text(picture(tmp_path)), "A": "x", "B": "y"}
    path = write_tsv(tmp_path / "a.tsv", [row, {**row, "A": "", "B": ""}])
    assert [item.problem is None for item in find("ai2d").items(path)] == [True, False]


def test_a_row_without_its_question(tmp_path: Path) -> None:
    row = {"index": 1, "question": "?", "answer": "x", "image": text(picture(tmp_path))}
    items = find("chartqa").items(write_tsv(tmp_path / "a.tsv", [row, {**row, "question": ""}]))
    assert [item.problem for item in items] == [None, "no question"]


def test_parquet_files_of_several_kinds_are_not_mixed(tmp_path: Path) -> None:
    row = {"questionId": "4", "question": "date?", "answers": ["May"], "image": struct(tmp_path)}
    for kind, split in (("DocVQA", "validation"), ("DocVQA", "test"), ("InfographicVQA", "validation")):
        for part in range(2):
            write_parquet(tmp_path / "root" / kind / f"{split}-0000{part}-of-00002.parquet", [row])
    assert len(find("docvqa").items(tmp_path / "root" / "DocVQA")) == 2
    with pytest.raises(UserError, match=r"holds several files \(DocVQA/validation-00000.*: name the one"):
        find("docvqa").items(tmp_path / "root")
