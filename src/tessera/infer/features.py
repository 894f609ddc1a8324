"""What the tower made of images, kept by their content.

An image that is asked about twice is encoded once. Its key is a hash of its file's bytes and of how it is shown (grid,
stills or frames), so that nobody has to decode a known image to find that it is known. Images of different requests
that are new in the same pass go through the tower together.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from tessera.contract.batch import Grid, Media, Normalisation
from tessera.contract.model import Geometry
from tessera.models.tower import Features
from tessera.models.vlm import VLM, Trunk


@dataclass(slots=True)
class Image:
    """One media item of a prompt: its features land on the tokens ``dest [V] int64``.

    ``key`` names its content. It comes with its ``patches [P, D] uint8`` or, where it was known, with its ``features``.
    """

    key: bytes
    grid: Grid
    dest: np.ndarray
    patches: Tensor | None = None
    features: Features | None = None


class Sights:
    """Features of one model's images by key, at most ``limit`` bytes; :meth:`find` may be called from any thread."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._held: OrderedDict[bytes, Features] = OrderedDict()
        self._lock = Lock()

    def find(self, key: bytes) -> Features | None:
        """The features of a known image."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
            return self._held.get(key)

    def keep(self, key: bytes, features: Features) -> None:
        """Remember an image, if need be instead of those that were not asked about for longest."""
        size = _bytes(features)
        if size > self.limit:
            return
        with self._lock:
            if key in self._held:
                return
            self._held[key] = features
            self.used += size
            while self.used > self.limit:
                _, oldest = self._held.popitem(last=False)
                self.used -= _bytes(oldest)

    def forget(self) -> None:
        """Drop everything."""
        with self._lock:
            self._held.clear()
            self.used = 0


def _bytes(features: Features) -> int:
    return sum(level.numel() * level.itemsize for level in (features.final, *features.deepstack))


def encode(
    model: VLM, images: Sequence[Image], geometry: Geometry, normalisation: Normalisation, device: torch.device
) -> list[Features]:
    """The tower's output for each of ``images`` (whose patches have one width), in one pass."""
    assert isinstance(model.model, Trunk)
    grids = tuple(image.grid for image in images)
    sizes = [len(image.dest) for image in images]
    inputs, segments = geometry.tower_inputs(grids)
    patches = [image.patches for image in images if image.patches is not None]
    assert len(patches) == len(images)
    media = Media(
        patches=torch.cat(patches),
        grids=torch.tensor(grids, dtype=torch.int64),
        dest=torch.arange(sum(sizes)),
        sizes=grids,
        owners=tuple(range(len(images))),
        normalisation=normalisation,
        tower=inputs,
        tower_segments=segments,
    )
    found = model.model.look(media.to(device), model.decoder.embed_tokens.weight.dtype)
    # Copies: a view would keep the features of all images alive as long as one of them.
    finals = [part.clone() for part in found.final.split(sizes)]
    levels = [[part.clone() for part in level.split(sizes)] for level in found.deepstack]
    return [Features(final, tuple(level[index] for level in levels)) for index, final in enumerate(finals)]
