"""Conversion keeps every byte, and the rows that come back are the rows that went in."""

from __future__ import annotations

import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tessera.config.errors import UserError
from tessera.data import media
from tessera.data.sample import normalise
from tessera.data.shards import convert as module
from tessera.data.shards.convert import convert, objects
from tessera.data.shards.write import safe_key
from tessera.data.sources import open_rows, parse_dataset_spec
from tests.shards import turns
from tests.toys import chat, make_images, write_rows


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's cache directory is a directory of the test's."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


def llava(root: Path, count: int = 5) -> list[str]:
    """A LLaVA-Pretrain root; the image files."""
    images = make_images(root / "images" / "000", [(56 + i, 48) for i in range(count)])
    rows = [
        {"id": f"0{i}", "image": str(Path(image).relative_to(root)), "conversations": turns(i)}
        for i, image in enumerate(images)
    ]
    (root / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(rows))
    return images


def sharegpt(root: Path) -> list[dict[str, Any]]:
    """A root of two conversations about images and videos as folders of frames; its entries."""
    images = make_images(root / "img", [(64, 48), (48, 64)], suffix=".png")
    make_images(root / "clips" / "a", [(56, 56)] * 5, seed=1)
    make_images(root / "clips" / "b", [(56, 56)] * 2, seed=2)
    (root / "clips" / "a.json").write_text('{"fps": "4.0"}')
    talk = [
        {"from": "human", "value": "<image>one<image>"},
        {"from": "gpt", "value": "two"},
        {"from": "human", "value": "<video><video>and?"},
        {"from": "gpt", "value": "three"},
    ]
    rows = [
        {
            "conversations": talk,
            "images": [str(Path(image).relative_to(root)) for image in images],
            "videos": ["clips/a.mp4", "clips/b.mp4"],
        },
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ]
    (root / "dataset.json").write_text(json.dumps(rows))
    return rows


def run(kind: str, source: Path, into: Path, most: int = 10_000) -> tuple[Any, list[tuple[int, str]]]:
    into.mkdir()
    left_out: list[tuple[int, str]] = []
    counts = convert(kind, str(source), into, lambda number, reason: left_out.append((number, reason)), most=most)
    return counts, left_out


