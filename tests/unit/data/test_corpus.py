"""Planning: lengths without pixels, rows refused with reasons, splits that can be read again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tessera.config.errors import UserError
from tessera.config.resolve import run_of
from tessera.data import media
from tessera.data.corpus import Corpus, prepare
from tessera.data.render import Renderer
from tests.toys import chat, chats, make_geometry, make_images, make_tokenizer_dir, write_rows


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer_dir(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return make_images(tmp_path_factory.mktemp("images"), [(100, 80), (64, 200), (300, 120)])


def planned(
    directory: Path, rows: Path | list[Path], run_dir: Path | None = None, *, verb: str = "sft", **flags: Any
) -> tuple[Corpus, Corpus | None]:
    paths = [rows] if isinstance(rows, Path) else rows
    strategy = flags.pop("truncation_strategy", "delete")
    run = run_of(verb, model=str(directory), dataset=tuple(str(path) for path in paths), **flags)
    data = replace(run.data, truncation_strategy=strategy)
    geometry = make_geometry()
    return prepare(data, Renderer(directory, geometry, loss_scale=run.data.loss_scale), geometry, run_dir)


def skipped(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "skipped.jsonl").read_text().splitlines()]


def test_lengths_are_those_of_the_encoded_rows(directory: Path, images: list[str], tmp_path: Path) -> None:
    train, val = planned(directory, write_rows(tmp_path / "a.jsonl", chats(30, images)), split_dataset_ratio=0.0)
    assert val is None
    assert len(train) == 30
    for index in range(len(train)):
        encoded = train.encoded(index)
        assert len(encoded.tokens) == train.lengths[index]
        assert encoded.patches == train.patches[index]


def test_planning_decodes_nothing(
    directory: Path, images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("planning decoded an image")

    monkeypatch.setattr(media, "decode", fail)
    train, _ = planned(directory, write_rows(tmp_path / "a.jsonl", chats(8, images)), split_dataset_ratio=0.0)
    assert train.patches.any()


def bad_rows(folder: Path, images: list[str]) -> list[tuple[dict[str, Any] | str, str]]:
    """Rows that cannot be trained on, with a piece of the reason."""
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("RGB", (900, 4)).save(folder / "thin.png")
    (folder / "page.jpg").write_text("<html>")
    head = bytearray(Path(images[0]).read_bytes())
    at = head.index(b"\xff\xc0")
    head[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    (folder / "bomb.jpg").write_bytes(head)
    return [
        (chat("q", "a", [str(folder / "missing.jpg")]), "not found"),
        (chat("q", "a", [str(folder / "dot.png")]), "too small"),
        (chat("q", "a", [str(folder / "thin.png")]), "differ by more than 200x"),
        (chat("q", "a", [str(folder / "page.jpg")]), "not an image"),
        (chat("q", "a", [str(folder / "bomb.jpg")]), "too large"),
        ({"messages": [{"role": "user", "content": "q"}]}, "no assistant turn"),
        ({"something": "else"}, "no known columns"),
        (chat("q" * 9000, "a"), "more than --max_length 600"),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss": False}]},
            "nothing to learn",
        ),
        ("{not json", "not valid JSON"),
        (chat("q<image>", "a"), "1 <image> tags but 0 images"),
    ]


def test_bad_rows_are_listed_with_number_and_reason(directory: Path, images: list[str], tmp_path: Path) -> None:
    bad = bad_rows(tmp_path, images)
    rows: list[Any] = [*chats(3, images), *(row for row, _ in bad)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    train, _ = planned(directory, path, tmp_path / "run", split_dataset_ratio=0.0, max_length=600, max_skip_ratio=1.0)
    assert len(train) == 3
    entries = skipped(tmp_path / "run")
    assert sorted(entry["row"] for entry in entries) == list(range(3, len(rows)))
    reasons = {entry["row"]: entry["reason"] for entry in entries}
    for number, (_, expected) in enumerate(bad, start=3):
        assert expected in reasons[number]
    assert {entry["dataset"] for entry in entries} == {str(path)}


def test_too_many_bad_rows_stop_the_run_with_the_reason(directory: Path, tmp_path: Path) -> None:
    lost = [chat("q", "a", [f"/nowhere/{i}.jpg"]) for i in range(3)]
    path = write_rows(tmp_path / "a.jsonl", [*chats(7), *lost])
    with pytest.raises(UserError, match=r"3 of 10 rows .*--max_skip_ratio 0.1: 3x image file not found"):
        planned(directory, path, split_dataset_ratio=0.0)
    train, _ = planned(directory, path, split_dataset_ratio=0.0, max_skip_ratio=0.3)
    assert len(train) == 7
    with pytest.raises(UserError, match=r"no row of --dataset .* can be used \(3 rows\): 3x image file not found"):
        planned(directory, write_rows(tmp_path / "b.jsonl", lost), split_dataset_ratio=0.0, max_skip_ratio=1.0)
    with pytest.raises(UserError, match=r"--strict true: row 7 of .*not found"):
        planned(directory, path, strict=True)


def test_reasons_are_grouped(directory: Path, tmp_path: Path) -> None:
    rows = [chat("q" * 900 * (i + 1), "a") for i in range(4)] + [{"x": i} for i in range(2)] + chats(6)
    train, _ = planned(
        directory, write_rows(tmp_path / "a.jsonl", rows), max_length=200, max_skip_ratio=1.0, split_dataset_ratio=0.0
    )
    assert [count for count, _ in train.skips.reasons()] == [4, 2]


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_keeps_images_whole(directory: Path, images: list[str], tmp_path: Path, side: str) -> None:
    messages = [
        {"role": "user", "content": "start <image>" + "x " * 10},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "<image>" + "y " * 60},
        {"role": "assistant", "content": "last"},
    ]
    row = {"messages": messages, "images": images[:2]}
    train, _ = planned(
        directory,
        write_rows(tmp_path / "a.jsonl", [row, *chats(5)]),
        max_length=150,
        truncation_strategy=side,
        split_dataset_ratio=0.0,
        dataset_shuffle=False,
    )
    encoded = train.encoded(0)
    assert len(encoded.tokens) == train.lengths[0] == 150
    geometry = train.encoder.geometry
    assert int((encoded.tokens == geometry.pad_ids["image"]).sum()) == sum(
        sum(geometry.slots(i)) for i in encoded.items
    )
    assert len(encoded.items) == 2
    text = train.encoder.renderer.decode(encoded.tokens)
    assert text.startswith("<|im_start|>system") == (side == "right")
    assert text.endswith("last<|im_end|>\n") == (side == "left")


def test_rows_cut_to_nothing_are_skipped(directory: Path, images: list[str], tmp_path: Path) -> None:
    rows = [chat("x " * 200, "answer"), chat("q", "a", images * 3), *chats(5)]
    train, _ = planned(
        directory,
        write_rows(tmp_path / "a.jsonl", rows),
        tmp_path / "run",
        max_length=100,
        truncation_strategy="right",
        split_dataset_ratio=0.0,
        max_skip_ratio=1.0,
    )
    reasons = {entry["row"]: entry["reason"] for entry in skipped(tmp_path / "run")}
    assert "cut the answer off" in reasons[0]
    assert "images and videos alone take" in reasons[1]
    assert len(train) == 5


def test_split_makes_several_rows_of_a_document(directory: Path, images: list[str], tmp_path: Path) -> None:
    document = {"text": "alpha " * 40 + "<image>" + "beta " * 40 + "<image>" + "gamma " * 10, "images": images[:2]}
    train, _ = planned(
        directory,
        write_rows(tmp_path / "a.jsonl", [document, {"text": "short"}]),
        verb="pt",
        max_length=64,
        truncation_strategy="split",
        split_dataset_ratio=0.0,
        dataset_shuffle=False,
    )
    whole = train.encoder.encoded(train.sample(0))
    parts = [train.encoded(i) for i in range(len(train)) if train.refs[i, 1] == 0]
    assert len(parts) > 2
    assert np.array_equal(np.concatenate([part.tokens for part in parts]), whole.tokens)
    assert max(len(part.tokens) for part in parts) <= 64
    assert sum(len(part.items) for part in parts) == 2
    assert all(part.loss_weight[0] == 0 for part in parts)
    pad = train.encoder.geometry.pad_ids["image"]
    for part in parts:
        assert int((part.tokens == pad).sum()) == sum(sum(train.encoder.geometry.slots(i)) for i in part.items)


def test_validation_rows_read_back(directory: Path, images: list[str], tmp_path: Path) -> None:
    rows = chats(20, images)
    rows[0]["messages"][1]["loss"] = True
    train, val = planned(directory, write_rows(tmp_path / "a.jsonl", rows), tmp_path / "run", split_dataset_ratio=0.2)
    assert val is not None
    assert (len(train), len(val)) == (16, 4)
    again, _ = planned(
        directory, tmp_path / "run" / "val_dataset.jsonl", dataset_shuffle=False, split_dataset_ratio=0.0
    )
    assert again.lengths.tolist() == val.lengths.tolist()
    assert all(np.array_equal(again.encoded(i).tokens, val.encoded(i).tokens) for i in range(len(val)))


def test_seed_decides_and_paths_do_not(directory: Path, tmp_path: Path) -> None:
    rows = chats(40)
    here, there = (write_rows(tmp_path / name / "a.jsonl", rows) for name in ("x", "y"))
    one, two = (planned(directory, path, data_seed=7, split_dataset_ratio=0.1)[0] for path in (here, there))
    assert one.fingerprint == two.fingerprint
    assert planned(directory, here, data_seed=8, split_dataset_ratio=0.1)[0].fingerprint != one.fingerprint


def test_val_dataset_and_several_datasets(directory: Path, tmp_path: Path) -> None:
    first, second = (write_rows(tmp_path / f"{i}.jsonl", chats(10, seed=i)) for i in range(2))
    run = {"val_dataset": (f"{second}#4",), "split_dataset_ratio": 0.5}
    train, val = planned(directory, [first, Path(f"{second}#15")], **run)
    assert val is not None
    assert (len(train), len(val)) == (25, 4)
    assert set(train.refs[:, 0].tolist()) == {0, 1}


def test_relative_images_beside_the_dataset_or_below_a_root(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [picture] = make_images(tmp_path / "data" / "img", [(60, 60)])
    path = write_rows(tmp_path / "data" / "a.jsonl", [chat("q", "a", [f"img/{Path(picture).name}"])])
    monkeypatch.chdir("/")
    assert len(planned(directory, path, split_dataset_ratio=0.0)[0]) == 1
    other = write_rows(tmp_path / "b.jsonl", [chat("q", "a", [Path(picture).name])])
    root = str(tmp_path / "data" / "img")
    assert len(planned(directory, other, split_dataset_ratio=0.0, root_image_dir=root)[0]) == 1


def test_a_text_only_model_refuses_images(directory: Path, images: list[str], tmp_path: Path) -> None:
    run = run_of("sft", model=str(directory), dataset=(str(write_rows(tmp_path / "a.jsonl", chats(4, images))),))
    geometry = make_geometry("text")
    with pytest.raises(UserError, match="takes no images"):
        prepare(run.data, Renderer(directory, geometry), geometry)


def test_frames_per_second_of_a_video_are_its_timestamps(directory: Path, tmp_path: Path) -> None:
    frames = make_images(tmp_path / "img", [(56, 56)] * 4)
    row = chat("<video>q", "a") | {"videos": [frames]}
    rows = [row, row | {"fps": 4}, row | {"fps": ["0.5"]}, row | {"fps": [1, 2]}, row | {"fps": 0}, row | {"fps": "x"}]
    train, val = planned(
        directory,
        write_rows(tmp_path / "a.jsonl", rows),
        tmp_path / "run",
        dataset_shuffle=False,
        max_skip_ratio=1.0,
        split_dataset_ratio=0.34,
    )
    assert val is None or not len(val)
    assert [train.encoded(i).items[0].timestamps for i in range(len(train))] == [
        (),
        (0.0, 0.25, 0.5, 0.75),
        (0.0, 2.0, 4.0, 6.0),
    ]
    reasons = {entry["row"]: entry["reason"] for entry in skipped(tmp_path / "run")}
    assert reasons[3] == "2 entries in fps but 1 videos"
    assert "positive" in reasons[4]
    assert "fps must be numbers" in reasons[5]
