"""Tiles: how many, where they are cut, and what of an image they show, as transformers does it."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)

from tessera.config.errors import UserError
from tessera.contract.batch import Normalisation
from tessera.contract.model import Geometry, MediaItem
from tessera.data import media
from tessera.models.tiled import TiledGeometry, arrangement
from tessera.models.tower import normalise
from tests.parity import reference as ref
from tests.toys import make_images

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def geometry_of(fewest: int = 1, most: int = 12, side: int = 448) -> TiledGeometry:
    placeholder = {"image": "<img><IMG_CONTEXT></img>"}
    how = Normalisation(MEAN, STD, fused=False)
    return TiledGeometry(14, 2, side, how, {"image": 5}, placeholder, "\n", fewest, most)


def test_it_is_a_geometry() -> None:
    geometry: Geometry = geometry_of()
    item = MediaItem("image", geometry.grid(900, 1800))
    assert item.grid == (9, 32, 32), "2 x 4 tiles and the thumbnail"
    assert geometry.slots(item) == (9 * 256,)
    assert geometry.text(item) == "<img><IMG_CONTEXT></img>\n"
    assert geometry.positions(torch.arange(7), [item]).tolist() == list(range(7))
    assert geometry.grid(10, 10) == (1, 32, 32)
    with pytest.raises(UserError, match="images only"):
        geometry.grid(100, 100, frames=2)
    for size in ((0, 10), (10, 4000)):
        with pytest.raises(UserError, match="cut into tiles"):
            geometry.grid(*size)


@pytest.mark.parametrize(("fewest", "most"), [(1, 12), (2, 6), (1, 1), (4, 40)])
def test_arrangement_is_transformers(fewest: int, most: int) -> None:
    draw = random.Random(0)
    for _ in range(400):
        height, width = draw.randint(2, 3000), draw.randint(2, 3000)
        if draw.random() < 0.3:  # exact ratios, where the rule for ties decides
            height, width = (448 * draw.randint(1, 6), 448 * draw.randint(1, 6))
        rows, columns = arrangement(height, width, 448, fewest, most)
        assert (columns, rows) == get_optimal_tiled_canvas((height, width), (448, 448), fewest, most)


@pytest.mark.parametrize("size", [(500, 300), (60, 60), (57, 301), (224, 112)])
def test_pixels_are_transformers(tmp_path: Path, size: tuple[int, int]) -> None:
    """Order of tiles, cuts, thumbnail and normalisation; the arithmetic is its PIL processor's."""
    (path,) = make_images(tmp_path, [size], suffix=".png")
    geometry = geometry_of(side=56)
    processor = GotOcr2ImageProcessorPil(
        size={"height": 56, "width": 56}, image_mean=MEAN, image_std=STD, crop_to_patches=True, max_patches=12
    )
    expected = processor(Image.open(path), return_tensors="np")["pixel_values"]

    pixels = media.decode(path)
    grid = geometry.grid(*pixels.shape[:2])
    shown = [media.resize(pixels, *canvas, "pil") for canvas in geometry.canvases(*pixels.shape[:2])]
    tiles = [tile for canvas in shown for tile in media.tiles(canvas, 56, 56)]
    patches = normalise(torch.from_numpy(media.patchify(tiles, 14, 2, 1)), geometry.normalisation)
    assert grid == (len(expected), 4, 4)
    assert np.array_equal(ref.tile_pixels(patches, grid, geometry).numpy(), expected)


def test_limits_count_in_tiles() -> None:
    area = 448 * 448
    assert geometry_of().limited(max_pixels=6 * area + 5).most == 6
    assert geometry_of().limited(max_pixels=10).most == 1
    assert geometry_of().limited(min_pixels=3 * area).fewest == 3
    assert geometry_of(fewest=4).limited(max_pixels=area).fewest == 1
    with pytest.raises(UserError, match="MIN_PIXELS"):
        geometry_of().limited(min_pixels=9 * area, max_pixels=3 * area)


def test_tower_inputs_count_class_tokens_and_find_positions() -> None:
    tensors, segments = geometry_of(side=56).tower_inputs([(2, 4, 4), (1, 4, 4)])
    block_major = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert tensors["table_index"].tolist() == block_major * 3
    assert segments["cu_seqlens"].lengths == (17, 17, 17)