def contents(folder: Path) -> dict[str, dict[str, bytes]]:
    """Shard -> member -> bytes, by the standard library."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found[path.name] = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    return found


def test_llava(tmp_path: Path) -> None:
    images = llava(tmp_path / "root")
    counts, left_out = run("llava", tmp_path / "root", tmp_path / "wds", most=2)
    assert (counts, left_out) == ((5, 5, 3), [])
    found = contents(tmp_path / "wds")
    assert {name: list(members) for name, members in found.items()} == {
        "pretrain-0.tar": ["00.jpg", "00.json", "01.jpg", "01.json"],
        "pretrain-1.tar": ["02.jpg", "02.json", "03.jpg", "03.json"],
        "pretrain-2.tar": ["04.jpg", "04.json"],
    }
    for i, image in enumerate(images):
        members = found[f"pretrain-{i // 2}.tar"]
        assert members[f"0{i}.jpg"] == Path(image).read_bytes()
        assert json.loads(members[f"0{i}.json"]) == turns(i)


def test_the_same_data_gives_the_same_shards(tmp_path: Path) -> None:
    llava(tmp_path / "root")
    for name in ("a", "b"):
        run("llava", tmp_path / "root", tmp_path / name)
    assert (tmp_path / "a" / "pretrain-0.tar").read_bytes() == (tmp_path / "b" / "pretrain-0.tar").read_bytes()


def test_sharegpt(tmp_path: Path) -> None:
    root = tmp_path / "root"
    rows = sharegpt(root)
    counts, left_out = run("sharegpt", root / "dataset.json", tmp_path / "wds")
    assert (counts.samples, left_out) == (2, [])
    members = contents(tmp_path / "wds")["pretrain-0.tar"]
    assert list(members) == [f"{i}.{part}" for i in range(2) for part in ("jpgs", "videos", "json")]
    assert pickle.loads(members["0.jpgs"]) == [(root / name).read_bytes() for name in rows[0]["images"]]
    frames = [sorted((root / "clips" / name).iterdir()) for name in "ab"]
    # of an odd number of frames the last is left out, as two of them make a patch
    assert pickle.loads(members["0.videos"]) == [
        [f.read_bytes() for f in frames[0][:4]],
        [f.read_bytes() for f in frames[1]],
    ]
    held = json.loads(members["0.json"])
    assert held == {"conversations": rows[0]["conversations"], "second_per_grid_ts": [0.25, 0.5]}
    assert json.loads(members["1.json"])["second_per_grid_ts"] == []
    sample = normalise(open_rows(parse_dataset_spec(str(tmp_path / "wds")))[0])
    assert sample.fps == (4.0, 2.0)
    assert [media.load(image) for image in sample.images] == [(root / name).read_bytes() for name in rows[0]["images"]]


def test_messages_come_back_as_they_went_in(tmp_path: Path) -> None:
    images = make_images(tmp_path / "img", [(64, 48), (56, 56), (56, 56)])
    rows = [
        chat("q", "a", images[:1]),
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "<video>what"},
                {"role": "assistant", "content": "a", "loss": False},
                {"role": "user", "content": "call"},
                {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
                {"role": "tool", "content": "1"},
                {"role": "assistant", "content": "done"},
            ],
            "videos": [images[1:]],
            "fps": 3,
            "tools": [{"name": "f"}],
        },
        {"query": "q", "response": "r"},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    counts, left_out = run("messages", path, tmp_path / "wds")
    assert (counts.samples, left_out) == (3, [])
    found = open_rows(parse_dataset_spec(str(tmp_path / "wds")))
    for index, row in enumerate(rows):
        there, here = normalise(row), normalise(found[index])
        assert (here.messages, here.tools) == (there.messages, there.tools)
        assert here.fps == pytest.approx(there.fps)
        for kind in ("images", "videos"):
            wanted = [media.load(i) for group in vars_of(there, kind) for i in group]
            assert [media.load(i) for group in vars_of(here, kind) for i in group] == wanted


def vars_of(sample: Any, kind: str) -> Any:
    return sample.videos if kind == "videos" else [sample.images]


@pytest.mark.parametrize(
    ("kind", "entry", "reason"),
    [
        ("llava", {"id": "x", "image": "no.jpg", "conversations": turns(0)}, "image file not found"),
        ("llava", {"id": "x", "conversations": turns(0)}, "no image in the entry"),
        ("llava", {"id": "x", "image": "page.jpg", "conversations": turns(0)}, "not an image"),
        ("llava", {"id": "x", "image": "ok.jpg", "conversations": []}, "conversations must be a list of turns"),
        ("llava", {"id": "ok", "image": "ok.jpg", "conversations": turns(0)}, "id ok occurs twice"),
        ("llava", {"id": "../x", "image": "ok.jpg", "conversations": turns(0)}, "cannot name a sample"),
        ("llava", 17, "no image in the entry"),
        ("sharegpt", {"conversations": turns(0), "images": ["ok.jpg", "ok.jpg"]}, "1 <image> tags but 2 images"),
        ("sharegpt", {"conversations": turns(0)}, "1 <image> tags but 0 images"),
        ("sharegpt", {"conversations": [{"value": "<video>"}], "videos": ["no.mp4"]}, "no folder of frames for no.mp4"),
        ("sharegpt", {"conversations": [{"value": "<video>"}], "videos": ["void.mp4"]}, "no frames in"),
        ("sharegpt", {"conversations": [{"value": "<video>"}], "videos": ["clip.mp4"]}, 'clip.json must hold {"fps"'),
        ("sharegpt", {"conversations": turns(0), "images": [3]}, "images must be a list of paths"),
    ],
)
def test_entries_that_cannot_be_converted_are_reported(tmp_path: Path, kind: str, entry: Any, reason: str) -> None:
    root = tmp_path / "root"
    [image] = make_images(root, [(64, 48)])
    Path(image).rename(root / "ok.jpg")
    (root / "page.jpg").write_text("<html>")
    (root / "void").mkdir()
    make_images(root / "clip", [(56, 56)])
    (root / "clip.json").write_text('{"fps": 0}')
    good = {"id": "ok", "image": "ok.jpg", "conversations": turns(0)}
    (root / "rows.json").write_text(json.dumps([good, entry, {**good, "id": "more"}]))
    counts, left_out = run(kind, root / "rows.json", tmp_path / "wds")
    assert counts == (3, 2, 1)
    assert [number for number, _ in left_out] == [1]
    assert reason in left_out[0][1]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_a_list_is_read_one_element_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    values = [{"a": "ü]},["}, 12.5, "x", [1, [2]], None, {"b": {}}]
    path = tmp_path / "a.json"
    for text in (json.dumps(values), json.dumps(values, indent=2, ensure_ascii=False), "\ufeff" + json.dumps(values)):
        path.write_text(text, encoding="utf-8")
        assert list(objects(path)) == values
    path.write_text("[]")
    assert list(objects(path)) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1}', "expected a JSON list"),
        ('[{"a": 1}, {"b": ', "not valid JSON"),
        ('[{"a": 1}', "not valid JSON"),
        ("[{'a': 1}]", "not valid JSON"),
        ("", "not valid JSON"),
    ],
)
def test_a_file_that_holds_no_list(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=reason):
        list(objects(path))


def test_keys_hold_no_dots() -> None:
    assert safe_key("a/b.c.d") == "a/b_c_d"
    assert safe_key(" 12 ") == "12"


def test_the_json_file_is_found_or_named(tmp_path: Path) -> None:
    llava(tmp_path / "root")
    (tmp_path / "root" / "blip_laion_cc_sbu_558k.json").rename(tmp_path / "root" / "mine.json")
    assert run("llava", tmp_path / "root", tmp_path / "a")[0].samples == 5
    (tmp_path / "root" / "other.json").write_text("[]")
    with pytest.raises(UserError, match=r"no blip_laion_cc_sbu_558k.json in it; give the path"):
        run("llava", tmp_path / "root", tmp_path / "b")
    with pytest.raises(UserError, match="no such file or directory"):
        run("llava", tmp_path / "nowhere", tmp_path / "c")
