"""Rows from shards: every index gives the same, every form is a row, and whatever is broken costs only itself."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from tessera.config.errors import UserError
from tessera.data import media
from tessera.data.sample import BadRow, Slice, normalise
from tessera.data.shards.fields import Fields, parse_expression, unpickle
from tessera.data.shards.folder import collapsed, expanded, natural
from tessera.data.shards.forms import form_of
from tessera.data.shards.prepare import prepare
from tessera.data.shards.tar import Part
from tessera.data.sources import open_rows, parse_dataset_spec
from tessera.data.tables import Rows, place_of
from tests.shards import FIELD_MAP, make_shards, pictures, write_tar


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache directory is a directory of the test's."""
    found = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(found))
    return found


def opened(text: str | Path) -> Rows:
    return open_rows(parse_dataset_spec(str(text)))


def plain(rows: Rows) -> list[Any]:
    """All rows, with the bytes of their images, or the reason why there is none."""
    found: list[Any] = []
    for index in range(len(rows)):
        try:
            sample = normalise(rows[index])
            found.append((sample.messages, tuple(media.load(image) for image in sample.images), place_of(rows, index)))
        except BadRow as error:
            found.append(str(error))
    return found


def ready(folder: Path, split: str = "1,0,0", **more: Any) -> Path:
    prepare(make_shards(folder, **more), split, "VQASample", FIELD_MAP)
    return folder


def test_every_index_gives_the_same_rows(tmp_path: Path, home: Path) -> None:
    folder = ready(tmp_path / "wds")
    indexed = plain(opened(folder))
    assert len(indexed) == 12
    assert indexed[4][2] == "pretrain-1.tar: 00004"
    (folder / ".nv-meta" / "index.sqlite").unlink()
    by_offsets = plain(opened(folder))
    for file in folder.glob("*.idx"):
        file.unlink()
    before = sorted(folder.rglob("*"))
    walked = plain(opened(folder))
    cached = sorted((home / ".cache" / "tessera" / "shards").iterdir())
    again = plain(opened(folder))
    assert indexed == by_offsets == walked == again
    assert len(cached) == 4
    assert sorted(folder.rglob("*")) == before  # nothing is ever written into a dataset
    shutil.rmtree(folder / ".nv-meta")
    assert plain(opened(folder)) == indexed  # the parts say what they are
    assert plain(opened(folder / "pretrain-1.tar")) == indexed[3:6]


def test_images_stay_in_the_shard(tmp_path: Path) -> None:
    rows = opened(ready(tmp_path / "wds"))
    [image] = normalise(rows[5]).images
    assert isinstance(image, Slice)
    assert media.probe(image) == (48, 96)
    assert media.decode(image).shape == (48, 96, 3)


def test_parts_of_the_split(tmp_path: Path) -> None:
    folder = ready(tmp_path / "wds", "2,1,1")
    keys = [key for _, _, key in plain(opened(f"{folder}:all"))]
    assert [key for _, _, key in plain(opened(folder))] == keys[:6]
    assert [key for _, _, key in plain(opened(f"{folder}:val"))] == keys[6:9]
    assert [key for _, _, key in plain(opened(f"{folder}:val/test"))] == keys[6:]
    assert plain(opened(folder / ".nv-meta")) == plain(opened(folder))
    spec = parse_dataset_spec(str(folder))
    assert len(open_rows(spec, "val")) == 3
    with pytest.raises(UserError, match=r"no split part 'dev' \(has train: 2 shards, val: 1 shards, test: 1 shards\)"):
        opened(f"{folder}:dev")


def test_an_empty_part_is_said(tmp_path: Path) -> None:
    folder = ready(tmp_path / "wds")
    with pytest.raises(UserError, match=r"split part val holds no shards"):
        open_rows(parse_dataset_spec(str(folder)), "val")


def test_excluded_shards_and_samples(tmp_path: Path) -> None:
    folder = ready(tmp_path / "wds")
    whole = plain(opened(folder))
    split = folder / ".nv-meta" / "split.yaml"
    parts = {"train": ["pretrain-{0..3}.tar"], "val": [], "test": []}
    split.write_text(yaml.dump({"split_parts": parts, "exclude": ["pretrain-{1..2}.tar", "pretrain-3.tar/00010"]}))
    expected = [*whole[:3], whole[9], whole[11]]
    assert plain(opened(folder)) == expected
    (folder / ".nv-meta" / "index.sqlite").unlink()
    assert plain(opened(folder)) == expected


