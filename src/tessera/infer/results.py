"""What an inference over a dataset leaves behind: a line per row on the console and in a file, and a summary.

The file holds one JSON object per answered row, written and flushed when the row is done, so that an interrupted run
keeps what it has. ``labels`` is the answer the dataset gives (null if it gives none) and ``messages`` the
conversation that ends with the model's answer; columns that tessera does not read are passed through::

    {"response": "42", "labels": "42", "logprobs": null, "messages": [...], "images": ["a.png"], "source": "exam"}
"""

from __future__ import annotations

import base64
import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tessera.config.errors import UserError
from tessera.data.media import load
from tessera.data.sample import QUERY, RESPONSE, ImageRef, Sample

RULE = "-" * 50
_CONVERSATION = ("messages", "conversations", "conversation")
_READ = frozenset((*_CONVERSATION, "system", "system_prompt", "images", "image", "videos", "video"))


def matches(response: str, labels: str) -> bool:
    """Whether two texts are equal but for the amount of white space."""
    return response.split() == labels.split()


def exact_match(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """Share of result rows whose ``response`` equals their ``labels``; None if no row has labels."""
    hits = [matches(row["response"], row["labels"]) for row in rows if row.get("labels") is not None]
    return sum(hits) / len(hits) if hits else None


def read_results(path: Path) -> list[dict[str, Any]]:
    """The rows of a result file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def result_row(row: Mapping[str, Any], prompt: Sample, labels: str | None, response: str) -> dict[str, Any]:
    """The object written for a dataset ``row`` whose ``prompt`` the model answered with ``response``."""
    messages: list[dict[str, Any]] = [
        {"role": message.role, "content": message.content}
        | ({"tool_calls": list(message.tool_calls)} if message.tool_calls else {})
        for message in prompt.messages
    ]
    out: dict[str, Any] = {"response": response, "labels": labels, "logprobs": None}
    out["messages"] = [*messages, {"role": "assistant", "content": response}]
    if prompt.images:
        out["images"] = [_reference(image) for image in prompt.images]
    if prompt.videos:
        out["videos"] = [[_reference(frame) for frame in frames] for frames in prompt.videos]
    # Where there are messages, a column called "answer" is not the answer but somebody's remark.
    whole = any(row.get(name) is not None for name in _CONVERSATION)
    read = _READ if whole else _READ.union(QUERY, RESPONSE, ("history",))
    return out | {name: value for name, value in row.items() if name.lower() not in read and name not in out}


def _reference(image: ImageRef) -> str:
    """An absolute path, a URI as it is; else a ``data:`` URI, so that the row can be read back from anywhere."""
    if not isinstance(image, str):
        return "data:image;base64," + base64.b64encode(load(image)).decode("ascii")
    return image if image.startswith(("data:", "file:")) else os.path.abspath(image)


def shown(prompt: Sample, labels: str | None) -> str:
    """What is printed before the answer: the question without its media tags, and the label."""
    query = re.sub(r"<(image|video)>", "", prompt.messages[-1].content).strip()
    return f"[QUERY] {query}\n" + (f"[LABELS] {labels}\n" if labels is not None else "") + "[RESPONSE] "


def result_file(chosen: str | None, directory: Path) -> Path:
    """``--result_path``, or a new name in ``directory/infer_result``; UserError rather than overwriting a file."""
    if chosen is not None:
        path = Path(chosen).expanduser()
        if path.exists():
            raise UserError(f"--result_path {chosen}: exists already; results are never overwritten, choose a new name")
        return path
    stem = time.strftime("%Y%m%d-%H%M%S")
    names = (f"{stem}.jsonl" if n == 1 else f"{stem}-{n}.jsonl" for n in count(1))
    return next(path for name in names if not (path := directory / "infer_result" / name).exists())


class Results:
    """Writes result rows, each flushed, into a file that did not exist before; a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self.hits: list[bool] = []
        self._file: TextIO | None = None

    def __enter__(self) -> Results:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("x", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be created ({error.strerror}); choose another --result_path"
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one result row."""
        self.put(row)
        if row["labels"] is not None:
            self.hits.append(matches(row["response"], row["labels"]))

    def put(self, line: Mapping[str, Any]) -> None:
        """Append ``line`` as it is, and count it as one answered row."""
        assert self._file is not None
        self._file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
        self._file.flush()
        self.rows += 1

    @property
    def exact_match(self) -> float | None:
        """Share of the rows with labels that were answered exactly; None without any."""
        return sum(self.hits) / len(self.hits) if self.hits else None


def summary(
    results: Results, *, prompt_tokens: Sequence[int], generated_tokens: Sequence[int], runtime: float, skipped: int
) -> dict[str, Any]:
    """The closing dict: tokens, rows, seconds, rates, and exact match where there were labels."""
    out: dict[str, Any] = {
        "num_prompt_tokens": sum(prompt_tokens),
        "num_generated_tokens": sum(generated_tokens),
        "num_samples": results.rows,
        "runtime": round(runtime, 3),
        "samples/s": round(results.rows / runtime, 3),
        "tokens/s": round(sum(generated_tokens) / runtime, 3),
    }
    if skipped:
        out["num_skipped"] = skipped
    if results.exact_match is not None:
        out["exact_match"] = round(results.exact_match, 6)
    return out
