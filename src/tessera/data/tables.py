"""Rows on disk, one at a time: every file format behind ``len(rows)`` and ``rows[i]``.

Training visits rows in random order, many times, from several threads; a list of parsed rows would cost gigabytes and
a copy per process. So a JSON-lines file is a memory map plus one offset per line, Arrow files are memory-mapped as they
are, parquet is read row group by row group, and only small formats (json, csv) are held in memory.
"""

from __future__ import annotations

import json
import mmap
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from tessera.config.errors import UserError
from tessera.data.sample import BadRow

_CHUNK = 1 << 26
_PARQUET_IN_MEMORY = 1 << 29
_ROW_GROUPS_HELD = 8


class Rows(Protocol):
    """A dataset: random access to rows as dictionaries. ``base`` is where its relative image paths may start."""

    @property
    def name(self) -> str: ...

    @property
    def base(self) -> Path | None: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row ``index``; BadRow if this one cannot be read."""
        ...


@runtime_checkable
class Placed(Protocol):
    """Rows that can say where one of them lies, in words: an archive and a key in it."""

    def place(self, index: int) -> str:
        """The place of row ``index``, empty if there is nothing to say."""
        ...


def place_of(rows: Rows, index: int) -> str:
    """Where row ``index`` lies, beyond its number; empty where the number says it all."""
    return rows.place(index) if isinstance(rows, Placed) else ""


class Lines:
    """Lines of a text file that are not blank: JSON objects, or (``text``) documents of one line."""

    def __init__(self, path: Path, *, text: bool = False) -> None:
        self.name, self.base, self._text = str(path), path.parent, text
        with open(path, "rb") as file:
            empty = file.seek(0, 2) == 0
            self._data: Any = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._starts, self._ends = _line_bounds(self._data)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        raw = self._data[self._starts[index] : self._ends[index]]
        if self._text:
            return {"text": raw.decode("utf-8", errors="replace").rstrip("\r")}
        try:
            row = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise BadRow(f"a line must hold a JSON object, not {type(row).__name__}")
        return row


class Listed:
    """Rows of a json file that holds one list of objects."""

    def __init__(self, path: Path) -> None:
        self.name, self.base = str(path), path.parent
        try:
            found = json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise UserError(f"--dataset {path}: not valid JSON ({error})") from None
        if isinstance(found, dict) and isinstance(found.get("data"), list):
            found = found["data"]
        if not isinstance(found, list):
            raise UserError(f"--dataset {path}: a .json file must hold a list of objects (one object a line is .jsonl)")
        self._rows = found

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        if not isinstance(row, dict):
            raise BadRow(f"a row must be an object, not {type(row).__name__}")
        return row


class Table:
    """Rows of an Arrow table (csv, HF ``datasets``), usually memory-mapped."""

    def __init__(self, name: str, base: Path | None, table: Any) -> None:
        self.name, self.base, self._table = name, base, table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self._table.slice(index, 1).to_pylist()[0]
        return row


class Parquet:
    """Rows of a parquet file, of which a few decoded row groups are held at a time."""

    def __init__(self, path: Path) -> None:
        import pyarrow
        from pyarrow import parquet

        self.name, self.base = str(path), path.parent
        try:
            self._file = parquet.ParquetFile(path, memory_map=True)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UserError(f"--dataset {path}: not a parquet file ({error})") from None
        groups = [self._file.metadata.row_group(i) for i in range(self._file.num_row_groups)]
        self._ends = np.cumsum([group.num_rows for group in groups]).tolist()
        small = sum(group.total_byte_size for group in groups) <= _PARQUET_IN_MEMORY
        self._held_at_most = len(groups) if small else _ROW_GROUPS_HELD
        self._groups: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        at = bisect_right(self._ends, index)
        with self._lock:
            group = self._groups.pop(at, None)
            if group is None:
                group = self._file.read_row_group(at, use_threads=False)
            self._groups[at] = group
            if len(self._groups) > self._held_at_most:
                self._groups.popitem(last=False)
        row: dict[str, Any] = group.slice(index - (self._ends[at - 1] if at else 0), 1).to_pylist()[0]
        return row


class Joined:
    """Several sources of rows, one behind the other, under one name."""

    def __init__(self, name: str, parts: Sequence[Rows]) -> None:
        self.name, self.base, self._parts = name, parts[0].base, list(parts)
        self._ends = np.cumsum([len(part) for part in parts]).tolist()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        rows, inside = self._part(index)
        return rows[inside]

    def place(self, index: int) -> str:
        """Where the part's row lies."""
        return place_of(*self._part(index))

    def _part(self, index: int) -> tuple[Rows, int]:
        at = bisect_right(self._ends, index)
        return self._parts[at], index - (self._ends[at - 1] if at else 0)


