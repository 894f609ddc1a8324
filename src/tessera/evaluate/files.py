"""Benchmarks as their authors publish them: tsv, parquet, jsonl, json, and what their columns are called there.

Whatever the file, a row becomes a dictionary and :class:`Fields` finds in it what a benchmark needs by *meaning*: the
question may be ``question`` or ``query``, the picture a struct of bytes, base64 text, a path, or the index of another
row that holds it. Nothing is decoded, and no picture is read, before its row is asked for: a tsv is a memory map and
the places of its rows, parquet is read group by group.

A column that no row can do without is looked for once, in front: one error names the file and the column. What is
wrong with a single row (picture missing, answer empty) is told by that row alone, as ``Item.problem``.
"""

from __future__ import annotations

import ast
import base64
import binascii
import json
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from tessera.config.errors import UserError
from tessera.data.sample import BadRow, ImageRef
from tessera.data.tables import Joined, Parquet, Rows, open_file
from tessera.evaluate.item import Item

SUFFIXES = (".tsv", ".parquet", ".jsonl", ".json", ".csv")
_POINTER = 64
"""A text in an ``image`` column of at most this length is the index of the row that holds the picture."""
_IMAGE_SUFFIXES = ("", ".jpg", ".png", ".jpeg", ".webp")

Row = dict[str, Any]


class Tsv:
    """Rows of a tab-separated file with a header, as spreadsheets and pandas write it; every cell is text.

    A cell that begins with a quotation mark ends with the next single one and may hold tabs and line breaks.
    """

    def __init__(self, path: Path) -> None:
        self.name, self.base = str(path), path.parent
        with open(path, "rb") as file:
            if file.seek(0, 2) == 0:
                raise UserError(f"{path}: the file is empty")
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        starts, ends = _row_bounds(self._data)
        self.columns = self._cells(starts[0], ends[0])
        self._starts, self._ends = starts[1:], ends[1:]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Row:
        cells = self._cells(self._starts[index], self._ends[index])
        if len(cells) != len(self.columns):
            raise BadRow(f"has {len(cells)} cells, the header {len(self.columns)}")
        return {name: cell for name, cell in zip(self.columns, cells, strict=True) if cell != ""}

    def cell(self, index: int, column: str) -> str | None:
        """One cell of a row, without taking the row apart behind it; None if it is empty."""
        start, end = int(self._starts[index]), int(self._ends[index])
        if self._data.find(b'"', start, end) >= 0:
            value: str | None = self[index].get(column)
            return value
        for _ in range(self.columns.index(column)):
            start = self._data.find(b"\t", start, end) + 1
            if start == 0:
                return None
        stop = self._data.find(b"\t", start, end)
        return (
            bytes(self._data[start : end if stop < 0 else stop]).decode("utf-8", errors="replace").rstrip("\r") or None
        )

    def _cells(self, start: int, end: int) -> list[str]:
        raw = self._data[start:end].removeprefix(b"\xef\xbb\xbf").rstrip(b"\r")
        if b'"' not in raw:
            return raw.decode("utf-8", errors="replace").split("\t")
        return list(_quoted(raw.decode("utf-8", errors="replace")))


def _quoted(text: str) -> Iterator[str]:
    """The cells of a row some of which are in quotation marks."""
    at = 0
    while True:
        if text[at : at + 1] == '"':
            parts, at = [], at + 1
            while True:
                mark = text.find('"', at)
                if mark < 0:  # never closed: the rest of the row is the cell
                    parts.append(text[at:])
                    yield "".join(parts)
                    return
                parts.append(text[at:mark])
                at = mark + 1
                if text[at : at + 1] != '"':
                    break
                parts.append('"')
                at += 1
            tab = text.find("\t", at)
            yield "".join(parts) + text[at : tab if tab >= 0 else None]
        else:
            tab = text.find("\t", at)
            yield text[at : tab if tab >= 0 else None]
        if tab < 0:
            return
        at = tab + 1


def _row_bounds(data: Any) -> tuple[np.ndarray, np.ndarray]:
    """[start, end) of every row, as int64; a line break inside quotation marks ends no row."""
    starts, ends = [], []
    start = line = 0
    size, open_cell = len(data), False
    while line < size:
        stop = data.find(b"\n", line)
        stop = size if stop < 0 else stop
        mark = data.find(b'"', line, stop)
        if mark >= 0 or open_cell:
            open_cell = _open_at_end(data[line:stop], open_cell)
        if not open_cell or stop == size:
            if data[start:stop].strip():
                starts.append(start)
                ends.append(stop)
            start = stop + 1
        line = stop + 1
    return np.array(starts, np.int64), np.array(ends, np.int64)


def _open_at_end(line: bytes, inside: bool) -> bool:
    """Whether a quoted cell is still open behind ``line``, of which the beginning is ``inside`` one."""
    at = 0
    while True:
        if inside:
            mark = line.find(b'"', at)
            if mark < 0:
                return True
            at = mark + 1
            if line[at : at + 1] == b'"':
                at += 1
                continue
            inside = False
        elif line[at : at + 1] == b'"':
            inside, at = True, at + 1
            continue
        tab = line.find(b"\t", at)
        if tab < 0:
            return False
        at = tab + 1


