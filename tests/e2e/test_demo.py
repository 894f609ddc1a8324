"""``tessera demo`` from the first digit to the report, in a few steps: only the learning is short."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.e2e.command import works

pytest.importorskip("sklearn", reason="the digits come from scikit-learn")


def test_every_stage_of_it(tmp_path: Path) -> None:
    done = works("demo", tmp_path / "demo", "--max_steps", "8", "--seed", "7")
    for verb in ("sft", "export", "infer"):
        assert f"\n$ tessera {verb} " in done.out
    found = re.search(r"^exact match on unseen strokes, lines: ([\d.]+) of (\d+)$", done.out, re.MULTILINE)
    assert found is not None
    page = Path(done.out.rpartition("report: ")[2].strip())
    assert "<html" in page.read_text(encoding="utf-8")

    [run] = (tmp_path / "demo").iterdir()
    train, held = ((run / "data" / f"{name}.jsonl").read_text().splitlines() for name in ("train", "val"))
    assert len(train) == 8 * 64
    lines = [row for row in map(json.loads, held) if row["kind"] == "line"]
    assert int(found[2]) == len(lines)
    answers = [json.loads(text) for text in next(page.parent.rglob("infer_result/*.jsonl")).read_text().splitlines()]
    exact = sum(row["response"].strip() == row["labels"].strip() for row in answers if row["kind"] == "line")
    assert float(found[1]) == pytest.approx(exact / len(lines), abs=1e-3)
    table = [json.loads(text) for text in (page.parent / "accuracy.jsonl").read_text().splitlines()]
    assert [row["step"] for row in table] == sorted({row["step"] for row in table}) and table[-1]["step"] == 7
