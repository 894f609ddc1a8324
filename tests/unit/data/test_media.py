"""Pixels equal transformers' bit for bit; broken files are refused with a reason."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tessera.data import media
from tessera.data.buffers import Buffers
from tessera.data.sample import BadRow
from tessera.models.tower import channel_major
from tests.toys import make_geometry, make_images

SIZES = [(640, 427), (100, 300), (448, 448), (60, 61), (1000, 36)]


def picture(mode: str, size: tuple[int, int] = (70, 50)) -> Image.Image:
    levels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(levels, "RGBA").convert(mode)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def normalised(patches: np.ndarray, geometry: object) -> torch.Tensor:
    """transformers' PIL arithmetic on our uint8 patches: rescale, then normalise, in its dtypes."""
    from transformers.image_transforms import normalize, rescale

    levels = patches.reshape(len(patches), -1, 3).transpose(2, 0, 1)
    how = geometry.normalisation  # type: ignore[attr-defined]
    scaled = rescale(levels, 1 / 255, data_format="channels_first", input_data_format="channels_first")
    out = normalize(scaled, how.mean, how.std, data_format="channels_first", input_data_format="channels_first")
    return torch.from_numpy(np.ascontiguousarray(out.transpose(1, 0, 2)).reshape(len(patches), -1))


def test_pil_path_equals_transformers(tmp_path: Path) -> None:
    geometry = make_geometry(max_pixels=28 * 28 * 400)
    processor = Qwen2VLImageProcessorPil(
        min_pixels=geometry.min_pixels,
        max_pixels=geometry.max_pixels,
        image_mean=list(geometry.normalisation.mean),
        image_std=list(geometry.normalisation.std),
    )
    for suffix in (".jpg", ".png"):
        for path in make_images(tmp_path, SIZES, suffix=suffix):
            expected = processor(Image.open(path), return_tensors="pt")
            pixels = media.decode(path)
            pixels = media.resize(pixels, *geometry.resized(*pixels.shape[:2]), "pil")
            patches = media.patchify([pixels], 14, 2, 2)
            assert torch.equal(normalised(patches, geometry), expected["pixel_values"])
            t, h, w = expected["image_grid_thw"][0].tolist()
            assert geometry.grid(*media.probe(path)) == (t, h, w)


TORCHVISION = '''
    """Runs transformers' default (torchvision) image processor over torchvision's documented operations."""
    import sys, types, enum, importlib.machinery
    import numpy as np, torch

    class InterpolationMode(enum.Enum):
        NEAREST, NEAREST_EXACT, BILINEAR = "nearest", "nearest-exact", "bilinear"
        BICUBIC, BOX, HAMMING, LANCZOS = "bicubic", "box", "hamming", "lanczos"

    def resize(image, size, interpolation, antialias=True, **_):
        # uint8 stays uint8 for bicubic on a CPU: torch's own antialiased kernel
        if tuple(image.shape[-2:]) == tuple(size):
            return image
        return torch.nn.functional.interpolate(
            image, size=list(size), mode=interpolation.value, align_corners=False, antialias=antialias)

    def normalize(image, mean, std, inplace=False):
        mean, std = (torch.as_tensor(v, dtype=image.dtype).view(-1, 1, 1) for v in (mean, std))
        return (image if inplace else image.clone()).sub_(mean).div_(std)

    def module(name, **held):
        made = types.ModuleType(name)
        made.__dict__.update(held)
        made.__spec__ = importlib.machinery.ModuleSpec(name, None)
        made.__path__ = []
        sys.modules[name] = made
        return made

    import importlib.metadata as metadata
    version = metadata.version
    metadata.version = lambda name: "0.28.0" if name == "torchvision" else version(name)
    functional = module("torchvision.transforms.v2.functional", resize=resize, normalize=normalize,
                        InterpolationMode=InterpolationMode, pil_to_tensor=None)
    v2 = module("torchvision.transforms.v2", functional=functional, InterpolationMode=InterpolationMode)
    transforms = module("torchvision.transforms", v2=v2, InterpolationMode=InterpolationMode)
    module("torchvision.transforms.functional", pil_to_tensor=None)
    io = module("torchvision.io")
    module("torchvision", transforms=transforms, io=io, __version__="0.28.0")

    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    processor = Qwen2VLImageProcessor(min_pixels=3136, max_pixels=28 * 28 * 400)
    out = {}
    for index, path in enumerate(sys.argv[2:]):
        result = processor(Image.open(path), return_tensors="pt")
        out[f"pixels{index}"], out[f"grid{index}"] = result["pixel_values"].numpy(), result["image_grid_thw"].numpy()
    np.savez(sys.argv[1], mean=np.array(processor.image_mean), std=np.array(processor.image_std), **out)
'''


