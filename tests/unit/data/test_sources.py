"""The dataset syntax, every file format, and how rows are drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tessera.config.errors import UserError
from tessera.data.sample import BadRow
from tessera.data.sources import DatasetSpec, open_rows, parse_dataset_spec, sample_rows, split_rows
from tessera.data.tables import Lines, Parquet, Rows

ROWS = [{"query": f"q{i}", "response": f'a{i}, "quoted"\nline'} for i in range(7)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("AI-ModelScope/LaTeX_OCR:human_handwrite#5000", ("AI-ModelScope/LaTeX_OCR", ("human_handwrite",), 5000, None)),
        ("hf::AI-MO/NuminaMath-TIR", ("AI-MO/NuminaMath-TIR", (), None, "hf")),
        ("ms::a/b:x/y", ("a/b", ("x", "y"), None, "ms")),
        ("./no:where.jsonl", ("./no", ("where.jsonl",), None, None)),
    ],
)
def test_syntax(text: str, expected: tuple[str, tuple[str, ...], int | None, str | None]) -> None:
    spec = parse_dataset_spec(text)
    assert (spec.name, spec.subsets, spec.sample, spec.hub) == expected


def test_paths_come_first(tmp_path: Path) -> None:
    odd = tmp_path / "a:b#3.jsonl"
    odd.write_text(json.dumps(ROWS[0]))
    assert parse_dataset_spec(str(odd)) == DatasetSpec(str(odd), str(odd))
    assert parse_dataset_spec(f"{odd}#2").sample == 2
    plain = tmp_path / "a#3.jsonl"
    plain.write_text(json.dumps(ROWS[0]))
    assert parse_dataset_spec(f"{plain}:sub#2") == DatasetSpec(f"{plain}:sub#2", str(plain), ("sub",), 2)


@pytest.mark.parametrize("text", ["x/y#many", "x/y#0", "#5", "", "./missing.jsonl", "/no/such/dir", "ms::a/b"])
def test_mistakes_are_one_line(text: str) -> None:
    with pytest.raises(UserError, match="--dataset") as error:
        open_rows(parse_dataset_spec(text))
    assert "\n" not in str(error.value)


def all_of(rows: Rows) -> list[dict[str, str]]:
    return [rows[i] for i in range(len(rows))]


def opened(path: Path, suffix: str = "") -> Rows:
    return open_rows(parse_dataset_spec(f"{path}{suffix}"))


def test_json_lines_with_blanks_and_without_final_newline(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n \r\n\n".join(json.dumps(row).encode() for row in ROWS))
    rows = opened(path)
    assert all_of(rows) == ROWS
    assert rows.base == tmp_path


def test_bad_lines_are_bad_rows_not_crashes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"query": "q"}\n{"query": \n[1]\n\xff\xfe\n{"query": "last"}')
    rows = opened(path)
    assert len(rows) == 5
    assert rows[4] == {"query": "last"}
    for index in (1, 2, 3):
        with pytest.raises(BadRow):
            rows[index]


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    assert len(Lines(tmp_path / "a.jsonl")) == 0


def test_json_list_and_json_lines_in_disguise(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "b.json").write_text("\n".join(json.dumps(row) for row in ROWS))
    assert all_of(opened(tmp_path / "a.json")) == all_of(opened(tmp_path / "b.json")) == ROWS
    (tmp_path / "c.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="list of objects"):
        opened(tmp_path / "c.json")


def test_csv_keeps_text(tmp_path: Path) -> None:
    import csv

    path = tmp_path / "a.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["query", "response"], ["007", "a,b\nc"], ["x", ""]])
    assert all_of(opened(path)) == [{"query": "007", "response": "a,b\nc"}, {"query": "x", "response": ""}]


def test_text_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\r\n\ntwo\n")
    assert all_of(opened(tmp_path / "a.txt")) == [{"text": "one"}, {"text": "two"}]


def test_parquet_by_row_groups(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=2)
    rows = opened(tmp_path / "a.parquet")
    assert all_of(rows) == ROWS
    assert [rows[i] for i in (6, 0, 3)] == [ROWS[6], ROWS[0], ROWS[3]]
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="not a parquet file"):
        Parquet(tmp_path / "b.parquet")


def test_saved_datasets_and_their_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": whole, "test": whole.select([0, 1])}).save_to_disk(tmp_path / "two")
    assert all_of(opened(tmp_path / "one")) == ROWS
    assert all_of(opened(tmp_path / "two")) == ROWS
    assert all_of(opened(tmp_path / "two", ":test")) == ROWS[:2]
    assert len(opened(tmp_path / "two", ":all")) == 9
    with pytest.raises(UserError, match="no subset 'dev'"):
        opened(tmp_path / "two", ":dev")


def test_directory_of_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[0]))
    (tmp_path / "sub" / "b.json").write_text(json.dumps(ROWS[1:3]))
    assert all_of(opened(tmp_path)) == ROWS[:3]
    assert all_of(opened(tmp_path, ":sub")) == ROWS[1:3]


@pytest.mark.parametrize(
    ("count", "wanted", "ratio", "sizes"),
    [
        (100, 50, 0.01, (49, 1)),
        (100, None, 0.01, (99, 1)),
        (100, 50, 0.1, (45, 5)),
        (100, 250, 0.01, (249, 1)),
        (100, 250, 0.1, (240, 10)),
        (5000, 5000, 0.01, (4950, 50)),
        (100, None, 0.0, (100, 0)),
    ],
)
def test_split_sizes(count: int, wanted: int | None, ratio: float, sizes: tuple[int, int]) -> None:
    for shuffle in (True, False):
        train, held = split_rows(count, wanted, ratio, np.random.RandomState(42), shuffle=shuffle)
        assert (len(train), len(held)) == sizes
        assert not set(train.tolist()) & set(held.tolist())


def test_sampling_is_the_permutation_of_the_seed() -> None:
    drawn = sample_rows(100, 30, np.random.RandomState(7), shuffle=True)
    assert drawn.tolist() == np.random.RandomState(7).permutation(100)[:30].tolist()
    assert sample_rows(100, 30, np.random.RandomState(7), shuffle=False).tolist() == list(range(30))
    repeated = np.bincount(sample_rows(10, 25, np.random.RandomState(7), shuffle=True))
    assert sorted(repeated.tolist()) == [2] * 5 + [3] * 5
