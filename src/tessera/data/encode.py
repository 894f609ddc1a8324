"""From a sample to everything one row contributes to a batch: tokens, weights, and later its pixels.

Encoding happens in two halves because their costs differ by a factor of hundreds. :meth:`Encoder.rendered` needs the
text and the headers of the image files: that is all a plan is made from. :meth:`Encoder.pixels` decodes and resizes,
once per use, in a loader thread.

What to do with a row that is longer than ``--max_length`` is decided here too. ``delete`` refuses it; ``left`` and
``right`` cut text on that side; ``split`` (pre-training) makes several rows of it. The tokens of an image are never
cut: an image is in or the row is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tessera.config.errors import UserError
from tessera.contract.model import Geometry, MediaItem
from tessera.data import media
from tessera.data.buffers import Buffers
from tessera.data.render import Encoded, Medium, Rendered, Renderer
from tessera.data.sample import BadRow, ImageRef, Sample, normalise

Probe = Callable[[ImageRef], tuple[int, int]]
"""Image -> (height, width), from its header."""

Files = Mapping[ImageRef, bytes]
"""Image files read already."""


class Encoder:
    """Rows to :class:`Encoded` and pixels, under one run's rules.

    ``image_resize`` is ``torch``, ``pil`` or None, the family's own; relative image paths are looked for below
    ``root_image_dir`` if given, else in the working directory, else beside the dataset's file.
    """

    def __init__(
        self,
        renderer: Renderer,
        geometry: Geometry,
        *,
        image_resize: str | None = None,
        root_image_dir: str | None = None,
        max_length: int | None = None,
        truncation_strategy: str = "delete",
        columns: Mapping[str, str] | None = None,
    ) -> None:
        self.renderer = renderer
        self.geometry = geometry
        self.image_resize = image_resize or geometry.resize
        self.root_image_dir = root_image_dir
        self.max_length = max_length
        self.truncation_strategy = truncation_strategy
        self.columns = columns
        self._memory = Buffers(held=8)

    def sample(self, row: Mapping[str, Any], base: Path | None = None, *, need_answer: bool = True) -> Sample:
        """The row in normal form, its image paths resolved."""
        found = normalise(row, self.columns, need_answer=need_answer)
        if not found.images and not found.videos:
            return found
        images = tuple(located(image, base, self.root_image_dir) for image in found.images)
        videos = tuple(tuple(located(frame, base, self.root_image_dir) for frame in video) for video in found.videos)
        return replace(found, images=images, videos=videos)

    def rendered(self, sample: Sample, probe: Probe = media.probe, *, prompt: bool = False) -> Rendered:
        """Text and media items of the sample, from image headers alone; ``prompt`` leaves the last answer out."""
        images = [self._medium("image", (image,), probe) for image in sample.images]
        rates = sample.fps or [None] * len(sample.videos)
        videos = [self._medium("video", video, probe, fps) for video, fps in zip(sample.videos, rates, strict=True)]
        render = self.renderer.prompt if prompt else self.renderer.render
        return render(sample, images, videos)

    def encoded(self, sample: Sample, files: Files | None = None, *, prompt: bool = False) -> Encoded:
        """Tokens and weights of the sample, not shortened; image headers are read from ``files`` where given."""

        def probe(source: ImageRef) -> tuple[int, int]:
            return media.probe(source if files is None else files.get(source, source))

        return self.renderer.encode(self.rendered(sample, probe, prompt=prompt))

    def files(self, sample: Sample) -> Files:
        """The image files of the sample, each read once."""
        sources = [*sample.images, *(frame for video in sample.videos for frame in video)]
        return {source: media.load(source) for source in sources}

    def shortened(self, encoded: Encoded) -> list[Encoded]:
        """``encoded`` as one or (``split``) several rows of at most ``max_length`` tokens; BadRow if that cannot be."""
        length, limit = len(encoded.tokens), self.max_length
        if limit is None or length <= limit:
            return [encoded]
        if self.truncation_strategy == "delete":
            raise BadRow(f"{length} tokens are more than --max_length {limit}")
        if self.truncation_strategy == "split":
            return self._split(encoded, limit)
        keep = np.zeros(length, dtype=bool)
        for start, end in self.renderer.extents(encoded):
            keep[start:end] = True
        room = limit - int(keep.sum())
        if room <= 0:
            raise BadRow(
                f"its images and videos alone take {length - int((~keep).sum())} tokens, --max_length is {limit}"
            )
        text = np.flatnonzero(~keep)
        keep[text[:room] if self.truncation_strategy == "right" else text[-room:]] = True
        return [_cut(encoded, keep, encoded.media)]

    def pixels(self, encoded: Encoded, out: np.ndarray, files: Files | None = None) -> None:
        """Write the patches of all media into ``out [encoded.patches, D] uint8``; BadRow if a file is unreadable.

        ``D`` is the ``patch_width`` of the rows that will share a batch.
        """
        start = 0
        for medium in encoded.media:
            count = medium.item.grid[0] * medium.item.grid[1] * medium.item.grid[2]
            self._fill(medium, out[start : start + count], files or {})
            start += count

    def patch_width(self, rows: Iterable[Encoded]) -> int:
        """Bytes of one patch (D) where these rows share a batch; stills alone need no time axis."""
        still = all(row.still for row in rows)
        return 3 * (1 if still else self.geometry.temporal_patch_size) * self.geometry.patch_size**2

    def _medium(self, kind: str, sources: tuple[ImageRef, ...], probe: Probe, fps: float | None = None) -> Medium:
        if kind not in self.geometry.pad_ids:
            raise BadRow(f"this model takes no {kind}s")
        sizes = [probe(source) for source in sources]  # every frame must be there; the first decides
        height, width = sizes[0]
        try:
            grid = self.geometry.grid(height, width, len(sources))
        except UserError as error:
            raise BadRow(str(error)) from None
        stamps = () if fps is None else tuple(index / fps for index in range(len(sources)))
        return Medium(MediaItem(kind, grid, stamps), sources)

    def _fill(self, medium: Medium, out: np.ndarray, files: Files) -> None:
        frames = []
        targets: tuple[tuple[int, int], ...] = ()
        patch, (_, down, across) = self.geometry.patch_size, medium.item.grid
        for index, source in enumerate(medium.sources):
            pixels = media.decode(files.get(source, source), source, self._memory)
            if index == 0:
                height, width = pixels.shape[:2]
                if self.geometry.grid(height, width, len(medium.sources)) != medium.item.grid:
                    raise BadRow("an image's size differs from its header, or has changed since planning")
                targets = self.geometry.canvases(height, width, len(medium.sources))
            for target in targets:
                shown = media.resize(pixels, *target, self.image_resize)
                frames += media.tiles(shown, down * patch, across * patch)
        media.patchify(frames, patch, self.geometry.merge_size, out.shape[1] // (3 * patch * patch), out)

    def _split(self, encoded: Encoded, limit: int) -> list[Encoded]:
        """Consecutive parts of at most ``limit`` tokens, cut between media items."""
        extents, length, parts, start = self.renderer.extents(encoded), len(encoded.tokens), [], 0
        while start < length:
            end = min(start + limit, length)
            end = next((first for first, behind in extents if first < end < behind), end)
            if end <= start:
                raise BadRow(f"one image or video takes more tokens than --max_length {limit}")
            held = tuple(
                medium for medium, (first, _) in zip(encoded.media, extents, strict=True) if start <= first < end
            )
            keep = np.zeros(length, dtype=bool)
            keep[start:end] = True
            parts.append(_cut(encoded, keep, held))
            start = end
        return parts


def _cut(encoded: Encoded, keep: np.ndarray, held: tuple[Medium, ...]) -> Encoded:
    """The kept tokens as a sequence of their own: nothing predicts its first token."""
    weights = encoded.loss_weight[keep]
    weights[0] = 0.0
    return Encoded(encoded.tokens[keep], weights, held)


def located(source: ImageRef, base: Path | None, root: str | None = None) -> ImageRef:
    """Where a relative path leads: below ``root`` if given, else in the working directory, else beside ``base``."""
    if not isinstance(source, str) or os.path.isabs(source) or source.startswith(("data:", "file:")):
        return source
    if root is not None:
        return os.path.join(root, source)
    if base is not None and "://" not in source and not os.path.exists(source):
        beside = os.path.join(base, source)
        if os.path.exists(beside):
            return beside
    return source
