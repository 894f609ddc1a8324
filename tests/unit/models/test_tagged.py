"""Tiles with tags: which grid an image gets, by brute force, and what stands in front of each tile."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from tessera.config.errors import UserError
from tessera.contract.model import SEAM, Geometry, MediaItem
from tessera.models.families import family_of
from tessera.models.geometry import TextGeometry
from tessera.models.tiled import TaggedGeometry, TiledGeometry, arrangement
from tests.parity import reference as ref
from tests.toys import make_geometry


def nearest(height: int, width: int, most: int, side: int = 448) -> tuple[int, int]:
    """(rows, columns), from the rule and exact arithmetic: every grid, its distance, and ties decided one by one."""
    grids = sorted(
        ((rows, columns) for rows in range(1, most + 1) for columns in range(1, most + 1) if rows * columns <= most),
        key=lambda grid: grid[0] * grid[1],
    )
    distances = {grid: abs(Fraction(width, height) - Fraction(grid[1], grid[0])) for grid in grids}
    near = [grid for grid in grids if distances[grid] == min(distances.values())]
    chosen = near[0]
    for grid in near[1:]:  # larger and larger copies of one shape
        if 2 * width * height > side * side * grid[0] * grid[1]:
            chosen = grid
    return chosen


TABLE = {
    (448, 448): (1, 1),
    (600, 600): (1, 1),
    (640, 640): (2, 2),
    (448, 896): (1, 2),
    (300, 900): (1, 3),
    (900, 300): (3, 1),
    (1080, 1920): (1, 2),
    (1000, 1500): (2, 3),
    (100, 1200): (1, 6),
    (768, 1024): (2, 3),
}
"""(height, width) -> (rows, columns) of up to six tiles."""


def test_table_of_sizes() -> None:
    for (height, width), grid in TABLE.items():
        assert nearest(height, width, 6) == grid == arrangement(height, width, 448, 1, 6), (height, width)


@pytest.mark.parametrize("most", [1, 4, 6, 12])
def test_every_size_gets_the_nearest_grid(most: int) -> None:
    for height in range(64, 1400, 61):
        for width in range(64, 1400, 67):
            assert arrangement(height, width, 448, 1, most) == nearest(height, width, most), (height, width)
    for rows in range(1, 5):
        for columns in range(1, 5):  # exact ratios, where the rule for ties decides
            for unit in (100, 317, 448, 640):
                size = (rows * unit, columns * unit)
                assert arrangement(*size, 448, 1, most) == nearest(*size, most), size


def tagged(**changes: Any) -> TaggedGeometry:
    vision = ref.config_of("NVLM_D")["vision_config"] | {"image_size": 448, "hidden_size": 3200}
    config = ref.config_of("NVLM_D", vision_config=vision, force_image_size=448, **changes)
    geometry = family_of(config).geometry(config, {})
    assert isinstance(geometry, TaggedGeometry)
    return geometry


def text_of(geometry: Geometry, height: int, width: int) -> tuple[str, tuple[int, ...]]:
    item = MediaItem("image", geometry.grid(height, width))
    return geometry.text(item), geometry.slots(item)


def test_tags_and_features_take_turns() -> None:
    text, slots = text_of(tagged(), 448, 1344)
    pad = "<|vision_pad|>"
    tiles = f"<tile_1>{pad}<tile_2>{pad}<tile_3>{pad}<tile_global_thumbnail>{pad}"
    assert text == f"<Image>{SEAM}{tiles}</Image>\n"
    assert slots == (256,) * 4
    # One tile is its own thumbnail.
    assert text_of(tagged(), 448, 448) == (f"<Image>{SEAM}<tile_global_thumbnail>{pad}</Image>\n", (256,))
    text, slots = text_of(tagged(), 100, 1200)
    assert len(slots) == 7 and "<tile_6>" in text and "<tile_7>" not in text


def test_tags_of_the_other_decoder_and_of_many_tiles() -> None:
    llama = {key: value for key, value in ref.config_of("llama").items() if key != "model_type"}
    text, _ = text_of(tagged(llm_config=llama, image_token="<image>"), 448, 448)
    assert text == f"<Image>{SEAM}<tile_global><image></Image>\n"
    text, slots = text_of(tagged().limited(max_tiles=12), 448, 448 * 11)
    assert "<tile_01>" in text and "<tile_11>" in text and text.count("<tile_global_thumbnail0>") == 1
    assert len(slots) == 12


def test_limits_of_tiles() -> None:
    geometry = tagged()
    assert geometry.grid(448, 1344)[0] == 4
    assert geometry.limited(max_tiles=2).grid(448, 1344)[0] == 3
    assert geometry.limited(max_tiles=1).grid(448, 1344)[0] == 1
    assert geometry.limited(max_tiles=12).most == 12
    assert geometry.limited(max_tiles=12, max_pixels=3 * 448 * 448).most == 3
    assert geometry.limited(max_tiles=2, max_pixels=3 * 448 * 448).most == 2
    whole = geometry.limited(tiling=False)
    assert whole.grid(448, 1344)[0] == 1 and text_of(whole, 448, 1344)[0].count("<tile_global_thumbnail>") == 1
    assert whole.limited(tiling=True).grid(448, 1344)[0] == 4
    assert whole.limited(max_tiles=2).grid(448, 1344)[0] == 3
    assert whole.limited(max_pixels=3 * 448 * 448).grid(448, 1344)[0] == 1
    assert replace(geometry, thumbnail=False).grid(448, 1344)[0] == 3
    with pytest.raises(UserError, match="at most 2 are allowed"):
        geometry.limited(min_pixels=4 * 448 * 448, max_tiles=2)


def test_models_without_tiles_have_none_to_limit() -> None:
    for geometry in (make_geometry(), ref.geometry_of(ref.config_of("glm4v_moe"))):
        with pytest.raises(UserError, match="--max_num 3: this model does not cut images into tiles"):
            geometry.limited(max_tiles=3)
        with pytest.raises(UserError, match="--use_tiling false: this model does not"):
            geometry.limited(tiling=False)
    assert TextGeometry().limited(max_tiles=3, tiling=True) == TextGeometry()


def test_where_the_limits_are_stored() -> None:
    held = {"crop_to_patches": False, "max_patches": 9, "size": {"height": 56, "width": 56}}
    native = ref.geometry_of(ref.config_of("internvl")).limited(max_tiles=3)
    assert native.stored("config.json", held) is held
    assert native.stored("preprocessor_config.json", held) == held | {
        "min_patches": 1,
        "max_patches": 3,
        "crop_to_patches": True,
    }
    for name in ref.REMOTE:
        config = ref.config_of(name)
        geometry = family_of(config).geometry(config, {}).limited(max_tiles=3, tiling=False)
        assert geometry.stored("preprocessor_config.json", held) is held
        again = geometry.stored("config.json", config)
        assert again == config | {"max_dynamic_patch": 3, "dynamic_image_size": False}
        assert family_of(again).geometry(again, {}) == geometry


def test_switches_of_the_repositories_own_layout() -> None:
    """Their code does not cut an image unless the config says so, and knows no thumbnail by itself."""
    config = ref.config_of("internvl_chat")
    for key in ("dynamic_image_size", "use_thumbnail", "max_dynamic_patch", "min_dynamic_patch"):
        del config[key]
    geometry = family_of(config).geometry(config, {"image_mean": [0.5] * 3})
    assert isinstance(geometry, TiledGeometry)
    assert (geometry.cut, geometry.thumbnail, geometry.fewest, geometry.most) == (False, False, 1, 6)
    assert geometry.normalisation.mean == (0.5,) * 3 and geometry.normalisation.std == (0.229, 0.224, 0.225)
    assert geometry.resample == "bicubic"


@pytest.mark.parametrize(
    ("name", "value"), [("select_layer", -4), ("ps_version", "v1"), ("pad2square", True), ("force_image_size", 448)]
)
def test_what_is_not_supported_is_named(name: str, value: Any) -> None:
    for family in ref.REMOTE:
        config = ref.config_of(family, **{name: value})
        with pytest.raises(UserError, match=f"this value of {name}"):
            family_of(config).build(config)
