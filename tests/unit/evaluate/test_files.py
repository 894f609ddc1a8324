"""Published layouts are read as they are: cells, pictures wherever they lie, and what a bad row says."""

from __future__ import annotations

import base64
import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest

from tessera.config.errors import UserError
from tessera.data.sample import normalise
from tessera.evaluate.files import Items, Tsv, listed
from tessera.evaluate.item import Item
from tessera.evaluate.tasks import BENCHMARKS, find
from tests.toys import make_images

pyarrow = pytest.importorskip("pyarrow", reason="parquet layouts need pyarrow")


def picture(tmp_path: Path, place: int = 0) -> bytes:
    folder = tmp_path / "made"
    if not folder.exists():
        make_images(folder, [(64, 48), (48, 64), (32, 32)])
    return sorted(folder.iterdir())[place].read_bytes()


def text(data: bytes) -> str:
    return base64.b64encode(data + b"\0" * 900).decode()


def write_tsv(path: Path, rows: list[dict[str, Any]]) -> Path:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", encoding="utf-8", newline="") as file:
        out = csv.DictWriter(file, names, delimiter="\t", lineterminator="\n")
        out.writeheader()
        out.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    from pyarrow import Table, parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(Table.from_pylist(rows), path)
    return path


def asked(item: Item) -> str:
    """The user's turn, of a row that tessera reads."""
    assert item.problem is None, item.problem
    sample = normalise(item.row, need_answer=False, exact_tags=True)
    assert len(sample.images) == len(item.row["images"])
    return str(item.row["messages"][-1]["content"])


def shown(item: Item, place: int = 0) -> bytes:
    image = item.row["images"][place]
    return bytes(image["bytes"]) if isinstance(image, dict) else Path(image).read_bytes()