def test_older_folders_are_read(tmp_path: Path) -> None:
    """``.info.yaml``, a class instead of a sample type, an index without parts."""
    folder = ready(tmp_path / "wds")
    whole = plain(opened(folder))
    meta = folder / ".nv-meta"
    info = json.loads((meta / ".info.json").read_text())
    (meta / ".info.json").unlink()
    (meta / ".info.yaml").write_text(yaml.dump(info))
    old = {"__module__": "megatron.energon", "__class__": "VQAWebdataset", "field_map": FIELD_MAP}
    (meta / "dataset.yaml").write_text(yaml.dump(old))
    with sqlite3.connect(meta / "index.sqlite") as database:
        database.execute("DROP TABLE sample_parts")
    assert plain(opened(folder)) == whole


@pytest.mark.parametrize("index", ["sqlite", "idx", "none"])
def test_a_truncated_shard_costs_what_is_missing(tmp_path: Path, index: str) -> None:
    folder = ready(tmp_path / "wds")
    whole = plain(opened(folder))
    shard = folder / "pretrain-1.tar"
    with sqlite3.connect(folder / ".nv-meta" / "index.sqlite") as database:
        [(start,)] = database.execute("SELECT byte_offset FROM samples WHERE sample_key = '00004'").fetchall()
    with open(shard, "r+b") as file:
        file.truncate(start + 700)
    if index != "sqlite":
        (folder / ".nv-meta" / "index.sqlite").unlink()
    if index == "none":
        for file in folder.glob("*.idx"):
            file.unlink()
    found = plain(opened(folder))
    lost = [at for at, row in enumerate(found) if isinstance(row, str)]
    assert lost[0] == 4
    assert all("truncated" in found[at] for at in lost)
    assert [row for row in found if not isinstance(row, str)] == [*whole[:4], *whole[6:]]
    assert place_of(opened(folder), 4) == "pretrain-1.tar: 00004"


def test_a_missing_or_foreign_shard_is_listed(tmp_path: Path) -> None:
    folder = ready(tmp_path / "wds")
    (folder / "pretrain-0.tar").unlink()
    (folder / "pretrain-2.tar").write_bytes(b"\x1f\x8b" + bytes(range(256)) * 40)
    found = plain(opened(folder))
    assert all("shard not found" in row for row in found[:3])
    assert all(isinstance(row, str) for row in found[6:9])
    assert sum(not isinstance(row, str) for row in found) == 6
    (folder / ".nv-meta" / "index.sqlite").unlink()
    for file in folder.glob("*.idx"):
        file.unlink()
    found = plain(opened(folder))
    assert [row for row in found if isinstance(row, str)] == [
        f"shard not found: {folder / 'pretrain-0.tar'}",
        "not an uncompressed tar file",
    ]


def test_a_shard_written_anew_is_noticed(tmp_path: Path) -> None:
    folder = ready(tmp_path / "wds")
    write_tar(folder / "pretrain-0.tar", [("x", {"jpg": b"?" * 9000, "json": b"[]"})])
    assert all(isinstance(row, str) for row in plain(opened(folder))[:3])


def test_threads_read_the_same_index(tmp_path: Path) -> None:
    rows = opened(ready(tmp_path / "wds"))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda index: normalise(rows[index % 12]).answer, range(400)))
    assert found == [f"number {index % 12}" for index in range(400)]


def fields_of(folder: Path, parts: dict[str, bytes]) -> Fields:
    path = folder / "parts.bin"
    path.write_bytes(b"".join(parts.values()))
    places, at = [], 0
    for name, data in parts.items():
        places.append(Part(name, at, len(data)))
        at += len(data)
    return Fields(path, places)