def test_torch_path_equals_transformers_default(tmp_path: Path) -> None:
    paths = make_images(tmp_path, SIZES)
    target = tmp_path / "out.npz"
    made = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TORCHVISION), str(target), *paths], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr[-2000:]
    expected = np.load(target)
    geometry = make_geometry(max_pixels=28 * 28 * 400)
    mean = (torch.tensor(expected["mean"].tolist()) * 255.0).repeat_interleave(2 * 14 * 14)
    std = (torch.tensor(expected["std"].tolist()) * 255.0).repeat_interleave(2 * 14 * 14)
    for index, path in enumerate(paths):
        pixels = media.decode(path)
        pixels = media.resize(pixels, *geometry.resized(*pixels.shape[:2]), "torch")
        patches = channel_major(torch.from_numpy(media.patchify([pixels], 14, 2, 2)), 3).float()
        assert torch.equal((patches - mean) / std, torch.from_numpy(expected[f"pixels{index}"]))
        assert geometry.grid(*media.probe(path)) == tuple(expected[f"grid{index}"][0].tolist())


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_patches_of_frames(count: int) -> None:
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (56, 84, 3), dtype=np.uint8) for _ in range(count)]
    padded = frames + [frames[-1]] * (count % 2)
    video = np.stack(padded).transpose(0, 3, 1, 2)  # [T, C, H, W], cut as transformers' video processor cuts it
    cut = video.reshape(len(padded) // 2, 2, 3, 2, 2, 14, 3, 2, 14).transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    patches = channel_major(torch.from_numpy(media.patchify(frames, 14, 2, 2)), 3)
    assert np.array_equal(patches.numpy(), cut.reshape(-1, 3 * 2 * 14 * 14))
    if count == 1:
        still = torch.from_numpy(media.patchify(frames, 14, 2, 1))
        assert torch.equal(channel_major(torch.cat([still, still], 1), 3), patches)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1", "CMYK", "I;16"])
def test_colour_modes_become_rgb_as_in_transformers(mode: str) -> None:
    from transformers.image_transforms import convert_to_rgb

    image = picture(mode) if mode != "I;16" else Image.fromarray(np.arange(3500, dtype=np.uint16).reshape(50, 70))
    form = "TIFF" if mode in ("CMYK", "I;16", "LA") else "PNG"
    data = encoded(image, form)
    expected = convert_to_rgb(Image.open(io.BytesIO(data)), return_numpy=True)
    assert np.array_equal(media.decode(data), expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"exif": b"Exif\0\0" + b"x" * 9000}]
)
def test_jpeg_variants_equal_pil(mode: str, options: dict[str, object]) -> None:
    data = encoded(picture(mode, (123, 77)), "JPEG", **options)
    assert media.probe(data) == (77, 123)
    assert np.array_equal(media.decode(data), np.array(Image.open(io.BytesIO(data)).convert("RGB")))


def test_decoding_into_lent_memory() -> None:
    memory = Buffers(held=4)
    data = [encoded(picture("RGB", size), "JPEG") for size in ((123, 77), (40, 60), (200, 90))]
    held = [media.decode(each, memory=memory) for each in data * 3]
    for pixels, each in zip(held, data * 3, strict=True):
        assert np.array_equal(pixels, media.decode(each))
    del held, pixels
    assert media.decode(data[1], memory=memory).shape == (60, 40, 3)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG"])
def test_headers_of_every_kind(form: str, tmp_path: Path) -> None:
    data = encoded(picture("RGB"), form)
    (tmp_path / "a").write_bytes(data)
    assert media.probe(data) == media.probe(str(tmp_path / "a")) == media.probe(f"file://{tmp_path}/a") == (50, 70)


def test_orientation_is_ignored_as_in_transformers() -> None:
    exif = Image.Exif()
    exif[274] = 6
    assert media.decode(encoded(picture("RGB"), "JPEG", exif=exif)).shape == (50, 70, 3)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be ``width`` x ``height``."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (bomb(20000, 10000), "too large"),
        (bomb(60000, 60000), "too large"),
        (bomb(1, 1), "too small"),
        (b"", "not an image"),
        (b"GIF89a", "not an image"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "not an image"),
        (b"<html>not found</html>", "not an image"),
    ],
)
def test_impossible_headers(data: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(data)
    for source in (data, str(tmp_path / "a")):
        with pytest.raises(BadRow, match=reason):
            media.probe(source)


def test_truncated_files_pass_the_header_and_fail_decoding() -> None:
    for form in ("JPEG", "PNG"):
        whole = encoded(picture("RGB", (400, 300)), form)
        half = whole[: len(whole) // 2]
        assert media.probe(half) == (300, 400)
        with pytest.raises(BadRow, match="cannot decode"):
            media.decode(half)


def test_missing_files_and_urls(tmp_path: Path) -> None:
    for look in (media.probe, media.decode):
        with pytest.raises(BadRow, match=r"not found: .*nope\.jpg"):
            look(str(tmp_path / "nope.jpg"))
        with pytest.raises(BadRow, match="not fetched"):
            look("https://example.com/a.jpg")
        with pytest.raises(BadRow, match="cannot read image"):
            look(str(tmp_path))


def test_data_uris() -> None:
    import base64

    data = encoded(picture("RGB"), "PNG")
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    assert media.probe(uri) == (50, 70)
    assert np.array_equal(media.decode(uri), media.decode(data))
