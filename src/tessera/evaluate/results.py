"""What an evaluation leaves on disk, and how an interrupted one finds it again.

    eval_output/my-model/                    --eval_output_dir / name of the model
      settings.json                          what decides the answers: model, sampling, limits
      summary.json  report.html              all benchmarks of this model
      MMMU/
        answers/rank0.jsonl                  every answer, appended the moment it comes
        predictions.jsonl                    answer, parsed answer, score, note of every item; in the benchmark's order
        predictions.tsv                      the same in VLMEvalKit's columns
        summary.json                         this benchmark's figures

Answers are raw material that is expensive, scores are derived from them in seconds. So only answers are ever resumed:
a line is whole or it is not there, whatever kills the process, and the newest line of an item counts. An answer belongs
to the ``key`` of its question, a hash of conversation and images; under ``settings.json`` it may stand for the same
question anywhere below the output directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tessera.config.errors import UserError

SETTINGS, SUMMARY, PREDICTIONS, ANSWERS = "settings.json", "summary.json", "predictions.jsonl", "answers"
SYNC_S = 5.0
"""Seconds between two moments at which answers are certain to survive a power failure."""


@dataclass(frozen=True, slots=True)
class Line:
    """One answer: to which item and which question, its text, how it ended (``stop``, ``length``), its tokens.

    ``error`` says why there is none; such an item is asked again by the next run.
    """

    id: str
    key: str
    answer: str = ""
    finish: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""


def fingerprint(settings: Mapping[str, Any]) -> str:
    """A short name of these settings, equal if and only if they are."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def claim(directory: Path, settings: Mapping[str, Any]) -> None:
    """Make ``directory`` that of an evaluation with these ``settings``; UserError if it is that of another one."""
    path = directory / SETTINGS
    found = read_json(path)
    if found is None:
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(settings, indent=1, ensure_ascii=False, default=str) + "\n")
        return
    wanted = json.loads(json.dumps(settings, default=str))
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if names:
        changes = ", ".join(f"{name} {_short(found.get(name))} there, {_short(wanted.get(name))} now" for name in names)
        raise UserError(
            f"--eval_output_dir: {directory} holds answers given under other settings ({changes}); "
            "choose another directory, or remove that one"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no such file, UserError if it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def write_whole(path: Path, text: str) -> None:
    """Write a file that is either the old one or the new one, never a part."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


class Answers:
    """The answers to one benchmark's items, of all ranks that ever worked on it; this one appends to its own file.

    It lies in the ``directory`` of the benchmark. Safe in any thread; a context manager.
    """

    def __init__(self, directory: Path, rank: int = 0) -> None:
        self.directory = directory / ANSWERS
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._synced = time.monotonic()
        self.lines: dict[str, Line] = {line.id: line for line in read_answers(self.directory)}
        self._file: BinaryIO = _whole_lines(self.directory / f"rank{rank}.jsonl")

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            os.fsync(self._file.fileno())
            self._file.close()

    def add(self, line: Line) -> None:
        """Append an answer; it is in the file when this returns."""
        data = json.dumps(asdict(line), ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with self._lock:
            self.lines[line.id] = line
            self._file.write(data)
            self._file.flush()
            if time.monotonic() - self._synced > SYNC_S:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()

    def reread(self) -> dict[str, Line]:
        """The answers of all ranks by item, as they are in the files now."""
        self.lines = {line.id: line for line in read_answers(self.directory)}
        return self.lines


def _whole_lines(path: Path) -> BinaryIO:
    """``path`` opened for appending, behind its last whole line."""
    file = open(path, "a+b", buffering=0)  # noqa: SIM115 - the caller closes it
    size = file.seek(0, os.SEEK_END)
    if size:
        file.seek(0)
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole < size:
            file.truncate(whole)
    file.seek(0, os.SEEK_END)
    return file


def read_answers(directory: Path) -> Iterator[Line]:
    """The answers in the files of ``directory``, those without an error last; torn lines are left out."""
    errors: list[Line] = []
    good: list[Line] = []
    for path in sorted(directory.glob("*.jsonl")):
        for raw in path.read_bytes().splitlines(keepends=True):
            line = _line(raw)
            if line is not None:
                (errors if line.error else good).append(line)
    return iter([*errors, *good])


def _line(raw: bytes) -> Line | None:
    if not raw.endswith(b"\n"):
        return None
    try:
        return Line(**json.loads(raw))
    except (ValueError, TypeError):
        return None


def remembered(output: Path, settings: Mapping[str, Any]) -> dict[str, Line]:
    """Every answer below ``output`` that was given under these ``settings``, by the key of its question."""
    wanted = fingerprint(json.loads(json.dumps(settings, default=str)))
    found: dict[str, Line] = {}
    for path in sorted(output.glob(f"*/{SETTINGS}")):
        stored = read_json(path)
        if stored is None or fingerprint(stored) != wanted:
            continue
        for directory in sorted(path.parent.glob(f"*/{ANSWERS}")):
            found |= {line.key: line for line in read_answers(directory) if not line.error}
    return found
