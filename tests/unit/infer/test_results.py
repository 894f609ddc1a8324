"""Result rows, exact match, and the file they go to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tessera.config.errors import UserError
from tessera.data.sample import Message, Sample, normalise
from tessera.infer.results import Results, exact_match, matches, read_results, result_file, result_row, shown

PROMPT = Sample((Message("system", "s"), Message("user", "<image>\nread <video> this ")), ("a.png",))


def test_exact_match_ignores_white_space_only() -> None:
    assert matches(" 1 + 2\n=  3", "1 + 2 = 3")
    assert not matches("1+2", "1 + 2")
    assert not matches("A", "a")
    rows = [{"response": "x ", "labels": "x"}, {"response": "y", "labels": "x"}, {"response": "z", "labels": None}]
    assert exact_match(rows) == 0.5
    assert exact_match(rows[2:]) is None
    assert exact_match([]) is None


def test_what_is_printed() -> None:
    assert shown(PROMPT, "42") == "[QUERY] read  this\n[LABELS] 42\n[RESPONSE] "
    assert shown(PROMPT, None) == "[QUERY] read  this\n[RESPONSE] "


def test_other_columns_are_passed_through() -> None:
    row = {"messages": [], "answer": "a remark", "score": 1.5, "labels": "old", "images": ["a.png"], "Image": "x"}
    out = result_row(row, PROMPT, "42", "41")
    assert out["answer"] == "a remark"
    assert out["score"] == 1.5
    assert (out["labels"], out["response"]) == ("42", "41")
    assert out["images"] == [str(Path("a.png").absolute())]
    assert "Image" not in out
    assert "score" in result_row({"query": "q", "answer": "a", "score": 1}, PROMPT, "42", "41")
    assert "answer" not in result_row({"query": "q", "answer": "a", "score": 1}, PROMPT, "42", "41")


def test_a_result_row_is_a_dataset_row() -> None:
    prompt = Sample((Message("user", "<image>and <video>"),), (b"\x89PNG",), (("f0.png", "f1.png"),))
    row = json.loads(json.dumps(result_row({}, prompt, None, "yes")))
    again = normalise(row)
    assert again.answer == "yes"
    assert again.messages[0] == prompt.messages[0]
    assert again.images[0] == "data:image;base64,iVBORw=="
    assert [Path(str(frame)).name for frame in again.videos[0]] == ["f0.png", "f1.png"]


def test_rows_are_on_disk_as_soon_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "r.jsonl"
    with Results(path) as results:
        results.write({"response": "é", "labels": "é"})
        assert read_results(path) == [{"response": "é", "labels": "é"}]
        results.write({"response": "é", "labels": "e"})
        assert len(read_results(path)) == 2
    assert results.exact_match == 0.5
    with pytest.raises(UserError, match="cannot be created"), Results(path):
        pass


def test_where_results_go(tmp_path: Path) -> None:
    first = result_file(None, tmp_path)
    assert first.parent == tmp_path / "infer_result"
    first.parent.mkdir()
    first.touch()
    second = result_file(None, tmp_path)
    assert second != first
    with pytest.raises(UserError, match="cannot be created"), Results(tmp_path / "infer_result" / first.name / "x"):
        pass
