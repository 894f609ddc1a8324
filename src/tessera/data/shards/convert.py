"""From the layouts in which people download data to shards.

| kind | there | a sample |
|---|---|---|
| ``llava`` | ``blip_laion_cc_sbu_558k.json`` and the images it names | ``{id}.jpg``, ``{id}.json`` = the conversation |
| ``sharegpt`` | ``dataset.json``: conversations, images, videos as folders of frames | ``jpgs``, ``videos``, ``json`` |
| ``messages`` | any rows that ``--dataset`` reads | ``jpgs``, ``videos``, ``json`` |

``jpgs`` is a pickled list of image files, ``videos`` one of lists of frames; the JSON holds the conversation and
``second_per_grid_ts``, the seconds from one frame of each video to the next. A video ``clip.mp4`` is the folder
``clip`` of its frames, in the order of their names, and ``clip.json`` with ``{"fps": "2.0"}``; without it fps is 2.

Image files are copied byte for byte, whatever their format: nothing is decoded and encoded again. Entries are read one
at a time, so memory does not grow with the data. One that cannot be converted is left out and listed with the reason.
"""

from __future__ import annotations

import codecs
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tessera.config.errors import UserError
from tessera.data import media
from tessera.data.encode import located
from tessera.data.sample import FRAME_SUFFIXES, BadRow, ImageRef, normalise
from tessera.data.shards.write import ShardWriter
from tessera.data.sources import open_rows, parse_dataset_spec

LLAVA_JSON, SHAREGPT_JSON = "blip_laion_cc_sbu_558k.json", "dataset.json"
DEFAULT_FPS = 2.0
_CHUNK = 1 << 20
_SPACE = r"[ \t\r\n]*"
_FIRST = re.compile(rf"{_SPACE}(\[{_SPACE}\]|\S){_SPACE}")
_NEXT = re.compile(rf"{_SPACE}([,\]]){_SPACE}")

Parts = list[tuple[str, bytes]]
Report = Callable[[int, str], None]
"""Called with the number and the reason of every entry that is left out."""


class Entry(NamedTuple):
    """One entry of the source: its id if it has one, and what makes its parts (or raises BadRow)."""

    id: str | None
    parts: Callable[[], Parts]


class Counts(NamedTuple):
    """How many ``entries`` there were, and how many ``samples`` in how many ``shards`` came of them."""

    entries: int
    samples: int
    shards: int


def convert(kind: str, source: str, into: Path, report: Report, *, most: int = 10_000) -> Counts:
    """Write the shards of ``source`` into the directory ``into``, at most ``most`` samples each."""
    entries = {"llava": _llava, "sharegpt": _sharegpt, "messages": _messages}[kind](source)
    number = -1
    with ShardWriter(into, most=most) as writer:
        for number, entry in enumerate(entries):
            try:
                writer.write(str(number) if entry.id is None else entry.id, entry.parts())
            except BadRow as error:
                report(number, str(error))
    return Counts(number + 1, writer.samples, writer.shards)


def objects(path: Path) -> Iterator[Any]:
    """The elements of a JSON file that holds one list, one at a time; UserError where it is not that."""
    decoder, before = json.JSONDecoder(), _FIRST
    text, at, problem = "", 0, "the file is empty"
    with open(path, "rb") as file:
        for chunk in _texts(file, path):
            text, at = text[at:] + chunk, 0
            # Each element, and what stands before it: "[" in front of the first, "," in front of the others.
            while lead := before.match(text, at):
                if lead[1].endswith("]"):
                    return
                if lead[1] not in ("[", ","):
                    raise UserError(f"{path}: expected a JSON list of objects")
                try:
                    found, end = decoder.raw_decode(text, lead.end())
                except ValueError as error:
                    problem = str(error)
                    break
                if not _NEXT.match(text, end):  # the element may go on in the next chunk
                    problem = "the list does not end"
                    break
                yield found
                at, before = end, _NEXT
    raise UserError(f"{path}: not valid JSON: {problem}")


def _texts(file: BinaryIO, path: Path) -> Iterator[str]:
    """The text of a file in pieces, its byte order mark left out."""
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    try:
        while chunk := file.read(_CHUNK):
            yield decode(chunk)
        yield decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error}") from None


def _llava(source: str) -> Iterator[Entry]:
    """One image and one conversation per entry."""
    root, file = _json_of(source, LLAVA_JSON)
    for entry in objects(file):
        yield Entry(_id(entry), lambda entry=entry: _llava_parts(entry, root))  # type: ignore[misc]


def _llava_parts(entry: Any, root: Path) -> Parts:
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
        raise BadRow("no image in the entry (conversations without or with several images: convert sharegpt)")
    conversation = _conversation(entry)
    return [("jpg", _image(entry["image"], root)), ("json", _json(conversation))]


