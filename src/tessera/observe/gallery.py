"""Validation samples with label and prediction, errors first, for the report.

A metric says how often a model is wrong; looking at the wrong ones says why. The rows are those that inference wrote
into ``infer_result/*.jsonl``. Images are shrunk and embedded, so the page stays one file that can be mailed; what
differs between label and prediction is marked character by character.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from tessera.observe.curves import read_jsonl

SHOWN = 60
RIGHT_SHOWN = 24
SIDE = 420  # pixels of the longer side, at most
MAX_PIXELS = 100_000_000
MAX_TEXT = 800


@dataclass(frozen=True, slots=True)
class Answer:
    """One row of an inference: the question, what was expected (None: unknown), what the model said, its images."""

    question: str
    label: str | None
    response: str
    images: tuple[str, ...]

    @property
    def right(self) -> bool | None:
        """Equal but for the amount of white space; None without a label."""
        return None if self.label is None else self.label.split() == self.response.split()


def newest_results(run_dir: Path) -> Path | None:
    """The newest ``infer_result`` file of a run, its checkpoints or their merged copies; None if there is none."""
    found = [*run_dir.glob("infer_result/*.jsonl"), *run_dir.glob("*/infer_result/*.jsonl")]
    return max(found, key=lambda path: (path.stat().st_mtime, path.name), default=None)


def read_answers(path: Path) -> list[Answer]:
    """The rows of a result file; lines that are not rows are left out."""
    return [_answer(row) for row in read_jsonl(path) if row is not None and "response" in row]


def _answer(row: dict[str, Any]) -> Answer:
    messages = row.get("messages") or []
    asked = [m.get("content") for m in messages if isinstance(m, dict) and m.get("role") == "user"]
    question = re.sub(r"<(image|video)>", "", asked[-1]).strip() if asked and isinstance(asked[-1], str) else ""
    label = row.get("labels")
    images = row.get("images") or []
    frames = [frame for video in row.get("videos") or [] if isinstance(video, list) for frame in video[:1]]
    paths = [item.get("path") if isinstance(item, dict) else item for item in [*images, *frames]]
    return Answer(
        question=question,
        label=None if label is None else str(label),
        response=str(row["response"]),
        images=tuple(path for path in paths if isinstance(path, str)),
    )


def exact_match(answers: Iterable[Answer]) -> float | None:
    """Share of the labelled answers that are right; None if none is labelled."""
    judged = [answer.right for answer in answers if answer.right is not None]
    return sum(judged) / len(judged) if judged else None


def errors_first(answers: Sequence[Answer], most: int = SHOWN) -> list[Answer]:
    """At most ``most`` answers: wrong ones in front, the least similar first, then right ones, then unlabelled ones.

    If there are more wrong ones than places, a sixth of the places still goes to right ones; of those, at most 24.
    """
    wrong = sorted((a for a in answers if a.right is False), key=_similarity)
    others = sorted((a for a in answers if a.right is not False), key=lambda a: a.right is None)
    spared = min(len(others), most // 6)
    return [*wrong[: most - spared], *others[:RIGHT_SHOWN]][:most]


def _similarity(answer: Answer) -> float:
    return SequenceMatcher(None, (answer.label or "")[:MAX_TEXT], answer.response[:MAX_TEXT], autojunk=False).ratio()


def gallery(answers: Sequence[Answer], roots: Sequence[Path]) -> str:
    """The answers as HTML cards, in the given order; relative image paths are looked up below ``roots``."""
    return f'<div class="gallery">{"".join(_card(answer, roots) for answer in answers)}</div>'


def _card(answer: Answer, roots: Sequence[Path]) -> str:
    kind = {True: "right", False: "wrong", None: "open"}[answer.right]
    mark = {True: "correct", False: "wrong", None: "no label"}[answer.right]
    pictures = "".join(_picture(name, roots) for name in answer.images[:4])
    if len(answer.images) > 4:
        pictures += f'<p class="note">… and {len(answer.images) - 4} more images</p>'
    label, response = (answer.label or "")[:MAX_TEXT], answer.response[:MAX_TEXT]
    shown_label, shown_response = html.escape(label), html.escape(response)
    if answer.right is False:
        shown_label, shown_response = marked(label, response)
    rows = f"<dt>prediction</dt><dd>{shown_response or '<i>empty</i>'}</dd>"
    if answer.label is not None:
        rows = f"<dt>label</dt><dd>{shown_label}</dd>" + rows
    question = f'<p class="question">{html.escape(answer.question[:MAX_TEXT])}</p>' if answer.question else ""
    return (
        f'<article class="card {kind}"><div class="pictures">{pictures}</div>'
        f'<div class="text"><span class="badge">{mark}</span>{question}<dl>{rows}</dl></div></article>'
    )


def marked(label: str, response: str) -> tuple[str, str]:
    """Both texts as HTML with what differs marked: missing characters in ``<del>``, wrong ones in ``<ins>``."""
    left, right = [], []
    for kind, a, b, c, d in SequenceMatcher(None, label, response, autojunk=False).get_opcodes():
        before, after = html.escape(label[a:b]), html.escape(response[c:d])
        if kind == "equal":
            left.append(before)
            right.append(after)
            continue
        left.append(f"<del>{before}</del>" if before else "")
        right.append(f"<ins>{after}</ins>" if after else "")
    return "".join(left), "".join(right)


def _picture(name: str, roots: Sequence[Path]) -> str:
    short = "an embedded image" if name.startswith("data:") else name
    try:
        uri = data_uri(name, roots)
    except (OSError, ValueError) as error:
        return f'<p class="missing">{html.escape(short)}: {html.escape(str(error))}</p>'
    return f'<img src="{uri}" alt="{html.escape(Path(short).name)}" title="{html.escape(short)}" loading="lazy">'


def data_uri(name: str, roots: Sequence[Path]) -> str:
    """The image called ``name`` (a path or a ``data:`` URI), shrunk, as a ``data:`` URI. OSError or ValueError if it
    cannot be read; nothing is ever fetched from a network."""
    from PIL import Image

    with Image.open(_source(name, roots)) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"not shown, {image.width} x {image.height} pixels")
        image.draft("RGB", (2 * SIDE, 2 * SIDE))  # JPEG: decode at a fraction of the size
        small = image.convert("L" if image.mode in ("1", "L") else "RGB")
        small.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    as_png = small.mode == "L" or small.width * small.height < 20_000
    small.save(out, "PNG" if as_png else "JPEG", **({"optimize": True} if as_png else {"quality": 82}))
    kind = "png" if as_png else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode('ascii')}"


def _source(name: str, roots: Sequence[Path]) -> Path | io.BytesIO:
    if name.startswith("data:"):
        return io.BytesIO(base64.b64decode(name.partition(",")[2]))
    if re.match(r"https?://", name):
        raise ValueError("not shown, lies on the network")
    path = Path(name.removeprefix("file://"))
    candidates = [path] if path.is_absolute() else [root / path for root in roots]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise ValueError("file not found")
    return found
