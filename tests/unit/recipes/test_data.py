"""The verb ``data`` through the command line: a model that is only described, and no file written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tessera.cli import main
from tests.models import make_model_dir
from tests.toys import chats, make_images, write_rows


def test_shows_rows_and_one_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model_dir(tmp_path / "model", "qwen3_vl")
    path = write_rows(tmp_path / "rows.jsonl", chats(10, make_images(tmp_path / "img", [(100, 80)])))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["data", "--model", str(model), "--dataset", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "rows used of 10 (messages" in shown
    assert "[INPUT] <|im_start|>user" in shown
    assert sorted(tmp_path.rglob("*")) == before