def open_file(path: Path) -> Rows:
    """The rows of one file, by its ending."""
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return Lines(path)
    if suffix == ".json":
        return Lines(path) if _looks_like_lines(path) else Listed(path)
    if suffix == ".txt":
        return Lines(path, text=True)
    if suffix == ".csv":
        return _csv(path)
    if suffix == ".parquet":
        return Parquet(path)
    raise UserError(f"--dataset {path}: unknown kind of file (known: .jsonl .json .csv .parquet .txt, or a directory)")


def open_saved(directory: Path) -> Rows:
    """A dataset that HF ``datasets`` wrote with ``save_to_disk``."""
    import pyarrow

    state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
    tables = []
    for entry in state.get("_data_files", []):
        try:
            with pyarrow.memory_map(str(directory / entry["filename"])) as source:
                tables.append(pyarrow.ipc.open_stream(source).read_all())
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UserError(f"--dataset {directory}: {entry['filename']} cannot be read ({error})") from None
    if not tables:
        raise UserError(f"--dataset {directory}: state.json lists no data files")
    return Table(str(directory), directory, pyarrow.concat_tables(tables))


def _line_bounds(data: Any) -> tuple[np.ndarray, np.ndarray]:
    """[start, end) of every line of ``data`` that is not blank, as int64 arrays."""
    size = len(data)
    if not size:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    view = np.frombuffer(data, dtype=np.uint8)
    breaks = [np.flatnonzero(view[at : at + _CHUNK] == 10) + at for at in range(0, size, _CHUNK)]
    ends = np.concatenate([*breaks, [size]]).astype(np.int64)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if data[:3] == b"\xef\xbb\xbf":
        starts[0] = 3
    kept = ends > starts
    # Only a line that begins with white space can be blank; looking at those alone keeps this linear in lines.
    first = view[np.minimum(starts, size - 1)]
    for line in np.flatnonzero(kept & np.isin(first, list(b" \t\r\v\f"))):
        kept[line] = bool(bytes(data[starts[line] : ends[line]]).strip())
    del view
    return starts[kept], ends[kept]


def _looks_like_lines(path: Path) -> bool:
    """Whether a .json file holds one object a line, as many do."""
    with open(path, "rb") as file:
        first, rest = file.readline(), file.read(1)
    if not first.strip().startswith(b"{") or not rest:
        return False
    try:
        json.loads(first)
    except ValueError:
        return False
    return True


def _csv(path: Path) -> Rows:
    """A csv file with a header; every cell is text."""
    import csv

    import pyarrow
    from pyarrow import csv as arrow_csv

    with open(path, encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader(file), None)
    if not header:
        raise UserError(f"--dataset {path}: the file is empty")
    try:
        table = arrow_csv.read_csv(
            path,
            parse_options=arrow_csv.ParseOptions(newlines_in_values=True),
            convert_options=arrow_csv.ConvertOptions(
                column_types={name: pyarrow.string() for name in header}, strings_can_be_null=False
            ),
        )
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"--dataset {path}: not a csv file with a header ({error})") from None
    return Table(str(path), path.parent, table)
