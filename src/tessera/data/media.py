"""From an image file to the tower's patches, once per image and without changing a bit of what transformers does.

Three steps, each a plain function that releases the interpreter lock where it spends its time::

    probe      header -> (height, width)          microseconds; all that planning needs
    decode     file -> [H, W, 3] uint8            simplejpeg for JPEG if installed, else PIL; alpha goes onto white
    resize     -> [h, w, 3] uint8                 "torch": torchvision's antialiased uint8 kernel; "pil": PIL's
    patchify   -> [P, T * p * p * C] uint8        block-major patches, pixels as in the image (a still: T = 1)

Pixels stay uint8 until the tower normalises them on the device: a quarter of the memory and of the copying. Like
transformers' processors this ignores the EXIF orientation. Sizes are judged by the header, before anything is decoded,
so a decompression bomb costs nothing.
"""

from __future__ import annotations

import base64
import binascii
import importlib.util
import io
import os
import struct
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from tessera.data.buffers import Buffers
from tessera.data.sample import BadRow, ImageRef, Slice

MAX_DECODED_PIXELS = 178_956_970
"""Largest image that is decoded, width times height (PIL's own limit)."""

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_HEAD = 4096
_FAST_JPEG = importlib.util.find_spec("simplejpeg") is not None


def probe(source: ImageRef) -> tuple[int, int]:
    """(height, width) in pixels from the header alone; BadRow if there is no image that can be trained on."""
    if isinstance(source, Slice) or (isinstance(source, str) and not source.startswith("data:")):
        size = _probe_file(source)
    else:
        data = load(source)
        size = _probe_head(data) or _probe_pil(io.BytesIO(data))
    height, width = size
    if height < 2 or width < 2:
        raise BadRow(f"an image of {width}x{height} pixels is too small")
    if height * width > MAX_DECODED_PIXELS:
        raise BadRow(f"an image of {width}x{height} pixels is too large (limit {MAX_DECODED_PIXELS} pixels)")
    return height, width


def load(source: ImageRef) -> bytes:
    """The bytes of the image file."""
    if isinstance(source, bytes):
        return source
    if isinstance(source, Slice):
        return _read(source, source.size)
    if source.startswith("data:"):
        _, _, body = source.partition(",")
        try:
            return base64.b64decode(body)
        except (binascii.Error, ValueError):
            raise BadRow("an image's data URI is not base64") from None
    path = _path(source)
    try:
        with open(path, "rb", buffering=0) as file:
            return file.readall()
    except OSError as error:
        raise _unreadable(path, error) from None


def decode(source: ImageRef, name: ImageRef | None = None, memory: Buffers | None = None) -> np.ndarray:
    """``[H, W, 3] uint8`` RGB, transparency composed onto white as transformers does.

    BadRow speaks of ``name``; ``memory`` may lend the block that the pixels are decoded into.
    """
    data = load(source)
    if _FAST_JPEG and data.startswith(_JPEG):
        pixels = _decode_jpeg(data, memory)
        if pixels is not None:
            return pixels
    from PIL import Image

    try:
        with _opened(io.BytesIO(data)) as image:
            if "A" in image.getbands() or image.info.get("transparency") is not None:
                whole = image.convert("RGBA")
                white = Image.new("RGBA", whole.size, (255, 255, 255, 255))
                return np.array(Image.alpha_composite(white, whole).convert("RGB"))
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise BadRow(f"cannot decode {_named(name or source)}: {error}") from None


def resize(pixels: np.ndarray, height: int, width: int, how: str) -> np.ndarray:
    """``pixels [H, W, 3] uint8`` as ``[height, width, 3]``, bicubic, antialiased; ``how`` is ``torch`` or ``pil``."""
    if pixels.shape[:2] == (height, width):
        return pixels
    if how == "pil":
        from PIL import Image

        return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
    import torch
    from torch.nn.functional import interpolate

    # A batch of one in channels-last layout: torch's native uint8 kernel reads and writes it without repacking.
    batch = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    batch = batch.as_strided(batch.shape, (pixels.size, *batch.stride()[1:]))
    out = interpolate(batch, size=(height, width), mode="bicubic", align_corners=False, antialias=True)
    return out[0].permute(1, 2, 0).numpy()


def tiles(pixels: np.ndarray, height: int, width: int) -> list[np.ndarray]:
    """``pixels [H, W, 3]`` cut into pieces of ``height`` times ``width``, row by row; itself if it is that size."""
    rows, columns = range(0, pixels.shape[0], height), range(0, pixels.shape[1], width)
    return [pixels[row : row + height, column : column + width] for row in rows for column in columns]