def test_cells_are_those_of_the_csv_module(tmp_path: Path) -> None:
    draw = random.Random(3)
    signs = ["a", "b", '"', "\t", "\n", " ", "é", "'", ",", "12"]
    rows = [["".join(draw.choices(signs, k=draw.randint(0, 6))) for _ in range(4)] for _ in range(300)]
    rows = [row for row in rows if "".join(row).strip()]
    with open(tmp_path / "t.tsv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([["w", "x", "y", "z"], *rows])
    found = Tsv(tmp_path / "t.tsv")
    assert found.columns == ["w", "x", "y", "z"]
    assert [[found[at].get(name, "") for name in "wxyz"] for at in range(len(found))] == rows
    assert [[found.cell(at, name) or "" for name in "wxyz"] for at in range(len(found))] == rows


def test_windows_line_ends_and_a_missing_last_one(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_bytes(b"\xef\xbb\xbfindex\tquestion\r\n1\tone\r\n\r\n2\ttwo")
    found = Tsv(tmp_path / "t.tsv")
    assert [found[at] for at in range(len(found))] == [
        {"index": "1", "question": "one"},
        {"index": "2", "question": "two"},
    ]
    assert found.cell(0, "question") == "one"


def test_pictures_in_a_tsv(tmp_path: Path) -> None:
    """Base64, the index of another row, a list of both kinds, and nothing at all."""
    one, two = text(picture(tmp_path)), text(picture(tmp_path, 1))
    rows = [
        {"index": 7, "question": "what?", "answer": "x", "image": one},
        {"index": 8, "question": "what?", "answer": "x", "image": "7"},
        {"index": 9, "question": "what?", "answer": "x", "image": str([one, two])},
        {"index": 10, "question": "what?", "answer": "x", "image": ""},
        {"index": 11, "question": "what?", "answer": "", "image": one},
        {"index": 12, "question": "what?", "answer": "x", "image": "no-such-row"},
        {"index": 13, "question": "what?", "answer": "x", "image": "not base64 " * 200},
    ]
    items = find("docvqa").items(write_tsv(tmp_path / "DocVQA_VAL.tsv", rows))
    assert asked(items[0]) == "<image>what?\nAnswer the question using a single word or phrase."
    assert shown(items[0]) == shown(items[1]) == base64.b64decode(one)
    assert asked(items[2]).startswith("<image><image>what?") and shown(items[2], 1) == base64.b64decode(two)
    problems = [item.problem for item in items]
    assert problems[:3] == [None] * 3 and problems[3:5] == ["no image", "no answer is known"]
    assert problems[5] is not None and "no image no-such-row" in problems[5]
    assert problems[6] == "the image is neither a path nor base64"
    for item in items[3:]:
        judged = find("docvqa").judge(item, "x")
        assert judged.score == 0 and judged.note.startswith("bad row: ")


def test_pictures_beside_the_file(tmp_path: Path) -> None:
    make_images(tmp_path / "made", [(40, 40)])
    (tmp_path / "data" / "train_images").mkdir(parents=True)
    next((tmp_path / "made").iterdir()).rename(tmp_path / "data" / "train_images" / "ab.jpg")
    rows = {
        "data": [
            {"question_id": i, "question": "?", "image_id": n, "answers": ["a"] * 10} for i, n in ((1, "ab"), (2, "cd"))
        ]
    }
    (tmp_path / "data" / "TextVQA_0.5.1_val.json").write_text(json.dumps(rows))
    items = find("textvqa").items(tmp_path / "data")
    assert items[0].row["images"] == [str(tmp_path / "data" / "train_images" / "ab.jpg")]
    assert items[1].problem is not None and "no image cd" in items[1].problem


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"question": "?", "image": "a.png", "solution": "b"}) + "\n")
    with pytest.raises(
        UserError, match=r"x\.jsonl: no column answer or answers with the answer \(it has question, ima"
    ):
        find("docvqa").items(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no such file or directory"),
        (lambda p: p.mkdir(), "holds no benchmark"),
        (lambda p: (p.mkdir(), (p / "a.tsv").write_text("a\n1"), (p / "b.tsv").write_text("a\n1")), "name the one"),
    ],
)
def test_a_path_that_is_no_benchmark(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "there")
    with pytest.raises(UserError, match=message):
        find("mmmu").items(tmp_path / "there")


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b"")
    (tmp_path / "b.tsv").write_text("index\tquestion\tanswer\timage\n")
    for name in ("a.tsv", "b.tsv"):
        with pytest.raises(UserError, match=r"the file is empty|holds no rows"):
            find("docvqa").items(tmp_path / name)


def test_a_line_that_is_no_json_is_one_bad_row(tmp_path: Path) -> None:
    good = json.dumps({"question": "?", "image": "x", "answer": "b"})
    (tmp_path / "x.jsonl").write_text(f"{good}\nnonsense\n{good}\n")
    items = find("docvqa").items(tmp_path / "x.jsonl")
    assert len(items) == 3 and "not valid JSON" in str(items[1].problem)


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    """Opening touches no picture: rows whose pictures are all missing open, and a slice stays lazy."""
    with open(tmp_path / "x.jsonl", "w") as file:
        file.writelines(json.dumps({"question": "?", "image": f"{i}.png", "answer": "b"}) + "\n" for i in range(20000))
    items = find("docvqa").items(tmp_path / "x.jsonl")
    assert len(items) == 20000 and isinstance(items[100:], Items) and len(items[100:200]) == 100
    assert items[100:][5].id == "105"


def test_lists_in_cells() -> None:
    assert listed("['a', 'b']") == listed('["a", "b"]') == ["a", "b"] and listed("[1") == ["[1"]
    assert listed(None) == [] and listed("x") == ["x"] and listed("[ \\frac 2 3 ]") == ["[ \\frac 2 3 ]"]


def test_names() -> None:
    assert find("MMMU").name == "mmmu@vlmevalkit" and find("refcoco_plus@json").name == "refcoco+@json"
    assert find("TextVQA@megatron") is BENCHMARKS["textvqa@megatron"]
    with pytest.raises(UserError, match="did you mean chartqa"):
        find("chatqa")
    with pytest.raises(UserError, match=r"textvqa@megatron"):
        find("textvqa@megatrn")