def _sharegpt(source: str) -> Iterator[Entry]:
    """Conversations about any number of images and videos."""
    root, file = _json_of(source, SHAREGPT_JSON)
    for entry in objects(file):
        yield Entry(_id(entry), lambda entry=entry: _sharegpt_parts(entry, root))  # type: ignore[misc]


def _sharegpt_parts(entry: Any, root: Path) -> Parts:
    if not isinstance(entry, dict):
        raise BadRow(f"an entry must be an object, not {type(entry).__name__}")
    conversation = _conversation(entry)
    images, videos = (_listed(entry.get(f"{kind}s", entry.get(kind)), kind) for kind in ("image", "video"))
    for kind, files in (("image", images), ("video", videos)):
        tags = sum(str(turn.get("value", turn.get("content", ""))).count(f"<{kind}>") for turn in conversation)
        if tags != len(files):
            raise BadRow(f"{tags} <{kind}> tags but {len(files)} {kind}s")
    shown = [_image(image, root) for image in images]
    folders = [_frames(video, root) for video in videos]
    seconds = [1 / fps for _, fps in folders]
    return _chatml({"conversations": conversation, "second_per_grid_ts": seconds}, shown, [f for f, _ in folders])


def _messages(source: str) -> Iterator[Entry]:
    """Rows in any format that training reads."""
    rows = open_rows(parse_dataset_spec(source))
    for index in range(len(rows)):
        yield Entry(None, lambda index=index: _messages_parts(rows, index))  # type: ignore[misc]


def _messages_parts(rows: Any, index: int) -> Parts:
    sample = normalise(rows[index])
    turns: list[dict[str, Any]] = []
    for message in sample.messages:
        turns.append({"role": message.role, "content": message.content})
        if message.loss is not None:
            turns[-1]["loss_scale"] = message.loss
        if message.tool_calls:
            turns[-1]["tool_calls"] = list(message.tool_calls)
    held: dict[str, Any] = {"conversations": turns}
    if sample.tools:
        held["tools"] = list(sample.tools)
    held["second_per_grid_ts"] = [1 / fps for fps in sample.fps]
    images = [_file(located(image, rows.base)) for image in sample.images]
    videos = [[_file(located(frame, rows.base)) for frame in video] for video in sample.videos]
    return _chatml(held, images, videos)


def _chatml(held: Mapping[str, Any], images: list[bytes], videos: list[list[bytes]]) -> Parts:
    return [("jpgs", pickle.dumps(images)), ("videos", pickle.dumps(videos)), ("json", _json(held))]


def _frames(video: str, root: Path) -> tuple[list[bytes], float]:
    """The frames of a video, one less if they are odd in number as two make a patch, and how many make a second."""
    folder = root / os.path.splitext(video)[0]
    if not folder.is_dir():
        raise BadRow(f"no folder of frames for {video}: {folder}")
    names = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in FRAME_SUFFIXES)
    if not names:
        raise BadRow(f"no frames in {folder}")
    if len(names) > 1 and len(names) % 2:
        names.pop()
    rate, beside = DEFAULT_FPS, folder.with_name(folder.name + ".json")
    if beside.is_file():
        try:
            rate = float(json.loads(beside.read_text(encoding="utf-8"))["fps"])
        except (ValueError, TypeError, KeyError):
            rate = 0.0
        if not 0 < rate < float("inf"):
            raise BadRow(f'{beside} must hold {{"fps": "2.0"}}')
    return [_file(str(folder / name)) for name in names], rate


def _image(name: str, root: Path) -> bytes:
    return _file(str(root / name))


def _file(source: ImageRef) -> bytes:
    """The bytes of an image whose header can be read."""
    data = media.load(source)
    media.probe(data)
    return data


def _conversation(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    turns = entry.get("conversations", entry.get("messages"))
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow("conversations must be a list of turns")
    return turns


def _listed(value: Any, kind: str) -> list[str]:
    files = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(file, str) and file for file in files):
        raise BadRow(f"{kind}s must be a list of paths")
    return files


def _id(entry: Any) -> str | None:
    found = entry.get("id") if isinstance(entry, dict) else None
    return str(found) if isinstance(found, str | int) and not isinstance(found, bool) else None


def _json(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8")


def _json_of(source: str, usual: str) -> tuple[Path, Path]:
    """(root, JSON file): ``source`` is either; of a root, the file called ``usual`` or the only one there."""
    path = Path(source).expanduser()
    if path.is_file():
        return path.parent, path
    if not path.is_dir():
        raise UserError(f"tessera data convert: no such file or directory: {source}")
    if (path / usual).is_file():
        return path, path / usual
    found = sorted(path.glob("*.json"))
    if len(found) != 1:
        raise UserError(f"tessera data convert {source}: no {usual} in it; give the path of the JSON file")
    return path, found[0]
