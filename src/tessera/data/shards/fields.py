"""What a part of a sample holds, and the expressions by which a ``field_map`` names it.

    jpg                          the part jpg
    jpg,png                      the part jpg, else the part png
    json[conversations][0]       inside the part json: the key conversations, its first entry

How a part is read is decided by the end of its name: text and JSON are parsed, images stay where they lie (a
:class:`~tessera.data.sample.Slice`), and lists of images (``jpgs``) or of videos as lists of frames (``videos``,
``mp4s``) are unpickled. A pickle is a program; the one that runs here may build lists, dictionaries, text, bytes and
numbers. Whatever else it asks for is refused by its name, and nothing is imported or called for it.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tessera.config.errors import UserError
from tessera.data import media
from tessera.data.sample import FRAME_SUFFIXES, BadRow, Slice
from tessera.data.shards.tar import Part

IMAGES = (*(suffix[1:] for suffix in FRAME_SUFFIXES), "img", "image", "ppm", "pgm", "pbm", "jp2")
TEXTS = ("txt", "text", "transcript", "caption")
NUMBERS = ("cls", "cls2", "class", "count", "index", "inx", "id")
JSONS = ("json", "jsn")
PICKLES = ("jpgs", "imgs", "images", "videos", "mp4s", "pkl", "pickle", "pyd")
FILMS = ("mp4", "avi", "mov", "mkv", "webm", "ogv", "mpeg", "mpg", "h264", "mjpeg")
_EXPRESSION = re.compile(r"^([^\[\]]+)((?:\[[^\[\]]+\])*)$")
_ABSENT = object()

Access = tuple[str, ...]
"""A part's name and the keys to follow inside of it."""


class Fields:
    """The parts of one sample, read when they are asked for."""

    def __init__(self, path: Path, parts: Iterable[Part]) -> None:
        self._slices = {part.name: Slice(str(path), part.offset, part.size, part.name) for part in parts}
        self.names = list(self._slices)
        self._read: dict[str, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._slices

    def get(self, name: str) -> Any:
        """The value of part ``name``; BadRow if it is missing or cannot be read."""
        if name not in self._slices:
            raise BadRow(f"no part {name} (has {', '.join(self.names) or 'none'})")
        if name not in self._read:
            self._read[name] = value_of(self._slices[name])
        return self._read[name]

    def find(self, options: Sequence[Access]) -> Any:
        """The value of the first of ``options`` that leads somewhere."""
        for access in options[:-1]:
            if access[0] in self and (found := _inside(self.get(access[0]), access[1:])) is not _ABSENT:
                return found
        access = options[-1]
        found = _inside(self.get(access[0]), access[1:])
        if found is _ABSENT:
            raise BadRow(f"{access[0]}{''.join(f'[{key}]' for key in access[1:])} leads nowhere in this sample")
        return found


def parse_expression(text: str) -> tuple[Access, ...]:
    """The alternatives of a ``field_map`` expression; UserError if it is none."""
    options = []
    for option in text.split(","):
        found = _EXPRESSION.match(option.strip())
        if found is None:
            raise UserError(f"field_map: {text!r} is no expression (write jpg, json[0][value] or jpg,png)")
        options.append((found[1], *re.findall(r"\[([^\[\]]+)\]", found[2])))
    return tuple(options)


def value_of(part: Slice) -> Any:
    """What ``part`` holds, by the end of its name."""
    kind = part.name.rpartition(".")[2].lower()
    if kind in IMAGES or kind in FILMS:
        return part
    if kind in JSONS:
        try:
            return json.loads(media.load(part))
        except (ValueError, RecursionError) as error:
            raise BadRow(f"{part.name} is not valid JSON: {error}") from None
    if kind in TEXTS or kind in NUMBERS:
        try:
            text = media.load(part).decode("utf-8")
            return int(text) if kind in NUMBERS else text
        except ValueError as error:
            raise BadRow(f"{part.name} is not {'a number' if kind in NUMBERS else 'text'}: {error}") from None
    if kind in PICKLES:
        return unpickle(media.load(part), part.name)
    raise BadRow(f"parts called {part.name} are not read")


def is_film(value: Any) -> bool:
    """Whether ``value`` is a video file, rather than a list of frames."""
    return isinstance(value, Slice) and value.name.rpartition(".")[2].lower() in FILMS


def unpickle(data: bytes, name: str) -> Any:
    """Plain data of a pickle called ``name``; BadRow names whatever else it asks for."""
    try:
        return _Plain(io.BytesIO(data), name).load()
    except BadRow:
        raise
    except Exception as error:  # noqa: BLE001 - a damaged pickle raises whatever its opcodes run into
        raise BadRow(f"{name} cannot be unpickled: {type(error).__name__}: {error}") from None


class _Plain(pickle.Unpickler):
    """Unpickles what needs no import: every class or function would come through :meth:`find_class`."""

    def __init__(self, file: io.BytesIO, name: str) -> None:
        super().__init__(file)
        self._name = name

    def find_class(self, module: str, name: str) -> Any:
        raise BadRow(f"{self._name} is a pickle that asks for {module}.{name}: refused, plain lists and bytes only")

    def persistent_load(self, pid: Any) -> Any:
        raise BadRow(f"{self._name} is a pickle that refers to something outside: refused")


def _inside(value: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.lstrip("-").isdigit() and -len(value) <= int(key) < len(value):
            value = value[int(key)]
        else:
            return _ABSENT
    return value
