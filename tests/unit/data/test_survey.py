"""``tessera data lint`` and ``stats``: every row looked at, every mistake named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tessera.config.errors import UserError
from tessera.data.encode import Encoder
from tessera.data.render import Renderer
from tessera.data.survey import Survey, datasets_of, survey
from tests.shards import make_shards, turns, write_tar
from tests.toys import chat, chats, make_geometry, make_images, make_tokenizer_dir, write_rows


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's cache directory is a directory of the test's."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


def surveyed(path: Path, **more: Any) -> Survey:
    return survey(datasets_of([str(path)]), **more)


def test_numbers(tmp_path: Path) -> None:
    images = make_images(tmp_path / "img", [(100, 80), (200, 50)])
    rows = [chat("question", "answer", images), {"videos": [images], **chat("<video>", "b")}]
    found = surveyed(write_rows(tmp_path / "rows.jsonl", rows))
    assert (found.rows, len(found.wrong)) == (2, 0)
    assert found.sizes["turns"] == [2, 2]
    assert found.sizes["images"] == [2, 0]
    assert found.sizes["frames of a video"] == [2]
    assert found.sizes["megapixels of an image"] == [0.008, 0.01]
    assert found.summary()["sizes"]["images"] == {"min": 0, "median": 1, "p95": 1.9, "max": 2, "mean": 1, "sum": 2}
    assert "2 rows, 0 of them wrong" in list(found.lines())


def test_mistakes(tmp_path: Path) -> None:
    images = make_images(tmp_path / "img", [(100, 80), (200, 50)])
    half = chat("<image>one tag", "a") | {"images": images}
    rows = [chat("fine", "a", images), chat("no tags", "a") | {"images": images}, half, chat("q", "a", ["/no.jpg"]), {}]
    found = surveyed(write_rows(tmp_path / "rows.jsonl", rows))
    reasons = {entry["row"]: entry["reason"] for entry in found.wrong.entries()}
    assert sorted(reasons) == [2, 3, 4]
    assert reasons[2] == "1 <image> tags but 2 images"
    assert "not found" in reasons[3]


def test_tokens_and_what_only_a_model_knows(tmp_path: Path) -> None:
    directory, geometry = make_tokenizer_dir(tmp_path / "model"), make_geometry()
    images = make_images(tmp_path / "img", [(100, 80)])
    rows = [chat("q", "a", images), chat("long " * 300, "a"), *chats(3)]
    encoder = Encoder(Renderer(directory, geometry), geometry, max_length=400)
    found = surveyed(write_rows(tmp_path / "rows.jsonl", rows), encoder=encoder)
    assert [(entry["row"], entry["reason"].split(" ", 1)[1]) for entry in found.wrong.entries()] == [
        (1, "tokens are more than --max_length 400")
    ]
    assert len(found.sizes["tokens"]) == 5
    assert len(found.sizes["tokens of images and videos"]) == 1


def test_shards_are_looked_at_whole(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "wds", 4, 2)
    data = json.dumps(turns(9)).encode()
    [image] = make_images(tmp_path / "img", [(64, 48)])
    good = {"jpg": Path(image).read_bytes(), "json": data}
    write_tar(folder / "pretrain-2.tar", [("00001", good), ("x", {**good, "jpg": b"no"}), ("y", good)])
    found = surveyed(folder)
    entries = {entry["place"]: entry["reason"] for entry in found.wrong.entries()}
    assert found.rows == 7
    assert entries.keys() == {"pretrain-2.tar: 00001", "pretrain-2.tar: x"}
    assert entries["pretrain-2.tar: 00001"] == "key 00001 occurs twice, first as row 1"
    assert "not an image" in entries["pretrain-2.tar: x"]


def test_a_sample_of_rows_is_not_every_row(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", chats(3))
    with pytest.raises(UserError, match="every row is looked at; leave #2 out"):
        datasets_of([f"{path}#2"])
