"""Real handwriting, composed into rows for a vision-language model.

The strokes are scikit-learn's ``load_digits``: 1,797 digits of 8x8 pixels, written by 43 people. Four pure steps make a
data set of any size from them; each takes an explicit generator, so a seed gives the same bytes everywhere::

    split     strokes -> training strokes | validation strokes     before anything is drawn: a validation stroke
                                                                   never appears in a training image
    draw      strokes -> glyphs    each stroke several times, upscaled, turned, slanted, stretched, thick and thin
    exercise  -> what is written ("7+8") and what is to be answered ("7+8=15"); lines of digits answer themselves
    compose   glyphs -> one line of writing on paper, with its own spacing, height, ink and background

``write`` turns them into what any data set on disk is: PNG files and a jsonl of ``messages`` and ``images``.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tessera.config.errors import UserError

CELL = 32
"""Height of a line and side of a glyph, in pixels."""

WIDTH = 5 * CELL
"""Width of a line: all lines are written on paper of one size, somewhere on it."""

LINE, SUM = "line", "sum"
DIGITS, PLUS = "0123456789", "+"

Ink = npt.NDArray[np.uint8]
"""Coverage by ink, 0 (paper) to 255."""


@dataclass(frozen=True, slots=True)
class Strokes:
    """Scanned digits: ``images [N, 8, 8] float32`` (0 paper, 1 ink) and their ``labels [N] int64``."""

    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]

    def take(self, rows: npt.NDArray[np.int64]) -> Strokes:
        """These rows only."""
        return Strokes(self.images[rows], self.labels[rows])


@dataclass(frozen=True, slots=True)
class Glyphs:
    """Drawn characters: ``ink [N, CELL, CELL]``, the columns ``left`` and ``right [N]`` that hold ink, and for each
    character the rows that show it."""

    ink: Ink
    left: npt.NDArray[np.int64]
    right: npt.NDArray[np.int64]
    rows: Mapping[str, npt.NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class Exercise:
    """One row's content: its ``kind``, the characters that are ``written`` and the ``answer`` expected."""

    kind: str
    written: str
    answer: str


