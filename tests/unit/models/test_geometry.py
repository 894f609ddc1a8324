"""Geometry equals transformers' own functions, number for number."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import vision_utils
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as hf_smart_resize
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from tessera.config.errors import UserError
from tessera.contract.batch import Normalisation
from tessera.contract.model import Geometry, MediaItem
from tessera.models.families import family_of
from tessera.models.geometry import PatchGeometry, TextGeometry, smart_resize

START, END, IMAGE, VIDEO = 90, 91, 92, 93


def windowed(**changes: Any) -> PatchGeometry:
    """Patch 14, windows of 112 pixels, videos as one block."""
    common: dict[str, Any] = {
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "normalisation": Normalisation((0.5,) * 3, (0.5,) * 3),
        "pad_ids": {"image": IMAGE, "video": VIDEO},
        "min_pixels": 56 * 56,
        "max_pixels": 28 * 28 * 1280,
        "window_size": 112,
        "tokens_per_second": 2,
    }
    return PatchGeometry(**(common | changes))


def stamped(**changes: Any) -> PatchGeometry:
    """Patch 16, a learned position table, videos as stamped frames."""
    return windowed(**({"patch_size": 16, "window_size": None, "table_side": 48, "time_axis": "stamps"} | changes))


GRIDS = [(1, 4, 6), (1, 2, 2), (3, 8, 10), (1, 34, 50), (2, 16, 16)]


def tokens_of(geometry: PatchGeometry, items: list[MediaItem], text: int = 3) -> torch.Tensor:
    """A segment with ``text`` words around every item, expanded as the renderer does it."""
    ids: list[int] = [1] * text
    for item in items:
        for count in geometry.slots(item):
            ids += [START] + [IMAGE if item.kind == "image" else VIDEO] * count + [END]
        ids += [2] * text
    return torch.tensor(ids)


class Shell:
    """Just enough of a transformers model to call its ``get_rope_index`` unbound."""

    def __init__(self, tokens_per_second: float) -> None:
        self.config = Qwen2_5_VLConfig(vision_config={"tokens_per_second": tokens_per_second})

    get_vision_position_ids = Qwen2_5_VLModel.get_vision_position_ids


def hf_positions(model: Any, tokens: torch.Tensor, items: list[MediaItem], seconds: list[float]) -> torch.Tensor:
    kinds = (tokens == IMAGE).int() + 2 * (tokens == VIDEO).int()
    grids = {kind: [item.grid for item in items if item.kind == kind] for kind in ("image", "video")}
    positions, _ = model.get_rope_index(
        Shell(2),
        tokens[None],
        kinds[None],
        image_grid_thw=torch.tensor(grids["image"]) if grids["image"] else None,
        video_grid_thw=torch.tensor(grids["video"]) if grids["video"] else None,
        second_per_grid_ts=torch.tensor(seconds) if seconds else None,
    )
    return positions[:, 0]


def test_both_are_geometries() -> None:
    geometries: list[Geometry] = [windowed(), stamped(), TextGeometry()]
    assert [g.patch_size for g in geometries] == [14, 16, 0]


def test_smart_resize_equals_transformers() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        size = (draw.randint(1, 5000), draw.randint(1, 5000))
        bounds = {"factor": draw.choice([28, 32]), "min_pixels": draw.choice([3136, 65536]), "max_pixels": 1003520}
        if max(size) / min(size) > 200:
            with pytest.raises(UserError, match="200x"):
                smart_resize(*size, **bounds)
        else:
            assert smart_resize(*size, **bounds) == hf_smart_resize(*size, **bounds)


@pytest.mark.parametrize("size", [{}, {"size": {"shortest_edge": 784 * 2, "longest_edge": 100352}}])
def test_resize_by_temporal_area_equals_transformers(size: dict[str, Any]) -> None:
    """Bounds that count an image twice, and images smaller than a token, which are enlarged first."""
    from transformers.models.glm4v.image_processing_pil_glm4v import smart_resize as theirs

    family = family_of({"model_type": "glm4v_moe"})
    geometry = family.geometry(family.tiny(), size)
    bounds = size.get("size", {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 15000})
    draw = random.Random(1)
    for _ in range(2000):
        height, width = draw.randint(1, draw.choice([40, 5000])), draw.randint(1, draw.choice([40, 5000]))
        limits = {"min_pixels": bounds["shortest_edge"], "max_pixels": bounds["longest_edge"]}
        try:
            expected = theirs(2, height, width, **limits)
        except ValueError:
            with pytest.raises(UserError, match="200x"):
                geometry.resized(height, width)
        else:
            assert geometry.resized(height, width) == expected


def test_user_limits_count_in_tokens() -> None:
    counts = {}
    for name, geometry in (("14", windowed()), ("16", stamped())):
        for limit in (1003520, 602112):
            grid = geometry.limited(max_pixels=limit).grid(1200, 1600)
            counts[name, limit] = grid[1] * grid[2] // 4
    assert counts == {("14", 1003520): 1230, ("14", 602112): 768, ("16", 1003520): 972, ("16", 602112): 588}
    with pytest.raises(UserError, match="MIN_PIXELS"):
        windowed().limited(min_pixels=10**7, max_pixels=10**5)


def test_zero_sides_and_text_only_are_refused() -> None:
    for geometry in (windowed(), TextGeometry()):
        with pytest.raises(UserError):
            geometry.grid(0, 10)
    assert TextGeometry().positions(torch.tensor([5, 6, 7]), []).tolist() == [0, 1, 2]


def test_image_and_block_video_positions_equal_transformers() -> None:
    geometry = windowed()
    items = [MediaItem("image", (1, 4, 6)), MediaItem("image", (1, 2, 2)), MediaItem("image", (1, 34, 50))]
    tokens = tokens_of(geometry, items)
    assert torch.equal(geometry.positions(tokens, items), hf_positions(Qwen2_5_VLModel, tokens, items, []))
    for fps in (2.0, 0.7, 3.3):
        stamps = tuple(i / fps for i in range(6))
        items = [MediaItem("image", (1, 4, 6)), MediaItem("video", (3, 8, 10), stamps), MediaItem("video", (1, 2, 2))]
        tokens = tokens_of(geometry, items)
        expected = hf_positions(Qwen2_5_VLModel, tokens, items, [2 / fps, 1.0])
        assert torch.equal(geometry.positions(tokens, items), expected)


def test_stamped_video_positions_and_text_equal_transformers() -> None:
    geometry = stamped()
    stamps = tuple(i / 2 for i in range(5))
    items = [MediaItem("video", (3, 8, 10), stamps), MediaItem("image", (1, 4, 6)), MediaItem("video", (2, 2, 4))]
    tokens = tokens_of(geometry, items)
    assert torch.equal(geometry.positions(tokens, items), hf_positions(Qwen3VLModel, tokens, items, []))
    seconds = Qwen3VLProcessor._calculate_timestamps(None, list(range(5)), 2.0, 2)  # type: ignore[arg-type]
    block = "<|vision_start|><|video_pad|><|vision_end|>"
    assert geometry.text(items[0]) == "".join(f"<{second:.1f} seconds>{block}" for second in seconds)
    assert geometry.slots(items[0]) == (20, 20, 20)


def test_text_only_segment_of_a_vision_model_counts() -> None:
    assert windowed().positions(torch.arange(4), []).tolist() == [[0, 1, 2, 3]] * 3


def test_tower_inputs_equal_transformers() -> None:
    thw = torch.tensor(GRIDS)
    tensors, segments = windowed().tower_inputs(GRIDS)
    index, windows = vision_utils.get_vision_window_index(thw, 2, 112, 14)
    assert torch.equal(tensors["position_ids"], vision_utils.get_vision_position_ids(thw, 2))
    assert torch.equal(tensors["window_index"], index)
    assert torch.equal(segments["cu_window_seqlens"].cu_seqlens, windows)
    assert torch.equal(segments["cu_seqlens"].cu_seqlens, vision_utils.get_vision_cu_seqlens(thw))
    tensors, segments = stamped().tower_inputs(GRIDS)
    indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
        thw, 48, mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    assert torch.equal(tensors["interp_indices"], indices)
    assert torch.equal(tensors["interp_weights"], weights)
    assert set(segments) == {"cu_seqlens"}


@pytest.mark.parametrize("geometry", [windowed(), stamped()], ids=["windowed", "stamped"])
def test_minimal_grid_runs(geometry: PatchGeometry) -> None:
    tensors, segments = geometry.tower_inputs([geometry.minimal_grid()])
    assert tensors["position_ids"].shape == (4, 2)
    assert segments["cu_seqlens"].lengths == (4,)
