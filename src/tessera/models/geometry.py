"""What a family's images cost and where its tokens sit: integers only, from sizes alone.

A vision tower cuts an image into ``patch x patch`` squares; ``merge x merge`` neighbouring patches become one token of
the decoder. The image is first resized so that both sides are multiples of ``patch * merge`` and its area lies within
``[min_pixels, max_pixels]``. All of this follows from the (height, width) in a file's header, so the length of a sample
is known before a single pixel is decoded. That is what makes planning and packing cheap.

The order of patches is block-major everywhere: the ``merge * merge`` patches of one token lie next to each other, and
the tokens run row by row. Videos are the same with a time axis of ``temporal_patch`` frames per patch.

Everything is a pure function of the arguments and therefore safe in any number of loader threads. The results equal
transformers' own functions bit for bit (tests/unit/models/test_geometry.py) without importing its modelling code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessera.config.errors import UserError
from tessera.contract.batch import Grid, Normalisation, Segments
from tessera.contract.model import MediaItem

MAX_ASPECT = 200
"""Longest side over shortest side beyond which the resize rule is not defined."""


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) rounded to multiples of ``factor`` with an area within the bounds, aspect kept if possible."""
    if min(height, width) <= 0 or max(height, width) / min(height, width) > MAX_ASPECT:
        raise UserError(f"an image of {width}x{height} pixels cannot be resized: its sides differ by more than 200x")
    high, wide = round(height / factor) * factor, round(width / factor) * factor
    if high * wide > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        high = max(factor, math.floor(height / beta / factor) * factor)
        wide = max(factor, math.floor(width / beta / factor) * factor)
    elif high * wide < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        high = math.ceil(height * beta / factor) * factor
        wide = math.ceil(width * beta / factor) * factor
    return high, wide


