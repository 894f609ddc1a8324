"""A question as the scheduler takes it: token ids, positions, images as pixels, and the names of its beginnings.

Everything that costs time and needs no model happens here, in whatever thread asks: image files are read, decoded and
resized, and hashed, so that what the engine has seen before is recognised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from tessera.contract.model import Geometry
from tessera.data import media
from tessera.data.encode import Encoder
from tessera.data.render import Encoded, Medium
from tessera.infer.features import Image
from tessera.infer.prefix import names
from tessera.models.geometry import pad_mask
from tessera.models.tower import Features

Known = Callable[[bytes], Features | None]
"""The features of an image that was encoded before, by its key."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """``tokens [T] int64``, ``positions`` ``[T]`` or ``[3, T]``, the first position behind them, images in order.

    ``blocks`` are the names of its beginnings (``infer/prefix.py``).
    """

    tokens: np.ndarray
    positions: Tensor
    following: int
    images: tuple[Image, ...]
    blocks: tuple[bytes, ...]

    def __len__(self) -> int:
        return len(self.tokens)


def prompt_of(tokens: np.ndarray, positions: Tensor, images: tuple[Image, ...], adapter: str | None = None) -> Prompt:
    """A prompt of these parts for the model with that adapter.

    An image occupies a box of positions (m-RoPE), so what is behind it continues after the largest position, not after
    the number of tokens.
    """
    root = b"" if adapter is None else adapter.encode()
    spans = [(int(image.dest[0]), int(image.dest[-1]) + 1, image.key) for image in images]
    return Prompt(tokens, positions, int(positions.max()) + 1, images, tuple(names(tokens, spans, root)))


def prompt_from(encoded: Encoded, encoder: Encoder, known: Known, adapter: str | None = None) -> Prompt:
    """The prompt of an encoded question; BadRow if an image cannot be read. May be called from any thread."""
    tokens = encoded.tokens
    positions = encoder.geometry.positions(torch.from_numpy(tokens), encoded.items)
    places = _places(encoded, encoder.geometry)
    width = encoder.patch_width([encoded])
    images = tuple(
        _image(medium, dest, width, encoder, known) for medium, dest in zip(encoded.media, places, strict=True)
    )
    return prompt_of(tokens, positions, images, adapter)


def _places(encoded: Encoded, geometry: Geometry) -> list[np.ndarray]:
    """The vision tokens of each media item. Others may lie between them (tags of tiles, stamps of frames)."""
    if not encoded.media:
        return []
    pads = np.flatnonzero(pad_mask(encoded.tokens, geometry.pad_ids))
    ends = np.cumsum([sum(geometry.slots(item)) for item in encoded.items])
    assert ends[-1] == len(pads), f"{len(pads)} vision tokens for {ends[-1]} features"
    return np.split(pads, ends[:-1])


def _image(medium: Medium, dest: np.ndarray, width: int, encoder: Encoder, known: Known) -> Image:
    """A media item with its pixels, or with its features if it is known."""
    files = {source: media.load(source) for source in medium.sources}
    item = medium.item
    hashed = blake2b(repr((item, width, encoder.image_resize)).encode(), digest_size=16)
    for source in medium.sources:
        hashed.update(blake2b(files[source]).digest())
    key = hashed.digest()
    features = known(key)
    if features is not None:
        return Image(key, item.grid, dest, features=features)
    alone = Encoded(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32), (medium,))
    patches = np.empty((alone.patches, width), dtype=np.uint8)
    encoder.pixels(alone, patches, files)
    return Image(key, item.grid, dest, patches=torch.from_numpy(patches))