def typed(kind: str, **field_map: str) -> dict[str, Any]:
    return {"sample_type": {"__module__": "m", "__class__": f"{kind}Sample"}, "field_map": field_map}


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest.mark.parametrize(
    ("config", "parts", "expected"),
    [
        (
            typed("VQA", image="jpg", context="txt", answers="json[a]"),
            {"txt": b"q", "json": b'{"a": ["x", "y"]}'},
            "<image>q|x",
        ),
        (
            typed("VQA", image="jpg", context="json[q]", answers="json[a]", answer_weights="json[w]"),
            {"json": as_json({"q": "q", "a": ["x", "y", "z"], "w": [0.2, 0.5, 0.5]})},
            "<image>q|y",
        ),
        (typed("Captioning", image="png,jpg", caption="txt"), {"txt": b"a cat"}, "<image>|a cat"),
        (typed("OCR", image="jpg", text="txt", words_boxes="npy"), {"txt": b"TEXT", "npy": b"?"}, "<image>|TEXT"),
        (
            typed("MultiChoiceVQA", image="jpg", context="json[q]", choices="json[c]", correct_choice_idx="json[i]"),
            {"json": as_json({"q": "which?", "c": ["red", "blue"], "i": 1})},
            "<image>which?\nA. red\nB. blue|B",
        ),
        (typed("ChatML", imgs="jpgs", conversation="json"), {"jpgs": None, "json": None}, "hi <image>|ho"),
        (
            {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"},
            {"json": as_json({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]})},
            "<image>u|a",
        ),
        (None, {"json": as_json({"width": 3, "url": "u"}), "txt": b"a dog"}, "<image>|a dog"),
    ],
)
def test_forms(tmp_path: Path, config: dict[str, Any] | None, parts: dict[str, Any], expected: str) -> None:
    [image] = pictures(tmp_path / "img", 1)
    held = {"jpg": image, **parts}
    if parts.get("json", b"") is None:
        talk = [{"role": "user", "content": "hi <image>"}, {"role": "assistant", "content": "ho"}]
        held = {"jpgs": pickle.dumps([image]), "json": as_json({"conversations": talk, "second_per_grid_ts": []})}
    sample = normalise(form_of(config, "dataset.yaml")(fields_of(tmp_path, held)))
    assert "|".join(message.content for message in sample.messages) == expected
    assert [media.load(picture) for picture in sample.images] == [image]


@pytest.mark.parametrize("part", ["videos", "mp4s"])
@pytest.mark.parametrize("spelling", [("from", "value", "human", "gpt"), ("role", "content", "user", "assistant")])
def test_videos_are_lists_of_frames_with_their_time(tmp_path: Path, part: str, spelling: tuple[str, ...]) -> None:
    who, what, user, assistant = spelling
    frames = pictures(tmp_path / "img", 4)
    talk = [{who: user, what: "<video>then <video>"}, {who: assistant, what: "a"}]
    parts = {
        part: pickle.dumps([frames[:2], frames[2:]]),
        "json": as_json({"conversations": talk, "second_per_grid_ts": [0.5, 0.25]}),
    }
    for config in (typed("ChatML", videos=part, conversation="json"), None):
        sample = normalise(form_of(config, "dataset.yaml")(fields_of(tmp_path, parts)))
        assert sample.videos == (tuple(frames[:2]), tuple(frames[2:]))
        assert sample.fps == (2.0, 4.0)