class Given:
    """Rows that are in memory already; ``base`` is where their pictures may lie."""

    def __init__(self, name: str, base: Path, rows: Sequence[Row]) -> None:
        self.name, self.base, self._rows = name, base, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]


def open_rows(path: Path, split: str = "", *, nested: bool = False) -> Rows:
    """The rows of a file, or of the files of a directory (of those whose names begin with ``split``, if any do).

    ``split`` may name several beginnings, best first: ``test|val``. With ``nested`` files of several folders belong
    together. UserError if there is nothing, or something to choose from.
    """
    if path.is_dir():
        files = _files(path, split.split("|"), nested)
        parts = [_open(file) for file in files]
        return parts[0] if len(parts) == 1 else Joined(str(path), parts)
    if not path.is_file():
        raise UserError(f"{path}: no such file or directory")
    return _open(path)


def _files(directory: Path, splits: Sequence[str], nested: bool) -> list[Path]:
    every = [file for file in sorted(directory.rglob("*")) if file.is_file() and file.suffix.lower() in SUFFIXES]
    found = next((part for split in splits if (part := [file for file in every if file.name.startswith(split)])), every)
    continued = {file.suffix.lower() for file in found} == {".parquet"}
    if not found:
        raise UserError(f"{directory}: holds no benchmark (no {' '.join(SUFFIXES)} file)")
    if len(found) > 1 and not (continued and (nested or len({file.parent for file in found}) == 1)):
        names = ", ".join(str(file.relative_to(directory)) for file in found[:5])
        raise UserError(f"{directory}: holds several files ({names}): name the one that is meant")
    return found


def _open(file: Path) -> Rows:
    try:
        return Tsv(file) if file.suffix.lower() == ".tsv" else open_file(file)
    except UserError as error:
        raise UserError(str(error).removeprefix("--dataset "), exit_code=error.exit_code) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


def read_json(path: Path) -> Any:
    """What a json file holds, or the list of what a jsonl file's lines hold."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from None


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a benchmark's files keep what: by meaning, the names of the columns that may hold it, best first.

    ``needed`` are the meanings without which the file cannot be this benchmark. ``{meaning: ()}`` never matches.
    """

    columns: Mapping[str, tuple[str, ...]]
    needed: tuple[str, ...] = ("question", "answer", "image")

    def check(self, rows: Rows) -> None:
        """UserError naming the first column that ``rows`` lack."""
        if not len(rows):
            raise UserError(f"{rows.name}: holds no rows")
        known = column_names(rows)
        for meaning in self.needed:
            names = self.columns[meaning]
            if not any(name in known for name in names):
                raise UserError(
                    f"{rows.name}: no column {' or '.join(names)} with the {meaning} (it has {', '.join(known)}); "
                    "is it another benchmark's file?"
                )


def column_names(rows: Rows) -> list[str]:
    """What the columns are called; in files that have none, what the first readable row has."""
    if isinstance(rows, Tsv):
        return rows.columns
    for index in range(min(len(rows), 100)):
        try:
            return list(rows[index])
        except BadRow:
            continue
    raise UserError(f"{rows.name}: none of its rows can be read")


class Folder:
    """Finds pictures by the names that a file gives them: as they are, beside the file, or in a folder beside it."""

    def __init__(self, base: Path | None) -> None:
        self._base = base or Path()

    @cached_property
    def _places(self) -> list[Path]:
        below = sorted(entry for entry in self._base.iterdir() if entry.is_dir()) if self._base.is_dir() else []
        first = [place for place in below if place.name == "images"]
        return [self._base, *first, *(place for place in below if place.name != "images")]

    def find(self, name: str) -> str:
        """The path of picture ``name``, which may lack its ending or come with folders of another machine.

        BadRow if there is none.
        """
        for called in dict.fromkeys((name, os.path.basename(name))):
            for place in self._places:
                for suffix in _IMAGE_SUFFIXES:
                    path = os.path.join(place, called + suffix)
                    if os.path.isfile(path):
                        return path
        raise BadRow(f"no image {name} in {self._base} or a folder in it")


