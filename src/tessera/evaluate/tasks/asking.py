"""How a question is put: pictures, words around the question, and what to do with a row that lacks something.

The row of an item is a row of any tessera dataset: a ``<image>`` tag in the text stands where a picture is shown.
Pictures go in front, directly before the words, as VLMEvalKit's messages do; Megatron has a line break between them and
a system message. Tags that a question itself contains are taken as text, and therefore out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tessera.data.sample import BadRow, ImageRef
from tessera.evaluate.files import Fields
from tessera.evaluate.item import Item

SHORT = "\nAnswer the question using a single word or phrase."
_TAG = re.compile(r"<(?:image|video|audio)>")


def question_of(fields: Fields, meaning: str = "question") -> str:
    """The row's question without media tags; empty if it has none."""
    text = str(fields.get(meaning, ""))
    without = _TAG.sub("", text).replace("<img>", "<img >")
    return text if without == text else without.strip()


def asked(
    fields: Fields,
    text: str,
    gold: Any,
    meta: Mapping[str, Any] | None = None,
    *,
    system: str | None = None,
    first_image: bool = False,
) -> Item:
    """The item that shows the row's pictures and then asks ``text``; what the row lacks becomes its problem.

    With ``system`` it is asked as Megatron does. ``first_image`` shows one picture only.
    """
    images, problem = pictures(fields)
    images = images[:1] if first_image else images
    turns = []
    if system is not None:
        turns, text = [{"role": "system", "content": system}], f"\n{text}"
    turns.append({"role": "user", "content": "<image>" * len(images) + text})
    return made(fields, turns, images, gold, meta, problem)


def pictures(fields: Fields) -> tuple[list[ImageRef], str | None]:
    """The row's pictures, and what is wrong with them."""
    try:
        return fields.images, None
    except BadRow as error:
        return [], str(error)


def made(
    fields: Fields,
    turns: Sequence[Mapping[str, str]],
    images: Sequence[ImageRef],
    gold: Any,
    meta: Mapping[str, Any] | None,
    problem: str | None,
) -> Item:
    """The item with these turns; a missing answer is a problem too."""
    if problem is None and fields.lacks("question"):
        problem = "no question"
    if problem is None and gold in (None, "", [], [""]):
        problem = "no answer is known"
    held = [{"bytes": image} if isinstance(image, bytes) else image for image in images]
    known = {name: fields.get(name) for name in ("split", "l2-category", "category")} | dict(meta or {})
    row = {"messages": list(turns), "images": held}
    return Item(fields.id, row, gold, {name: value for name, value in known.items() if value is not None}, problem)
