"""The demo's rows: composed from a seed, labelled rightly, and never from strokes of the other side of the split."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tessera.recipes import handwriting
from tessera.recipes.handwriting import CELL, LINE, SUM, WIDTH, Glyphs, Strokes


def strokes(per_digit: int = 8) -> Strokes:
    """Made-up strokes: a bar per digit, and the number of the stroke hidden in the corner pixel."""
    labels = np.repeat(np.arange(10), per_digit)
    images = np.zeros((len(labels), 8, 8), np.float32)
    images[:, 1:7, 3:5] = 1.0
    images[:, 0, 0] = np.arange(len(labels)) / len(labels)
    return Strokes(images, labels)


@pytest.fixture(scope="module")
def glyphs() -> Glyphs:
    return handwriting.draw(strokes(), 2, np.random.default_rng(0))


def test_split_is_disjoint_complete_and_even() -> None:
    everything = strokes()
    train, held = handwriting.split(everything, 0.25, np.random.default_rng(3))
    marks = [set(part.images[:, 0, 0].tolist()) for part in (train, held)]
    assert not marks[0] & marks[1]
    assert marks[0] | marks[1] == set(everything.images[:, 0, 0].tolist())
    assert np.bincount(held.labels).tolist() == [2] * 10
    again, _ = handwriting.split(everything, 0.25, np.random.default_rng(3))
    other, _ = handwriting.split(everything, 0.25, np.random.default_rng(4))
    assert np.array_equal(again.images, train.images)
    assert not np.array_equal(other.images, train.images)


def test_drawings_are_found_under_their_digit(glyphs: Glyphs) -> None:
    assert glyphs.ink.shape[1:] == (CELL, CELL)
    assert sorted(glyphs.rows) == sorted("+0123456789")
    assert all(len(glyphs.rows[digit]) == 16 for digit in "0123456789")
    everywhere = np.concatenate(list(glyphs.rows.values()))
    assert sorted(everywhere.tolist()) == list(range(len(glyphs.ink)))
    assert np.all(glyphs.right > glyphs.left)
    assert len(np.unique(glyphs.ink, axis=0)) > len(glyphs.ink) // 2, "drawings of one stroke differ"


def test_exercises_answer_themselves() -> None:
    generator = np.random.default_rng(0)
    tasks = [handwriting.exercise(generator, (4, 6), 0.3) for _ in range(2000)]
    lines = [task for task in tasks if task.kind == LINE]
    sums = [task for task in tasks if task.kind == SUM]
    assert len(lines) + len(sums) == 2000
    assert 500 < len(sums) < 700
    assert all(task.written == task.answer for task in lines)
    assert {len(task.written) for task in lines} == {4, 6}
    assert {digit for task in lines for digit in task.written} == set("0123456789")
    for task in sums:
        a, b = map(int, task.written.split("+"))
        assert task.answer == f"{task.written}={a + b}"


def test_lines_fit_and_depend_on_the_seed(glyphs: Glyphs) -> None:
    first = handwriting.compose("123456", glyphs, np.random.default_rng(1))
    assert first.shape == (CELL, WIDTH)
    assert first.dtype == np.uint8
    assert first.min() < 100
    assert first.max() > 180
    assert np.array_equal(first, handwriting.compose("123456", glyphs, np.random.default_rng(1)))
    assert not np.array_equal(first, handwriting.compose("123456", glyphs, np.random.default_rng(2)))


def test_nothing_is_cut_off_at_the_sides(glyphs: Glyphs) -> None:
    """Even of six wide characters in a row, all ink lies on the page: its first and last columns stay paper."""
    generator = np.random.default_rng(5)
    for _ in range(200):
        page = handwriting.compose("++++++", glyphs, generator).astype(int)
        assert np.ptp(page[:, 0]) == np.ptp(page[:, -1]) == 0


def test_png_is_read_back_by_a_general_decoder(glyphs: Glyphs, tmp_path: Path) -> None:
    from PIL import Image

    page = handwriting.compose("7+5", glyphs, np.random.default_rng(0))
    (tmp_path / "a.png").write_bytes(handwriting.png(page))
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "L"
        assert np.array_equal(np.asarray(image), page)


def test_rows_on_disk(glyphs: Glyphs, tmp_path: Path) -> None:
    path = handwriting.write(tmp_path, "rows", 30, glyphs, np.random.default_rng(0), (4, 5, 6), 0.5)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 30
    assert {row["kind"] for row in rows} == {LINE, SUM}
    for row in rows:
        assert row["messages"][0] == {"role": "user", "content": "<image>"}
        assert row["messages"][1]["role"] == "assistant"
        assert (tmp_path / row["images"][0]).is_file()
    second = handwriting.write(tmp_path / "again", "rows", 30, glyphs, np.random.default_rng(0), (4, 5, 6), 0.5)
    assert second.read_text() == path.read_text()
    assert (second.parent / rows[0]["images"][0]).read_bytes() == (tmp_path / rows[0]["images"][0]).read_bytes()


def test_the_real_digits() -> None:
    pytest.importorskip("sklearn")
    real = handwriting.load_strokes()
    assert real.images.shape == (1797, 8, 8)
    assert (real.images.min(), real.images.max()) == (0.0, 1.0)
    assert sorted(np.unique(real.labels)) == list(range(10))
