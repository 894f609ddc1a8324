"""Boxes in answers: how they are written, what their numbers count, and how much two of them overlap.

Models write ``[x1, y1, x2, y2]``, ``(x1,y1),(x2,y2)`` or ``{"bbox_2d": [...]}``. What the numbers mean cannot be seen
from them, so the frame is named, never guessed (except by the dialect of those who guess):

* ``thousand``: thousandths of the image's width and height;
* ``pixels``: pixels of the image *as the model saw it*, after resizing;
* ``unit``: shares of width and height.
"""

from __future__ import annotations

import re

Box = tuple[float, float, float, float]
_NUMBER = r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
_BETWEEN = r"(?:\s*,\s*|\s+)"
_LIST = re.compile(rf"\[\s*({_NUMBER}){_BETWEEN}({_NUMBER}){_BETWEEN}({_NUMBER}){_BETWEEN}({_NUMBER})\s*\]")
_POINTS = re.compile(rf"\(\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\)\s*,?\s*\(\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\)")


def first_box(answer: str) -> Box | None:
    """The first ``[x1, y1, x2, y2]`` or pair of points of an answer, else its first four numbers; None if fewer."""
    found = min((m for m in (_LIST.search(answer), _POINTS.search(answer)) if m), key=lambda m: m.start(), default=None)
    numbers = list(found.groups()) if found else re.findall(_NUMBER, answer)[:4]
    return _box(numbers)


def vlmevalkit_box(answer: str) -> Box | None:
    """VLMEvalKit's reading: the first list of four numbers, else the first four numbers wherever they are."""
    found = _LIST.search(answer)
    return _box(list(found.groups()) if found else re.findall(_NUMBER, answer)[:4])


def _box(numbers: list[str]) -> Box | None:
    if len(numbers) < 4:
        return None
    x1, y1, x2, y2 = map(float, numbers)
    return x1, y1, x2, y2


def to_image(box: Box, frame: str, size: tuple[int, int], seen: tuple[int, int]) -> Box:
    """``box`` of ``frame`` in pixels of an image of ``size`` (width, height) that the model saw at size ``seen``."""
    wide, high = {"thousand": (1000, 1000), "unit": (1, 1), "pixels": seen}[frame]
    across, down = size[0] / wide, size[1] / high
    return box[0] * across, box[1] * down, box[2] * across, box[3] * down


def guessed(box: Box, size: tuple[int, int]) -> Box:
    """VLMEvalKit's guess: up to 1.5 shares, up to 1000 thousandths, else pixels; cut to the image, corners sorted."""
    most = max(map(abs, box))
    if most <= 1000:
        box = to_image(box, "unit" if most <= 1.5 else "thousand", size, size)
    wide, high = size
    xs = sorted(min(max(x, 0.0), wide) for x in box[0::2])
    ys = sorted(min(max(y, 0.0), high) for y in box[1::2])
    return xs[0], ys[0], xs[1], ys[1]


def overlap(one: Box, two: Box) -> float:
    """Intersection over union; 0 for boxes without area."""
    wide = min(one[2], two[2]) - max(one[0], two[0])
    high = min(one[3], two[3]) - max(one[1], two[1])
    if wide <= 0 or high <= 0:
        return 0.0
    both = sum(max(box[2] - box[0], 0) * max(box[3] - box[1], 0) for box in (one, two)) - wide * high
    return wide * high / both if both > 0 else 0.0