def patchify(
    frames: Sequence[np.ndarray], patch: int, merge: int, temporal: int, out: np.ndarray | None = None
) -> np.ndarray:
    """Resized ``frames`` (each ``[h, w, 3] uint8``) as ``[P, temporal * patch * patch * 3] uint8``, into ``out``.

    Patches are ordered (time, block row, block column, row in block, column in block); the last frame is repeated
    to fill a temporal patch. One frame with ``temporal`` 1 is a still, which the tower shows as long as a patch lasts.
    """
    height, width, channels = frames[0].shape
    steps = -(-len(frames) // temporal)
    rows, cols = height // (patch * merge), width // (patch * merge)
    if out is None:
        out = np.empty((steps * rows * cols * merge * merge, temporal * patch * patch * channels), dtype=np.uint8)
    # One row of one patch is contiguous in the image and in the patch: copied as one opaque item, not byte by byte.
    row = np.dtype((np.void, patch * channels))
    lines = out.view(row).reshape(steps, rows, cols, merge, merge, temporal, patch)
    for index in range(steps * temporal):
        pixels = np.ascontiguousarray(frames[min(index, len(frames) - 1)]).reshape(height, width * channels)
        blocks = pixels.view(row).reshape(rows, merge, patch, cols, merge).transpose(0, 3, 1, 4, 2)
        lines[index // temporal, :, :, :, :, index % temporal] = blocks
    return out


def _path(source: str) -> str:
    if source.startswith("file://"):
        return source[7:]
    if "://" in source[:12]:
        raise BadRow(f"images are read from disk, not fetched: download {source[:80]}")
    return source


def _unreadable(path: str, error: OSError) -> BadRow:
    if isinstance(error, FileNotFoundError):
        return BadRow(f"image file not found: {path}")
    return BadRow(f"cannot read image {path}: {error.strerror or error}")


def _read(part: Slice, size: int) -> bytes:
    """The first ``size`` bytes of ``part``; BadRow if its file ends before that."""
    try:
        file = os.open(part.file, os.O_RDONLY)
        try:
            data = os.pread(file, size, part.offset)
        finally:
            os.close(file)
    except OSError as error:
        raise _unreadable(part.file, error) from None
    if len(data) < size:
        raise BadRow(f"the shard ends inside {part.name or 'an image'}: truncated")
    return data


def _named(source: ImageRef) -> str:
    if isinstance(source, Slice):
        return source.name or os.path.basename(source.file)
    if isinstance(source, bytes) or source.startswith("data:"):
        return "the image held in the row"
    return os.path.basename(source)


def _probe_file(source: str | Slice) -> tuple[int, int]:
    if isinstance(source, Slice):
        head = _read(source, min(_HEAD, source.size))
    else:
        path = _path(source)
        try:
            file = os.open(path, os.O_RDONLY)
            try:
                head = os.read(file, _HEAD)
            finally:
                os.close(file)
        except OSError as error:
            raise _unreadable(path, error) from None
    size = _probe_head(head)
    if size is None:  # another format, or a long EXIF block in front
        data = load(source)
        size = _probe_head(data) or _probe_pil(io.BytesIO(data))
    return size


def _probe_head(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a PNG or JPEG whose header lies within ``data``; None if unknown."""
    if data.startswith(_PNG) and len(data) >= 24:
        width, height = struct.unpack_from(">II", data, 16)
        return height, width
    if not data.startswith(_JPEG):
        return None
    at, end = 2, len(data) - 9
    while at < end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            height, width = struct.unpack_from(">HH", data, at + 5)
            return (height, width) if height else None
        at += 2 if marker == 0x01 or 0xD0 <= marker <= 0xD8 else 2 + (data[at + 2] << 8 | data[at + 3])
    return None


def _opened(file: Any) -> Any:
    """A PIL image; its warning about large images is ours to give, from the header."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(file)


def _probe_pil(file: Any) -> tuple[int, int]:
    from PIL import Image

    try:
        with _opened(file) as image:
            return image.height, image.width
    except Image.DecompressionBombError as error:
        raise BadRow(f"an image is too large: {error}") from None
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise BadRow(f"not an image: {str(error)[:120]}") from None


def _decode_jpeg(data: bytes, memory: Buffers | None) -> np.ndarray | None:
    """RGB pixels of an ordinary JPEG; None leaves rarer colour spaces and every complaint to PIL."""
    import simplejpeg

    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "Gray"):
            return None
        block = None if memory is None else memory.take(height * width * 3)
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, "RGB", buffer=block)
    except ValueError:
        return None
    return pixels
