"""What preparing writes is what Energon 7 writes, and nothing where something is wrong."""

from __future__ import annotations

import json
import sqlite3
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from tessera.config.errors import UserError
from tessera.data.shards.prepare import definition, divided, parse_split, prepare
from tests.shards import FIELD_MAP, make_shards, write_tar

SPLIT = """split_parts:
  train:
  - pretrain-{0..2}.tar
  val:
  - pretrain-3.tar
  test: []
exclude: []
"""
DATASET = """sample_type:
  __module__: megatron.energon
  __class__: VQASample
field_map:
  image: jpg
  context: json[0][value]
  answers: json[1][value]
"""
COLUMNS = {
    "samples": ["tar_file_id", "sample_key", "sample_index", "byte_offset", "byte_size"],
    "sample_parts": ["tar_file_id", "sample_index", "part_name", "content_byte_offset", "content_byte_size"],
}
INDEXES = {"idx_samples_by_tar_and_idx", "idx_sample_parts_seq", "idx_sample_parts_full"}


def files(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*"))


def test_the_files(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "wds")
    found = prepare(folder, "3,1,0", "VQASample", FIELD_MAP)
    meta = folder / ".nv-meta"
    assert sorted(file.name for file in meta.iterdir()) == [
        ".info.json",
        "dataset.yaml",
        "index.sqlite",
        "index.uuid",
        "split.yaml",
    ]
    assert (meta / "split.yaml").read_text() == SPLIT
    assert (meta / "dataset.yaml").read_text() == DATASET
    counts = {f"pretrain-{n}.tar": 3 for n in range(4)}
    info = {"energon_version": "7.4.1", "shard_counts": counts}
    assert (meta / ".info.json").read_text() == json.dumps(info, indent=2)
    assert len((meta / "index.uuid").read_text()) == 36
    assert found.counts == counts
    database = sqlite3.connect(meta / "index.sqlite")
    for table, columns in COLUMNS.items():
        assert [row[1] for row in database.execute(f"PRAGMA table_info({table})")] == columns
    named = {row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'index'")}
    assert named >= INDEXES
    unique = [row for row in database.execute("PRAGMA index_list(samples)") if row[2]]
    assert len(unique) == 1  # sample_key
    for number in range(4):
        raw = (folder / f"pretrain-{number}.tar.idx").read_bytes()
        offsets = struct.unpack("<4Q", raw)
        query = "SELECT byte_offset, byte_size, sample_key FROM samples WHERE tar_file_id = ? ORDER BY sample_index"
        rows = database.execute(query, (number,)).fetchall()
        assert [row[0] for row in rows] == list(offsets[:-1])
        assert [row[0] + row[1] for row in rows] == list(offsets[1:])
        assert [row[2] for row in rows] == [f"{number * 3 + i:05d}" for i in range(3)]
    [(offset, size)] = database.execute(
        "SELECT content_byte_offset, content_byte_size FROM sample_parts "
        "WHERE tar_file_id = 2 AND sample_index = 1 AND part_name = 'json'"
    ).fetchall()
    data = (folder / "pretrain-2.tar").read_bytes()[offset : offset + size]
    assert json.loads(data)[1]["value"] == "number 7"


def test_shards_are_divided_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "wds", 11, 1)
    assert prepare(folder, "9, 1, 1").splits["train"][:4] == [
        "pretrain-0.tar",
        "pretrain-1.tar",
        "pretrain-10.tar",
        "pretrain-2.tar",
    ]
    assert "pretrain-{0..1}.tar\n  - pretrain-10.tar" in (folder / ".nv-meta" / "split.yaml").read_text()
    names = [str(n) for n in range(20)]
    shuffled = divided(names, parse_split("9,1,0"), "9,1,0", shuffle=True)
    assert sorted(shuffled["train"] + shuffled["val"], key=int) == names
    assert shuffled["train"] != names[:18]
    assert shuffled == divided(names, parse_split("9,1,0"), "9,1,0", shuffle=True)


@pytest.mark.parametrize(("text", "count"), [("7,2,1", 10), ("0.7,0.2,0.1", 10), ("1,1,1", 3), ("0.9, 0.05, 0.05", 40)])
def test_no_shard_is_lost_to_rounding(text: str, count: int) -> None:
    shares = parse_split(text)
    assert sum(shares) == Fraction(1)
    found = divided([str(n) for n in range(count)], shares, text)
    assert sum(len(names) for names in found.values()) == count
    assert [len(names) for names in found.values()] == [int(count * share) for share in shares]


@pytest.mark.parametrize("text", ["", "9,1", "9,1,x", "9,-1,0", "0,0,0", "9;1;0", "1/0,1,1", "nan,1,1"])
def test_a_split_that_is_none(tmp_path: Path, text: str) -> None:
    folder = make_shards(tmp_path / "wds", 2, 1)
    before = files(folder)
    with pytest.raises(UserError, match="expected three shares for train, val and test"):
        prepare(folder, text)
    assert files(folder) == before


def duplicate(folder: Path) -> str:
    write_tar(folder / "more.tar", [("y", {"json": b"[]"}), ("00004", {"json": b"[]"})])
    return r"key '00004' is in pretrain-1.tar and again in more.tar|in more.tar and again in pretrain-1.tar"


def duplicate_inside(folder: Path) -> str:
    write_tar(folder / "more.tar", [(key, {"json": b"[]"}) for key in "yzy"])
    return r"key 'y' is in more.tar and again in more.tar"


def truncated(folder: Path) -> str:
    shard = folder / "pretrain-1.tar"
    shard.write_bytes(shard.read_bytes()[:1100])
    return r"pretrain-1.tar: the shard ends at byte 1100, inside .*: truncated; write the shard again"


def empty(folder: Path) -> str:
    write_tar(folder / "more.tar", [])
    return r"more.tar: no samples in it"


def foreign(folder: Path) -> str:
    (folder / "more.tar").write_text("hello" * 300)
    return "more.tar: not an uncompressed tar file"


def gone(folder: Path) -> str:
    for shard in folder.glob("*.tar"):
        shard.unlink()
    return "no .tar file in it"


@pytest.mark.parametrize("damage", [duplicate, duplicate_inside, truncated, empty, foreign, gone])
def test_nothing_is_written_where_something_is_wrong(tmp_path: Path, damage: Any) -> None:
    folder = make_shards(tmp_path / "wds")
    reason = damage(folder)
    before = files(folder)
    with pytest.raises(UserError, match=reason):
        prepare(folder, "1,0,0")
    assert files(folder) == before


@pytest.mark.parametrize(
    ("sample_type", "field_map", "reason"),
    [
        ("VQASample", {"image": "png", "context": "json[0][value]"}, r"does not fit the first sample .*no part png"),
        ("VQASample", {"image": "jpg", "context": "json[7][value]"}, r"json\[7\]\[value\] leads nowhere"),
        ("VQASample", {"image": "jpg"}, "lacks context"),
        ("VQASample", None, "field_map lacks image"),
        ("Sample", {}, "unknown"),
        (None, {"image": "jpg"}, "--field_map: needs --sample_type"),
        ("CrudeWebdataset", {"image": "jpg"}, "have none"),
    ],
)
def test_descriptions_that_do_not_fit(tmp_path: Path, sample_type: Any, field_map: Any, reason: str) -> None:
    folder = make_shards(tmp_path / "wds", 2, 1)
    before = files(folder)
    with pytest.raises(UserError, match=reason):
        prepare(folder, "1,0,0", sample_type, field_map)
    assert files(folder) == before


def test_definitions() -> None:
    assert definition(None, None) is None
    assert definition("CrudeWebdataset", None) == {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    chat = definition("ChatMLSample", {"imgs": "jpgs", "videos": "videos", "conversation": "json"})
    assert chat is not None
    assert (chat["__module__"], chat["__class__"]) == ("megatron_patch.data.multimodal_dataset", "ChatMLWebdataset")


def test_once_and_again(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "wds", 4, 1)
    prepare(folder, "1,0,0")
    (folder / ".nv-meta" / "sample_loader.py").write_text("mine")
    with pytest.raises(UserError, match="prepared already; --exist_ok true"):
        prepare(folder, "1,1,0")
    prepare(folder, "1,1,0", "VQASample", FIELD_MAP, exist_ok=True)
    assert "val:\n  - pretrain-{2..3}.tar" in (folder / ".nv-meta" / "split.yaml").read_text()
    assert (folder / ".nv-meta" / "sample_loader.py").read_text() == "mine"
    assert [file for file in files(folder) if "writing" in file or "old" in file] == []
    with pytest.raises(UserError, match=r"1 shard cannot be divided so, train would be empty"):
        prepare(make_shards(tmp_path / "one", 2, 2), "9,1,0")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_shards(tmp_path / "wds", 2, 1)
    before = files(folder)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tessera.data.shards.prepare._write", full)
    with pytest.raises(UserError, match="writing failed: No space left on device"):
        prepare(folder, "1,0,0")
    assert files(folder) == before
