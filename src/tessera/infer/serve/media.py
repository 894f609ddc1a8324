"""Images of requests, from wherever a request says they are, to bytes that are safe to decode.

A reference is a ``data:`` URI, an ``http(s)`` URL (fetch.py), or a path or ``file://`` URL below the one directory
that the operator opened, if any: symbolic links are followed before it is judged where a path leads.
What comes out has been looked at but not decoded: it is one of a few formats, and its header promises no more pixels
than allowed. A file of a few kilobytes may well promise sixteen gigabytes.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

from tessera.infer.serve.fetch import Fetcher, Unfetched

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What is decoded; the first frame if there are several."""

MOST: Mapping[str, int] = {"image": 64, "video": 8}
"""Most media of a request where ``--limit_mm_per_prompt`` says nothing."""

MOST_FRAMES = 768
"""Most frames of one video."""

_HEAD = 256  # where the head of a data URI ends at the latest
_DATA = re.compile(r"data:(?P<kind>[\w.+-]+/[\w.+-]+)?(?:;[\w.+=-]+?)*?(?P<base64>;base64)?,", re.IGNORECASE)


class BadMedia(ValueError):  # noqa: N818 - it names what it is about
    """An image that is not taken; the message is for the client."""


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """How many images and videos a request may hold, and how many bytes and pixels an image."""

    most: Mapping[str, int]
    max_bytes: int
    max_pixels: int

    @classmethod
    def of(cls, most: Mapping[str, int] | None, max_bytes: int, max_pixels: int) -> MediaLimits:
        """With the defaults where ``most`` says nothing."""
        return cls({**MOST, **(most or {})}, max_bytes, max_pixels)


class Library:
    """Finds and judges images. ``directory`` is the only place of this machine that may be read from, None for none."""

    def __init__(self, limits: MediaLimits, fetcher: Fetcher, directory: str | None) -> None:
        self.limits = limits
        self._fetcher = fetcher
        self._directory = None if directory is None else os.path.realpath(directory)

    def image(self, reference: str) -> bytes:
        """The file that ``reference`` names, judged by its header; BadMedia if it is not to be decoded. Blocks."""
        data = self._bytes(reference)
        self._judge(data)
        return data

    def frames(self, reference: str) -> Sequence[str]:
        """The frames, as data URIs, of a ``data:video/jpeg;base64,`` URI whose images are joined by commas."""
        head = _DATA.match(reference[:_HEAD])
        if head is None or (head["kind"] or "").lower() not in ("video/jpeg", "video/png"):
            raise BadMedia(
                "video files are not decoded: send the frames, as a list of images in a part of type video or joined "
                "by commas in a data:video/jpeg;base64 URI"
            )
        kind = (head["kind"] or "").lower().replace("video", "image")
        return [f"data:{kind};base64,{body}" for body in reference[head.end() :].split(",")]

    def _bytes(self, reference: str) -> bytes:
        scheme = reference[:8].lower()
        if scheme.startswith("data:"):
            return self._inline(reference)
        if scheme.startswith(("http:", "https:")):
            try:
                return self._fetcher.get(reference)
            except Unfetched as error:
                raise BadMedia(f"the image could not be fetched: {error}") from None
        return self._local(reference)

    def _inline(self, reference: str) -> bytes:
        head = _DATA.match(reference[:_HEAD])
        if head is None:
            raise BadMedia("the image's data URI is malformed")
        body = reference[head.end() :]
        if not head["base64"]:
            raise BadMedia("the image's data URI is not base64")
        try:
            plain = unquote_to_bytes(body) if "%" in body else body.encode("ascii")
            data = base64.b64decode(b"".join(plain.split()), validate=True)
        except (binascii.Error, ValueError):
            raise BadMedia("the image's data URI is not valid base64") from None
        return self._sized(data)

    def _local(self, reference: str) -> bytes:
        if self._directory is None:
            raise BadMedia("an image is a data URI or an http(s) URL; files of the server are not read")
        path = reference
        if reference.lower().startswith("file:"):
            parts = urlsplit(reference)
            if parts.netloc not in ("", "localhost"):
                raise BadMedia("a file URL must not name a host")
            path = os.fsdecode(unquote_to_bytes(parts.path))
        refused = BadMedia("no such image below the server's media directory")
        if "\0" in path:
            raise refused
        real = Path(os.path.realpath(os.path.join(self._directory, path)))
        # One answer for what is outside and what is missing: requests are not to explore this machine.
        if not real.is_relative_to(self._directory) or not real.is_file():
            raise refused
        try:
            with open(real, "rb") as file:
                return self._sized(file.read(self.limits.max_bytes + 1))
        except OSError:
            raise refused from None

    def _sized(self, data: bytes) -> bytes:
        if len(data) > self.limits.max_bytes:
            raise BadMedia(f"the image is larger than {self.limits.max_bytes} bytes")
        return data

    def _judge(self, data: bytes) -> None:
        """BadMedia unless the header is that of an image of a known format and an acceptable size."""
        from PIL import Image, UnidentifiedImageError

        if not data:
            raise BadMedia("the image is empty: 0 bytes")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                    width, height = image.size
        except Image.DecompressionBombError:
            raise BadMedia(f"the image has more than {self.limits.max_pixels} pixels") from None
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, struct.error, IndexError, KeyError):
            raise BadMedia(f"not an image of a known format ({', '.join(FORMATS)})") from None
        if width * height > self.limits.max_pixels:
            raise BadMedia(f"the image has {width}x{height} pixels, more than {self.limits.max_pixels}")
