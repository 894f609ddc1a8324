"""``tessera data`` shows what training would see, and writes nothing it was not asked to write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tessera.config.resolve import run_of
from tessera.data.inspect import format_of, show
from tests.toys import chat, chats, make_geometry, make_images, make_tokenizer_dir, write_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer_dir(tmp_path_factory.mktemp("model"), "qwen3_vl")


def test_report(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = make_images(tmp_path / "img", [(100, 80)])
    rows = [*chats(12, images), chat("q", "a", ["/nowhere.jpg"]), {"question": "q", "answer": "a"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    run = run_of(
        "data", model=str(model), dataset=(str(path),), packing=True, packing_length=512, split_dataset_ratio=0.1
    )
    show(run.data, model, make_geometry())
    shown = capsys.readouterr().out
    for expected in (
        f"train  {path}: 12 rows used of 14",
        "messages 11, query/response 1",
        "val  ",
        "tokens per row: min ",
        "image patches per row",
        "packs of 512 tokens",
        "skipped  1 rows",
        "1x image file not found: /nowhere.jpg",
        "[INPUT] <|im_start|>user",
        "[LABELS] [-100 * ",
    ):
        assert expected in shown
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["img", "rows.jsonl"]


def test_skipped_rows_are_written_where_asked(model: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [*chats(3), {"x": 1}])
    out = tmp_path / "out"
    run = run_of("data", model=str(model), dataset=(str(path),), split_dataset_ratio=0.5)
    show(run.data, model, make_geometry(), skipped_into=out)
    assert sorted(entry.name for entry in out.iterdir()) == ["skipped.jsonl"]
    assert [json.loads(line)["row"] for line in (out / "skipped.jsonl").read_text().splitlines()] == [3]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (chat("q", "a"), "messages"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "sharegpt"),
        ({"conversation": [{"human": "q", "assistant": "a"}]}, "pairs"),
        ({"instruction": "i", "input": "x", "output": "o"}, "alpaca"),
        ({"text": "t"}, "text"),
        ({"problem": "p", "solution": "s"}, "query/response"),
    ],
)
def test_formats_have_names(row: dict[str, Any], name: str) -> None:
    assert format_of(row) == name
