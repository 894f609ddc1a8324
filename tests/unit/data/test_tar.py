"""Walking over a tar file finds what the standard library finds, and says where a damaged one ends."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tessera.data.sample import BadRow
from tessera.data.shards.tar import Place, Truncated, members, sample_at, samples, split_name
from tests.shards import write_tar

ODD = [
    ("a", {"jpg": b"x" * 700, "json": b"{}"}),
    ("deep/er/b", {"seg.png": b"", "txt": b"t" * 512}),
    ("long/" + "n" * 180, {"json": b"[]"}),
    ("ünïcode", {"txt": "ä".encode()}),
]


@contextmanager
def descriptor(path: Path) -> Iterator[int]:
    opened = os.open(path, os.O_RDONLY)
    try:
        yield opened
    finally:
        os.close(opened)


def walk(path: Path) -> list[Place]:
    with descriptor(path) as opened:
        return list(samples(opened))


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_members_are_those_of_the_standard_library(tmp_path: Path, form: int) -> None:
    odd = [entry for entry in ODD if form != tarfile.USTAR_FORMAT or len(entry[0]) < 99]
    path = write_tar(tmp_path / "a.tar", odd, format=form)
    with tarfile.open(path, "a", format=form) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        tar.addfile(tarfile.TarInfo("no-part"))
        tar.addfile(tarfile.TarInfo("__hidden__/x.json"))
        tar.addfile(tarfile.TarInfo("z.txt"))
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset, m.offset_data, m.size) for m in tar if m.isreg()]
    with descriptor(path) as opened:
        assert [tuple(member) for member in members(opened)] == expected
    found = walk(path)
    assert [place.key for place in found] == [*(key for key, _ in odd), "z"]
    assert [[part.name for part in place.parts] for place in found] == [*(list(parts) for _, parts in odd), ["txt"]]
    with descriptor(path) as opened:
        assert [sample_at(opened, place.start, place.end).parts for place in found] == [p.parts for p in found]


def test_cut_anywhere_the_whole_samples_before_it_are_found(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(str(i), {"jpg": b"i" * 600, "json": b"j"}) for i in range(4)])
    whole, data = walk(path), path.read_bytes()
    for cut in [*range(0, len(data), 100), 511, 512, 513]:
        path.write_bytes(data[:cut])
        found: list[Place] = []
        broken = False
        with descriptor(path) as opened:
            try:
                for place in samples(opened):
                    found.append(place)
            except Truncated:
                broken = True
        complete = [place for place in whole if place.parts[-1].offset + place.parts[-1].size <= cut]
        assert found[: len(complete)] == complete
        # What else is found is the first part of the sample that the cut goes through, where the cut is behind it:
        # nobody can tell.
        assert [len(place.parts) for place in found[len(complete) :]] in ([], [1])
        assert broken == (cut <= whole[-1].end)


@pytest.mark.parametrize("data", [b"", b"\x1f\x8b" + b"z" * 2000, b"text " * 500])
def test_what_is_no_tar_is_said(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    with pytest.raises(Truncated, match="empty|not an uncompressed tar file"):
        walk(path)


def test_an_index_of_another_file_is_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a", {"jpg": b"x" * 600}), ("b", {"jpg": b"y"})])
    with descriptor(path) as opened:
        with pytest.raises(BadRow, match="no header at byte 512"):
            sample_at(opened, 512, 1536)
        with pytest.raises(BadRow, match="ends at byte 10240, before this sample"):
            sample_at(opened, 10240, 10752)
        with pytest.raises(BadRow, match="another version"):
            sample_at(opened, 2560, 3072)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b.c/12.left.jpg", ("a/b.c/12", "left.jpg")),
        ("12.JPG", ("12", "JPG")),
        ("noparts", None),
        (".hidden", None),
        ("__MACOSX__/a.jpg", None),
    ],
)
def test_keys_end_at_the_first_dot_of_the_last_name(name: str, expected: tuple[str, str] | None) -> None:
    assert split_name(name) == expected