def listed(value: Any) -> list[Any]:
    """A cell that holds a list, or the text of one, as a list; anything else as a list of itself."""
    if isinstance(value, str) and len(value) > 1 and value[0] == "[" and value[-1] == "]":
        for parse in (json.loads, ast.literal_eval):
            try:
                found = parse(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
            return list(found) if isinstance(found, list | tuple) else [value]
    if isinstance(value, list | tuple):
        return list(value)
    return [] if value is None else [value]


class Fields:
    """One row by meaning. A property that cannot be given raises BadRow with the reason."""

    def __init__(self, row: Row, index: int, source: Source, turn: int = 0) -> None:
        self.row, self.index, self.turn, self._source = row, index, turn, source

    def get(self, meaning: str, default: Any = None) -> Any:
        """The first column of ``meaning`` that holds something."""
        for name in self._source.layout.columns.get(meaning, (meaning,)):
            value = self.row.get(name)
            if value is not None and value != "":
                return value
        return default

    def lacks(self, meaning: str) -> bool:
        """Whether something is missing here without which the file would not be this benchmark."""
        return meaning in self._source.layout.needed and self.get(meaning) is None

    def with_column(self, name: str, value: Any) -> Fields:
        """The same row with another value in column ``name``."""
        return Fields({**self.row, name: value}, self.index, self._source, self.turn)

    @property
    def id(self) -> str:
        """What the file calls the row, else its number."""
        return str(self.get("id", self.index))

    @property
    def images(self) -> list[ImageRef]:
        """The row's pictures, as paths or bytes; BadRow if one is missing."""
        found = [image for name in self._image_columns for image in self._column(name)]
        if not found:
            raise BadRow("no image")
        return found

    @property
    def _image_columns(self) -> list[str]:
        """The first image column that holds something, with its numbered sisters (``image_1``, ``image_2`` ...)."""
        names = self._source.layout.columns["image"]
        for name in names:
            if self.row.get(name) not in (None, "", []):
                stem = name.removesuffix("1")
                if stem == name:
                    return [name]
                sisters = [f"{stem}{number}" for number in range(1, 10)]
                return [sister for sister in sisters if self.row.get(sister) not in (None, "", [])]
        return []

    def _column(self, name: str) -> list[ImageRef]:
        return [self._image(value) for value in listed(self.row[name])]

    def _image(self, value: Any) -> ImageRef:
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return value
        if isinstance(value, int):
            value = str(value)
        if not isinstance(value, str) or not value:
            raise BadRow("no image")
        if value.startswith("data:"):
            return value
        if isinstance(self._source.rows, Tsv) and len(value) <= _POINTER:
            held = self._source.held(value)
            if held is not None:
                return held
        if len(value) > 1024:
            try:
                return base64.b64decode(value, validate=True)
            except binascii.Error:
                raise BadRow("the image is neither a path nor base64") from None
        return self._source.folder.find(value)


class Source:
    """Rows, what their columns mean, and where their pictures lie."""

    def __init__(self, rows: Rows, layout: Layout) -> None:
        layout.check(rows)
        self.rows, self.layout = rows, layout
        self.folder = Folder(rows.base)

    @cached_property
    def _by_index(self) -> dict[str, int]:
        places: dict[str, int] = {}
        for at, name in enumerate(values_of(self.rows, "index")):
            places.setdefault(str(name), at)
        return places

    def held(self, index: str) -> bytes | None:
        """The picture in the row called ``index``; None if there is no such row."""
        at = self._by_index.get(index)
        value = None if at is None else self.rows[at].get("image")
        if not isinstance(value, str) or len(value) <= _POINTER:
            return None
        try:
            return base64.b64decode(value, validate=True)
        except binascii.Error:
            raise BadRow(f"the image of row {index} is not base64") from None


class Items(Sequence[Item]):
    """The items that ``make`` makes of the rows ``kept`` of a source, each when it is asked for.

    A row that asks several questions is kept as often; ``turns`` then says which of them is meant (``Fields.turn``).
    """

    def __init__(
        self,
        source: Source,
        make: Callable[[Fields], Item],
        kept: Sequence[int] | None = None,
        turns: Sequence[int] | None = None,
    ) -> None:
        self._source, self._make, self._turns = source, make, turns
        self._kept = range(len(source.rows)) if kept is None else kept

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        if isinstance(index, slice):
            turns = None if self._turns is None else self._turns[index]
            return Items(self._source, self._make, self._kept[index], turns)
        at = self._kept[index]
        try:
            row = self._source.rows[at]
        except BadRow as error:
            return Item(str(at), {}, None, {}, str(error))
        return self._make(Fields(row, at, self._source, self._turns[index] if self._turns else 0))


def in_split(source: Source, wanted: Sequence[str], meaning: str = "split") -> Sequence[int] | None:
    """The rows of the first of the splits ``wanted`` that occurs in the column; None (all) if there is none."""
    names = source.layout.columns.get(meaning, (meaning,))
    name = next((name for name in names if name in column_names(source.rows)), None)
    if name is None:
        return None
    found = values_of(source.rows, name)
    for split in wanted:
        kept = [at for at, value in enumerate(found) if value == split]
        if kept:
            return kept
    return None


def values_of(rows: Rows, column: str) -> list[Any]:
    """One column of all rows, without reading the others where the format allows it."""
    if isinstance(rows, Parquet):
        from pyarrow import parquet

        found: list[Any] = parquet.read_table(rows.name, columns=[column]).column(column).to_pylist()
        return found
    values = []
    for at in range(len(rows)):
        try:
            values.append(rows.cell(at, column) if isinstance(rows, Tsv) else rows[at].get(column))
        except BadRow:
            values.append(None)
    return values