def test_a_document_with_images_in_place(tmp_path: Path) -> None:
    [image] = pictures(tmp_path / "img", 1)
    config = typed("Interleaved", sequence="pkl")
    fields = fields_of(tmp_path, {"pkl": pickle.dumps(["before ", image, " after"])})
    sample = normalise(form_of(config, "dataset.yaml")(fields))
    assert (sample.messages[0].content, sample.images) == ("before <image> after", (image,))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (typed("VQA", image="jpg"), "field_map lacks context, which VQASample needs"),
        (typed("VQA", image="jpg", context="txt", answer="txt"), "field_map has answer, but VQASample has"),
        (typed("VQA", image="jpg", context="json[0", answers="txt"), r"'json\[0' is no expression"),
        ({"sample_type": {"__class__": "VQASample"}}, "field_map must map image, context to parts"),
        (typed("Similarity", image="jpg"), "samples of type Similarity are not read"),
        ({"field_map": {}}, "neither sample_type nor __class__"),
        (typed("VQA") | {"sample_loader": "sample_loader.py:load"}, "is a program, which is not run"),
    ],
)
def test_descriptions_that_are_none(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        form_of(config, "dataset.yaml")


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("png", r"no part png \(has json, mp4, npy, bad.json\)"),
        ("json[5]", r"json\[5\] leads nowhere"),
        ("json[0][1]", r"json\[0\]\[1\] leads nowhere"),
        ("npy", "parts called npy are not read"),
        ("bad.json", "bad.json is not valid JSON"),
    ],
)
def test_expressions_that_lead_nowhere(tmp_path: Path, expression: str, reason: str) -> None:
    fields = fields_of(tmp_path, {"json": as_json([{"a": 1}]), "mp4": b"", "npy": b"", "bad.json": b"{"})
    with pytest.raises(BadRow, match=reason):
        fields.find(parse_expression(expression))
    assert fields.find(parse_expression("png,json[0][a]")) == 1


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/should-never-exist",)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (pickle.dumps([b"x", Evil()]), "asks for posix.system: refused"),
        (pickle.dumps(Path("x")), "asks for pathlib"),
        (b"cbuiltins\neval\n(S'1'\ntR.", "asks for builtins.eval: refused"),
        (pickle.dumps([b"x" * 100])[:-20], "cannot be unpickled"),
        (b"\x80\x04\x95garbage", "cannot be unpickled"),
        (b"", "cannot be unpickled"),
        (b"Pid\n.", "refers to something outside"),
    ],
)
def test_pickles_hold_plain_data_only(data: bytes, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        unpickle(data, "jpgs")
    assert not Path("/tmp/should-never-exist").exists()
    assert unpickle(pickle.dumps([[b"a", "b"], {"c": (1, 2.5, None)}]), "jpgs") == [[b"a", "b"], {"c": (1, 2.5, None)}]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a-{8..11}.tar", ["a-8.tar", "a-9.tar", "a-10.tar", "a-11.tar"]),
        ("a-{08..10}.tar", ["a-08.tar", "a-09.tar", "a-10.tar"]),
        ("{train,val}/{0..1}.tar", ["train/0.tar", "train/1.tar", "val/0.tar", "val/1.tar"]),
        ("x{a,b{1..2}}y", ["xay", "xb1y", "xb2y"]),
        ("{3..1}", ["3", "2", "1"]),
        ("plain.tar", ["plain.tar"]),
        ("odd{.tar", ["odd{.tar"]),
        ("{x}.tar", ["{x}.tar"]),
    ],
)
def test_braces(text: str, names: list[str]) -> None:
    assert list(expanded(text)) == names


def test_names_collapse_and_expand_again() -> None:
    names = [*(f"p-{i}.tar" for i in (0, 1, 10, 11, 2, 3, 5)), "q.tar", *(f"d{i}/s-{i}.tar" for i in range(3))]
    short = collapsed(names)
    assert [name for text in short for name in expanded(text)] == names
    assert short[:4] == ["p-{0..1}.tar", "p-{10..11}.tar", "p-{2..3}.tar", "p-5.tar"]
    assert sorted(["p-10.tar", "p-9.tar", "a"], key=natural) == ["a", "p-9.tar", "p-10.tar"]


def test_hidden_shards_are_none(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "wds", 2, 1)
    shutil.copytree(folder, folder / ".writing-more")
    assert len(opened(folder)) == 2
    assert list(prepare(folder, "1,0,0").counts) == ["pretrain-0.tar", "pretrain-1.tar"]


def test_a_folder_inside_a_prepared_one_is_its_shards(tmp_path: Path) -> None:
    for name, count in (("first", 2), ("second", 3)):
        make_shards(tmp_path / "wds" / name, count, 1)
    for path in (tmp_path / "wds" / "second").glob("*.tar"):  # keys must differ
        samples = [(f"s{path.stem}", {"txt": b"t"})]
        write_tar(path, samples)
    shutil.rmtree(tmp_path / "wds" / "first-images")
    shutil.rmtree(tmp_path / "wds" / "second-images")
    prepare(tmp_path / "wds", "2,3,0")
    assert len(opened(tmp_path / "wds")) == 2
    second = opened(tmp_path / "wds" / "second")
    assert [place_of(second, i) for i in range(3)] == [f"second/pretrain-{i}.tar: spretrain-{i}" for i in range(3)]
    assert second[0] == {"text": "t"}
