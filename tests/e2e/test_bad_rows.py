"""Rows that cannot be trained on: the run goes on, says which, or stops with a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.e2e.command import QUICK, rows_of, run_dir, tessera
from tests.models import make_model_dir
from tests.toys import chat, chats, make_images, write_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("bad") / "model", "qwen3_vl")


def bad(folder: Path) -> list[tuple[Any, str]]:
    """Rows with a piece of the reason why each cannot be used."""
    [whole] = make_images(folder, [(160, 120)], seed=7)
    (folder / "cut.jpg").write_bytes(Path(whole).read_bytes()[:-900])
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    return [
        (chat("q", "a", [str(folder / "missing.jpg")]), "image file not found"),
        (chat("q", "a", [str(folder / "cut.jpg")]), "truncated"),
        (chat("q", "a", [str(folder / "dot.png")]), "too small"),
        (chat("word " * 600, "a"), "more than --max_length 512"),
        ({"something": "else"}, "no known columns"),
        ({"messages": [{"role": "user", "content": "q"}]}, "no assistant turn"),
        ("{torn", "not valid JSON"),
    ]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def train(model: Path, rows: Path, *more: str | Path) -> tuple[str | Path, ...]:
    steps = ("--num_train_epochs", "1", "--gradient_accumulation_steps", "2", "--max_length", "512")
    return ("sft", "--model", model, "--dataset", rows, *steps, *QUICK, *more)


def test_the_run_goes_on_and_lists_them(model: Path, tmp_path: Path) -> None:
    wrong = bad(tmp_path)
    good = chats(13, make_images(tmp_path / "good", [(64, 48)]))
    rows = write(tmp_path / "rows.jsonl", [*good[:5], *(row for row, _ in wrong), *good[5:]])
    done = tessera(*train(model, rows, "--max_skip_ratio", "0.5", "--output_dir", tmp_path / "out"))
    assert done.code == 0, done.err
    run = run_dir(tmp_path / "out")
    skipped = rows_of(run / "skipped.jsonl")
    assert {entry["dataset"] for entry in skipped} == {str(rows)}
    reasons = {entry["row"]: entry["reason"] for entry in skipped}
    assert len(skipped) == len(reasons)  # each once
    assert sorted(reasons) == list(range(5, 5 + len(wrong)))
    for number, (_, expected) in enumerate(wrong, start=5):
        assert expected in reasons[number]
    last = rows_of(run / "logging.jsonl")[-1]
    assert last["train_samples"] == 13  # every good row once, none instead of a bad one
    assert "6 rows" in done.out or "skipped" in done.out  # said before step 1


def test_too_many_stop_the_run(model: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [*chats(15), *[chat("q", "a", [f"lost-{n}.jpg"]) for n in range(5)]])
    done = tessera(*train(model, rows, "--output_dir", tmp_path / "out"))
    assert done.code == 1
    assert "5 of 20 rows" in done.error and "--max_skip_ratio 0.1: 5x image file not found" in done.error
    done = tessera(*train(model, rows, "--output_dir", tmp_path / "out", "--strict", "true"))
    assert done.code == 1 and "--strict true: row 15" in done.error


def test_pixels_that_fail_late_count_too(model: Path, tmp_path: Path) -> None:
    """A truncated file has a sound header, so it is found in the middle of training."""
    wrong = bad(tmp_path)[1][0]
    rows = write_rows(tmp_path / "rows.jsonl", [*chats(6), *[wrong] * 4])
    done = tessera(*train(model, rows, "--output_dir", tmp_path / "out", "--max_skip_ratio", "0.2"))
    assert done.code == 1
    assert "too many unusable rows" in done.error and "cannot decode cut.jpg: image file is truncated" in done.error


def test_nothing_usable_is_a_sentence(model: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [row for row, _ in bad(tmp_path) if "cut.jpg" not in str(row)])
    done = tessera(*train(model, rows, "--max_skip_ratio", "1", "--output_dir", tmp_path / "out"))
    assert done.code == 1
    assert "can be used (6 rows)" in done.error


@pytest.mark.parametrize(
    ("content", "piece"),
    [("", "empty"), (None, "no such file"), ("\n\n", "empty")],
    ids=["empty", "missing", "blank"],
)
def test_no_rows_at_all(model: Path, tmp_path: Path, content: str | None, piece: str) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    done = tessera(*train(model, path, "--output_dir", tmp_path / "out"))
    assert done.code in (1, 2) and piece in done.error