def load_strokes() -> Strokes:
    """All digits of scikit-learn's ``load_digits``."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the handwriting comes with scikit-learn: pip install scikit-learn") from None
    bunch = load_digits()
    return Strokes((bunch.images / 16).astype(np.float32), bunch.target.astype(np.int64))


def split(strokes: Strokes, share: float, generator: np.random.Generator) -> tuple[Strokes, Strokes]:
    """(training, validation): ``share`` of the strokes of every digit, at random, are set aside for validation."""
    train, held = [], []
    for digit in np.unique(strokes.labels):
        rows = generator.permutation(np.flatnonzero(strokes.labels == digit))
        count = round(len(rows) * share)
        held.append(rows[:count])
        train.append(rows[count:])
    return strokes.take(np.sort(np.concatenate(train))), strokes.take(np.sort(np.concatenate(held)))


def draw(strokes: Strokes, variants: int, generator: np.random.Generator, *, change: float = 1.0) -> Glyphs:
    """Every stroke drawn ``variants`` times, and as many plus signs as there are drawings of a digit.

    ``change`` scales how much a drawing is turned, slanted, stretched and thickened; 0 draws the scan as it is.
    """
    rows = np.repeat(np.arange(len(strokes.labels)), variants)
    labels = strokes.labels[rows]
    pluses = _plus_signs(max(1, len(rows) // len(DIGITS)), generator)
    ink = np.concatenate([_drawn(strokes.images[rows], generator, change), pluses])
    marked = ink.max(axis=1) > 40
    left, right = marked.argmax(axis=1), CELL - marked[:, ::-1].argmax(axis=1)
    where = {digit: np.flatnonzero(labels == int(digit)) for digit in DIGITS}
    where[PLUS] = np.arange(len(rows), len(ink))
    return Glyphs(ink, left.astype(np.int64), right.astype(np.int64), where)


def exercise(generator: np.random.Generator, lengths: Sequence[int], sums: float) -> Exercise:
    """A line of as many digits as one of ``lengths``, or with probability ``sums`` the sum of two digits."""
    chance, *draws = generator.random(2 + max(lengths)).tolist()
    if chance < sums:
        a, b = int(10 * draws[0]), int(10 * draws[1])
        return Exercise(SUM, f"{a}{PLUS}{b}", f"{a}{PLUS}{b}={a + b}")
    length = lengths[int(len(lengths) * draws[0])]
    digits = "".join(DIGITS[int(10 * draw)] for draw in draws[1 : 1 + length])
    return Exercise(LINE, digits, digits)


def compose(written: str, glyphs: Glyphs, generator: np.random.Generator) -> npt.NDArray[np.uint8]:
    """``written`` as one grey line ``[CELL, WIDTH]``: random drawings, spacing, height, ink, paper and margins."""
    count, raised = len(written), 3
    # One call for all random numbers of a line: there are tens of thousands of lines.
    draws = generator.random(3 * count + 5)
    style, which, jitter = draws[:5].tolist(), draws[5 : 5 + count].tolist(), draws[5 + count :].tolist()
    pools = [glyphs.rows[character] for character in written]
    chosen = [int(pool[int(u * len(pool))]) for pool, u in zip(pools, which, strict=True)]
    boxes = [(int(glyphs.left[glyph]), int(glyphs.right[glyph])) for glyph in chosen]
    widths = [right - left for left, right in boxes]
    free = max(0, WIDTH - 4 - sum(widths))
    gaps = [max(0.0, 7 * style[0] + 5 * u - 1) for u in jitter[1:count]]
    tight = min(1.0, free / max(1.0, sum(gaps)))
    gaps = [int(tight * gap) for gap in gaps]
    margin = 2 + int(style[1] * (free - sum(gaps) + 1))
    starts = [margin + sum(widths[:place]) + sum(gaps[:place]) for place in range(count)]
    page = np.zeros((CELL + 2 * raised, WIDTH + CELL), np.uint8)
    for glyph, (left, right), start, u in zip(chosen, boxes, starts, jitter[count:], strict=True):
        up = int(u * (2 * raised + 1))
        spot = page[up : up + CELL, start : start + right - left]
        np.maximum(spot, glyphs.ink[glyph, :, left:right], out=spot)
    slope = np.arange(WIDTH, dtype=np.float32) * np.float32(24 * (style[2] - 0.5) / WIDTH)
    paper = np.minimum(slope + np.float32(215 + 40 * style[3]), 255)
    covered = page[raised : raised + CELL, :WIDTH] * np.float32(1 / 255)
    return (paper + (np.float32(80 * style[4]) - paper) * covered).astype(np.uint8)


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """``pixels [H, W]`` (grey) as a PNG file; a tenth of the time that a general encoder takes for images so small."""
    height, width = pixels.shape
    rows = np.zeros((height, width + 1), np.uint8)  # each row is led by its filter, 0 for none
    rows[:, 1:] = pixels

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 1)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def write(
    folder: Path,
    name: str,
    count: int,
    glyphs: Glyphs,
    generator: np.random.Generator,
    lengths: Sequence[int],
    sums: float,
) -> Path:
    """Compose ``count`` rows into ``folder/name.jsonl`` and ``folder/name/*/*.png``; returns the jsonl.

    A row is ``{"messages": [user "<image>", assistant answer], "images": [file], "kind": "line" or "sum"}`` with the
    path of the image relative to the jsonl.
    """
    lines = []
    for number in range(count):
        task = exercise(generator, lengths, sums)
        file = f"{name}/{number // 1000:03d}/{number:06d}.png"
        if number % 1000 == 0:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}/{file}", "wb") as image:
            image.write(png(compose(task.written, glyphs, generator)))
        messages = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": task.answer}]
        lines.append(json.dumps({"messages": messages, "images": [file], "kind": task.kind}))
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _drawn(images: npt.NDArray[np.float32], generator: np.random.Generator, change: float, chunk: int = 4096) -> Ink:
    """Each 8x8 image ``[N, 8, 8]`` as a glyph ``[N, CELL, CELL]`` with its own angle, slant, size and thickness."""
    import torch
    from torch.nn.functional import affine_grid, grid_sample, interpolate

    out = np.empty((len(images), CELL, CELL), np.uint8)
    for start in range(0, len(images), chunk):
        part = torch.from_numpy(images[start : start + chunk])[:, None]
        maps = torch.from_numpy(_affine(len(part), generator, change))
        weight = torch.from_numpy(
            np.exp(change * generator.uniform(-0.5, 0.4, (len(part), 1, 1, 1))).astype(np.float32)
        )
        smooth = interpolate(part, scale_factor=4, mode="bicubic", align_corners=False).clamp_(0, 1)
        grid = affine_grid(maps, [len(part), 1, CELL, CELL], align_corners=False)
        ink = grid_sample(smooth, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        out[start : start + chunk] = (ink.clamp_(0, 1).pow_(weight) * 255).round_().to(torch.uint8)[:, 0].numpy()
    return out


def _affine(count: int, generator: np.random.Generator, change: float) -> npt.NDArray[np.float32]:
    """``[count, 2, 3]`` maps from glyph to stroke coordinates: a turn and slant of up to 0.2, and a size."""
    angle, slant = change * generator.uniform(-0.2, 0.2, (2, count))
    wide = CELL / 27 * np.exp(change * generator.uniform(-0.15, 0.18, count))
    high = CELL / 27 * np.exp(change * generator.uniform(-0.05, 0.2, count))
    cos, sin, zero = np.cos(angle), np.sin(angle), np.zeros(count)
    rows = [
        [wide * cos, wide * (slant * cos - sin), zero],
        [high * sin, high * (slant * sin + cos), zero],
    ]
    return np.array(rows).transpose(2, 0, 1).astype(np.float32)


def _plus_signs(count: int, generator: np.random.Generator) -> Ink:
    """``count`` crosses drawn with a shaky pen, ``[count, CELL, CELL]``."""
    from PIL import Image, ImageDraw

    out = np.empty((count, CELL, CELL), np.uint8)
    for index in range(count):
        page = Image.new("L", (2 * CELL, 2 * CELL))
        pen = ImageDraw.Draw(page)
        reach, width = generator.uniform(13, 19), int(generator.integers(4, 8))
        ends = CELL + np.array([[-reach, 0], [reach, 0], [0, -reach], [0, reach]]) + generator.uniform(-3, 3, (4, 2))
        for first, last in ((0, 1), (2, 3)):
            pen.line([*ends[first], *ends[last]], fill=255, width=width)
        out[index] = np.asarray(page.resize((CELL, CELL), Image.Resampling.BILINEAR))
    return out