def block_major(height: int, width: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column ``[height * width] int64`` of each patch of one frame, in the tower's block-major order."""
    rows, cols = np.divmod(np.arange(height * width, dtype=np.int64), width)
    order = (height // merge, merge, width // merge, merge)
    return rows.reshape(order).swapaxes(1, 2).ravel(), cols.reshape(order).swapaxes(1, 2).ravel()


def window_order(grid: Grid, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Token order of windowed attention: ``index [t * h * w]`` into the tokens of ``grid`` and tokens per window.

    ``grid`` counts merged tokens, ``side`` is the window's side in tokens; windows at the border are smaller.
    """
    frames, height, width = grid
    rows, cols = np.divmod(np.arange(height * width, dtype=np.int64), width)
    across = -(-width // side)
    windows = (rows // side) * across + cols // side
    frame_order = np.argsort(windows, kind="stable")
    counts = np.bincount(windows)
    starts = np.arange(frames, dtype=np.int64)[:, None] * (height * width)
    return (starts + frame_order).ravel(), np.tile(counts, frames)


def table_taps(size: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear taps ``[size, 2] int64`` into an axis of ``side`` learned positions, and weights ``[size, 2] float32``.

    End points map to end points (``align_corners``).
    """
    source = np.arange(size, dtype=np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    floor = np.floor(source)
    offsets = np.arange(2, dtype=np.int64)
    taps = np.clip(floor.astype(np.int64)[:, None] + offsets, 0, side - 1)
    distance = np.abs(source[:, None] - floor[:, None] - offsets.astype(np.float32))
    return taps, np.clip(np.float32(1) - distance, 0, None)


@dataclass(frozen=True, slots=True)
class _Tables:
    """Inputs of the tower for one item: positions, table taps and their shares, window order, patches per window."""

    positions: np.ndarray
    taps: np.ndarray
    shares: np.ndarray
    order: np.ndarray
    windows: list[int]


@dataclass(slots=True)
class PatchGeometry:
    """Geometry of a tower that takes images of any size (native resolution); never mutated after construction.

    ``placeholder[kind]`` holds the pad token once, between its start and end tokens. ``window_size`` (pixels) is set
    for towers with windowed attention, ``table_side`` for those that interpolate a square learned position table.
    ``time_axis`` says how a video enters the text: ``"seconds"`` is one block whose temporal positions advance by
    ``tokens_per_second`` per second, ``"stamps"`` one block per temporal patch, each led by ``<1.5 seconds>``.
    Pixel bounds are areas of one image, or of one frame of a video; ``video_total_pixels`` bounds a whole video.
    """

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    normalisation: Normalisation
    pad_ids: Mapping[str, int]
    min_pixels: int
    max_pixels: int
    video_min_pixels: int = 0
    video_max_pixels: int = 0
    video_total_pixels: int = 0
    window_size: int | None = None
    table_side: int | None = None
    time_axis: str = "seconds"
    tokens_per_second: float = 1.0
    fps: float = 2.0
    resample: str = "bicubic"
    resize: str = "torch"
    placeholder: Mapping[str, str] = field(
        default_factory=lambda: {
            "image": "<|vision_start|><|image_pad|><|vision_end|>",
            "video": "<|vision_start|><|video_pad|><|vision_end|>",
        }
    )

    _tables: Callable[[Grid], _Tables] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert self.time_axis in ("seconds", "stamps")
        # Sizes recur, so a few are remembered; a cache of a pure function changes nothing but its cost.
        self._tables = lru_cache(maxsize=32)(self._make_tables)
        area = self.factor * self.factor
        self.video_min_pixels = self.video_min_pixels or 128 * area
        self.video_max_pixels = self.video_max_pixels or 768 * area
        self.video_total_pixels = self.video_total_pixels or int(128_000 * area * 0.9)

    @property
    def factor(self) -> int:
        """Pixels per side of one decoder token."""
        return self.patch_size * self.merge_size

    def limited(
        self,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        video_max_pixels: int | None = None,
        fps: float | None = None,
        max_tiles: int | None = None,
        tiling: bool | None = None,
    ) -> PatchGeometry:
        """This geometry under the user's limits (None keeps one). Areas count in whole tokens of this family."""
        refuse_tiles(max_tiles, tiling)

        def whole(pixels: int | None, kept: int) -> int:
            area = self.factor * self.factor
            return kept if pixels is None else max(pixels // area, 1) * area

        bounds = (whole(min_pixels, self.min_pixels), whole(max_pixels, self.max_pixels))
        if bounds[0] > bounds[1]:
            raise UserError(
                f"MIN_PIXELS {bounds[0]} exceeds MAX_PIXELS {bounds[1]}: raise MAX_PIXELS or lower MIN_PIXELS"
            )
        frame = whole(video_max_pixels, self.video_max_pixels)
        return replace(
            self,
            min_pixels=bounds[0],
            max_pixels=bounds[1],
            video_min_pixels=min(self.video_min_pixels, frame),
            video_max_pixels=frame,
            fps=self.fps if fps is None else fps,
        )

    def stored(self, file: str, held: Mapping[str, Any]) -> Mapping[str, Any]:
        """``held`` with the pixel limits of an image, under the names it has them already."""
        if file == "config.json":
            return held
        limits = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        known = {key: value for key, value in limits.items() if key in held}
        if not held.get("size"):
            return {**held, **(known or limits)}
        return {**held, "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}, **known}

    def resized(self, height: int, width: int, frames: int = 1) -> tuple[int, int]:
        """(height, width) in pixels after the resize rule; more than one frame means the limits of a video."""
        if frames <= 1:
            return smart_resize(height, width, self.factor, self.min_pixels, self.max_pixels)
        share = self.video_total_pixels * self.temporal_patch_size // frames
        ceiling = max(min(self.video_max_pixels, share), int(self.video_min_pixels * 1.05))
        return smart_resize(height, width, self.factor, self.video_min_pixels, ceiling)

    def canvases(self, height: int, width: int, frames: int = 1) -> tuple[tuple[int, int], ...]:
        """One: the resized frame."""
        return (self.resized(height, width, frames),)

    def grid(self, height: int, width: int, frames: int = 1) -> Grid:
        """Patches (t, h, w) of an item of this original size in pixels; the last frame is repeated to fill a patch."""
        high, wide = self.resized(height, width, frames)
        return -(-frames // self.temporal_patch_size), high // self.patch_size, wide // self.patch_size

    def text(self, item: MediaItem) -> str:
        """What replaces ``placeholder[item.kind]``: as many pad tokens as ``slots(item)`` has entries."""
        block = self.placeholder[item.kind]
        if item.kind == "image" or self.time_axis == "seconds":
            return block
        seconds = self._patch_seconds(item)
        return "".join(f"<{second:.1f} seconds>{block}" for second in seconds)

    def slots(self, item: MediaItem) -> tuple[int, ...]:
        """Decoder tokens of each pad token in ``text(item)``."""
        return tuple([t * h * w for t, h, w in self._blocks(item)])

    def positions(self, tokens: Tensor, items: Sequence[MediaItem]) -> Tensor:
        """``[3, T] int64`` (time, height, width) positions of one segment of expanded ``tokens [T]``.

        Text advances all three axes by one per token; an item spreads over a (t, h, w) box that starts where the
        text stopped, and the text goes on behind the box's longest spatial side.
        """
        length = tokens.shape[0]
        out = np.empty((3, length), dtype=np.int64)
        if not items:
            out[:] = np.arange(length)
            return torch.from_numpy(out)
        pads = np.flatnonzero(pad_mask(tokens.numpy(), self.pad_ids))
        done = position = taken = 0
        for item in items:
            for block in self._blocks(item):
                count = block[0] * block[1] * block[2]
                start = int(pads[taken])
                assert int(pads[taken + count - 1]) == start + count - 1, "pad tokens of an item are not contiguous"
                out[:, done:start] = np.arange(position, position + start - done)
                position += start - done
                out[:, start : start + count] = self._box(item, block) + position
                position += max(block[1], block[2])
                done, taken = start + count, taken + count
        assert taken == len(pads), "tokens hold more pads than the items account for"
        out[:, done:] = np.arange(position, position + length - done)
        return torch.from_numpy(out)

    def tower_inputs(self, grids: Sequence[Grid]) -> tuple[dict[str, Tensor], dict[str, Segments]]:
        """The tower's precomputed inputs, named as transformers' vision modules name their keyword arguments.

        ``position_ids [P, 2] int64`` (row, column); with a learned table ``interp_indices [P, 4] int64`` and
        ``interp_weights [P, 4] float32``; with windows ``window_index [P / merge^2] int64``. Segments: ``cu_seqlens``
        (one per frame) and, with windows, ``cu_window_seqlens``; both count patches.
        """
        parts = [self._tables(grid) for grid in grids]
        tensors = {"position_ids": _join([part.positions for part in parts])}
        segments = {"cu_seqlens": Segments.of([h * w for t, h, w in grids for _ in range(t)])}
        if self.table_side is not None:
            tensors["interp_indices"] = _join([part.taps for part in parts])
            tensors["interp_weights"] = _join([part.shares for part in parts])
        if self.window_size is not None:
            start, index, counts = 0, [], []
            for part in parts:
                index.append(part.order + start if start else part.order)
                counts += part.windows
                start += len(part.order)
            tensors["window_index"] = _join(index)
            segments["cu_window_seqlens"] = Segments.of(counts)
        return tensors, segments

    def minimal_grid(self) -> Grid:
        """One merge cell: the smallest frame the tower can run on."""
        return 1, self.merge_size, self.merge_size

    def _make_tables(self, grid: Grid) -> _Tables:
        """The tower's inputs for one item of this grid."""
        t, h, w = grid
        rows, cols = block_major(h, w, self.merge_size)
        none = np.empty(0, dtype=np.int64)
        taps, shares, order, windows = none, none, none, none
        if self.table_side is not None:
            (row_taps, row_weights), (col_taps, col_weights) = (table_taps(n, self.table_side) for n in (h, w))
            taps = row_taps[rows][:, :, None] * self.table_side + col_taps[cols][:, None, :]
            shares = row_weights[rows][:, :, None] * col_weights[cols][:, None, :]
            taps, shares = _frames(taps.reshape(-1, 4), t), _frames(shares.reshape(-1, 4), t)
        if self.window_size is not None:
            merged = (t, h // self.merge_size, w // self.merge_size)
            order, windows = window_order(merged, self.window_size // self.factor)
        patches = (windows * self.merge_size**2).tolist()
        return _Tables(_frames(np.stack([rows, cols], 1), t), taps, shares, order, patches)

    def _blocks(self, item: MediaItem) -> list[Grid]:
        """(t, h, w) in decoder tokens of each run of pad tokens of ``item``."""
        frames, height, width = item.grid[0], item.grid[1] // self.merge_size, item.grid[2] // self.merge_size
        if item.kind == "video" and self.time_axis == "stamps":
            return [(1, height, width)] * frames
        return [(frames, height, width)]

    def _box(self, item: MediaItem, block: Grid) -> np.ndarray:
        """``[3, t * h * w] int64`` offsets of the tokens of one block from its start position."""
        frames, height, width = block
        times = np.arange(frames, dtype=np.float32)
        if item.kind == "video" and self.time_axis == "seconds":
            times = times * np.float32(self.tokens_per_second * self._patch_interval(item))
        shape = (frames, height, width)
        box = np.empty((3, *shape), dtype=np.int64)
        box[0] = times.astype(np.int64)[:, None, None]
        box[1] = np.arange(height)[None, :, None]
        box[2] = np.arange(width)[None, None, :]
        return box.reshape(3, -1)

    def _patch_interval(self, item: MediaItem) -> float:
        """Seconds between two temporal patches; frames without timestamps are ``fps`` per second."""
        stamps = item.timestamps
        if len(stamps) < 2 or stamps[-1] <= stamps[0]:
            return self.temporal_patch_size / self.fps
        return self.temporal_patch_size * (stamps[-1] - stamps[0]) / (len(stamps) - 1)

    def _patch_seconds(self, item: MediaItem) -> list[float]:
        """Middle of each temporal patch in seconds, the last frame repeated to fill one."""
        step, frames = self.temporal_patch_size, item.grid[0] * self.temporal_patch_size
        stamps = list(item.timestamps) or [index / self.fps for index in range(frames)]
        stamps += [stamps[-1]] * (frames - len(stamps))
        return [(stamps[i] + stamps[i + step - 1]) / 2 for i in range(0, frames, step)]


@dataclass(slots=True)
class TextGeometry:
    """Geometry of a text-only model: no patches (``patch_size`` 0), positions count tokens."""

    patch_size: int = 0
    temporal_patch_size: int = 1
    merge_size: int = 1
    normalisation: Normalisation = field(default_factory=lambda: Normalisation(mean=(), std=()))
    resample: str = "bicubic"
    resize: str = "torch"
    placeholder: Mapping[str, str] = field(default_factory=dict)
    pad_ids: Mapping[str, int] = field(default_factory=dict)

    def limited(
        self,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        video_max_pixels: int | None = None,
        fps: float | None = None,
        max_tiles: int | None = None,
        tiling: bool | None = None,
    ) -> TextGeometry:
        """Itself: there is nothing that pixel limits could limit."""
        return self

    def stored(self, file: str, held: Mapping[str, Any]) -> Mapping[str, Any]:
        """Unchanged."""
        return held

    def resized(self, height: int, width: int, frames: int = 1) -> tuple[int, int]:
        raise UserError("this model takes text only: choose a vision-language model or a dataset without images")

    def canvases(self, height: int, width: int, frames: int = 1) -> tuple[tuple[int, int], ...]:
        return (self.resized(height, width, frames),)

    def grid(self, height: int, width: int, frames: int = 1) -> Grid:
        return 0, *self.resized(height, width, frames)

    def text(self, item: MediaItem) -> str:
        raise AssertionError("a text-only model has no media items")

    def slots(self, item: MediaItem) -> tuple[int, ...]:
        raise AssertionError("a text-only model has no media items")

    def positions(self, tokens: Tensor, items: Sequence[MediaItem]) -> Tensor:
        """``[T] int64``: 0 .. T-1."""
        return torch.arange(tokens.shape[0])

    def tower_inputs(self, grids: Sequence[Grid]) -> tuple[dict[str, Tensor], dict[str, Segments]]:
        assert not grids, "a text-only model has no tower"
        return {}, {}

    def minimal_grid(self) -> Grid:
        raise AssertionError("a text-only model has no tower")


def refuse_tiles(max_tiles: int | None, tiling: bool | None) -> None:
    """UserError if a model that takes images as they are is told how to cut them into tiles."""
    asked = f"--max_num {max_tiles}" if max_tiles is not None else f"--use_tiling {str(tiling).lower()}"
    if max_tiles is not None or tiling is not None:
        raise UserError(f"{asked}: this model does not cut images into tiles; limit their size by --max_pixels")


def pad_mask(tokens: np.ndarray, pad_ids: Mapping[str, int]) -> np.ndarray:
    """``[T] bool``: which of ``tokens [T]`` stand for vision features."""
    mask = np.zeros(len(tokens), dtype=bool)
    for pad in pad_ids.values():
        mask |= tokens == pad
    return mask


def _frames(table: np.ndarray, frames: int) -> np.ndarray:
    """``table [P, k]`` of one frame, repeated for every frame of an item."""
    return table if frames == 1 else np.tile(table, (frames, 1))


def _join(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts))
