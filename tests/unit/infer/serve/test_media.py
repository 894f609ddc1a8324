"""Images of requests: where they may come from, and what is refused before anything is decoded."""

from __future__ import annotations

import base64
import io
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tessera.infer.serve.fetch import Fetcher
from tessera.infer.serve.media import BadMedia, Library, MediaLimits
from tests.serving import huge_png, picture, uri


def huge_gif(width: int, height: int) -> bytes:
    """A GIF whose screen promises this many pixels."""
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0" * 6
    return screen + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02D\x01\0;"


def huge_webp(width: int, height: int) -> bytes:
    """An extended WebP whose canvas promises this many pixels."""
    canvas = b"\0\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + canvas
    return b"RIFF" + struct.pack("<I", len(body)) + body


def library(directory: Path | None = None, **limits: Any) -> Library:
    given = {"max_bytes": 10**6, "max_pixels": 10**6, "most": None, **limits}
    return Library(MediaLimits.of(**given), Fetcher(["none"], max_bytes=100), str(directory) if directory else None)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_data_uris_of_every_format(form: str) -> None:
    data = picture(form)
    assert library().image(uri(data)) == data
    assert library().image(uri(data, "application/octet-stream")) == data


def test_spellings_of_a_data_uri() -> None:
    data = picture()
    body = base64.b64encode(data).decode()
    for text in (
        f"DATA:image/png;BASE64,{body}",
        f"data:image/png;charset=utf-8;base64,{body}",
        f"data:;base64,{body}",
        f"data:image/png;base64,{body[:40]}\n{body[40:]}",
        "data:image/png;base64," + body.replace("+", "%2B").replace("=", "%3D"),
    ):
        assert library().image(text) == data


@pytest.mark.parametrize(
    ("reference", "why"),
    [
        ("data:image/png;base64,", "0 bytes"),
        ("data:image/png;base64,!!!!", "not valid base64"),
        ("data:image/png;base64,abc", "not valid base64"),
        ("data:image/png;base64,\u00e9\u00e9", "not valid base64"),
        ("data:image/png,abc", "not base64"),
        ("data:image/png;base64", "malformed"),
        ("data:" + "a" * 300 + ",", "malformed"),
        (uri(b"hello, this is no image"), "not an image"),
        (uri(picture()[:20]), "not an image"),
        (uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), "not an image"),
        (uri(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "not an image"),
        ("http://127.0.0.1/a.png", "not fetched from its host"),
        ("/etc/passwd", "not read"),
        ("file:///etc/passwd", "not read"),
        ("", "not read"),
    ],
)
def test_what_is_no_image(reference: str, why: str) -> None:
    with pytest.raises(BadMedia, match=why):
        library().image(reference)


@pytest.mark.parametrize(
    "data", [huge_png(20000, 10000), huge_png(2**31 - 1, 2**31 - 1), huge_gif(40000, 40000), huge_webp(2**14, 2**14)]
)
def test_a_header_that_promises_too_much_is_refused_before_decoding(data: bytes) -> None:
    assert len(data) < 200
    with pytest.raises(BadMedia, match="pixels"):
        library(max_pixels=64 * 2**20).image(uri(data))


def test_limits_of_bytes_and_pixels() -> None:
    data = picture(size=(100, 100))
    assert library(max_pixels=10_000, max_bytes=len(data)).image(uri(data)) == data
    with pytest.raises(BadMedia, match=r"100x100 pixels, more than 9999"):
        library(max_pixels=9_999).image(uri(data))
    with pytest.raises(BadMedia, match="larger than"):
        library(max_bytes=len(data) - 1).image(uri(data))


def test_an_animation_is_its_first_frame() -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), shade, np.uint8)) for shade in range(0, 250, 10)]
    for form in ("GIF", "WEBP"):
        out = io.BytesIO()
        frames[0].save(out, form, save_all=True, append_images=frames[1:])
        assert library(max_pixels=64).image(uri(out.getvalue())) == out.getvalue()


def test_files_only_below_the_directory(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "in-secret"
    for folder in (inside / "deep", outside):
        folder.mkdir(parents=True)
    data = picture()
    (inside / "deep" / "ä b.png").write_bytes(data)
    (outside / "a.png").write_bytes(data)
    (inside / "link.png").symlink_to(outside / "a.png")
    (inside / "door").symlink_to(outside)
    (inside / "fine.png").symlink_to(inside / "deep" / "ä b.png")
    os.mkfifo(inside / "pipe")
    shelf = library(inside)
    path = inside / "deep" / "ä b.png"
    for reference in (str(path), path.as_uri(), "deep/ä b.png", "fine.png", f"file://localhost{path.as_posix()}"):
        assert shelf.image(reference) == data
    for reference in (
        *(str(outside / "a.png"), "../in-secret/a.png", f"{inside}/../in-secret/a.png", "link.png", "door/a.png"),
        *("file:///etc/passwd", "/etc/passwd", "missing.png", "deep", "pipe", "a\0b", "file:///%00", ""),
        f"file://{inside}/%2e%2e/in-secret/a.png",
    ):
        with pytest.raises(BadMedia, match="no such image below the server's media directory"):
            shelf.image(reference)
    with pytest.raises(BadMedia, match="must not name a host"):
        shelf.image(f"file://elsewhere{path}")


def test_a_file_is_not_read_beyond_the_limit(tmp_path: Path) -> None:
    with open(tmp_path / "big.png", "wb") as file:
        file.truncate(10**12)
    with pytest.raises(BadMedia, match="larger than 1000000 bytes"):
        library(tmp_path).image("big.png")


def test_frames_of_a_video() -> None:
    frames = [picture("JPEG"), picture("JPEG", (8, 8))]
    joined = "data:video/jpeg;base64," + ",".join(base64.b64encode(frame).decode() for frame in frames)
    shelf = library()
    assert [shelf.image(frame) for frame in shelf.frames(joined)] == frames
    for other in ("data:video/mp4;base64,AAAA", "http://example.org/a.mp4", "a.mp4"):
        with pytest.raises(BadMedia, match="video files are not decoded"):
            shelf.frames(other)
