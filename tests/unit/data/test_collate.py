"""A batch is its samples, one after the other: targets shifted, positions restarting, features in their places."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tessera.contract.model import MediaItem
from tessera.data.collate import Materialised, collate
from tessera.data.render import Encoded, Medium
from tests.toys import IMAGE_PAD, make_geometry


def row(index: int, tokens: list[int], trained: list[int], *grids: tuple[int, int, int]) -> Materialised:
    """A sample whose tokens in ``trained`` count their index + 1; one image per grid, patches filled with its index."""
    weights = np.zeros(len(tokens), dtype=np.float32)
    weights[trained] = np.array(trained, dtype=np.float32) + 1
    media = tuple(Medium(MediaItem("image", grid), ()) for grid in grids)
    encoded = Encoded(np.array(tokens, dtype=np.int64), weights, media)
    return Materialised(index, encoded, np.full((encoded.patches, 1176), index, dtype=np.uint8))


ONE = row(7, [10, IMAGE_PAD, IMAGE_PAD, 11, 12], [3, 4], (1, 2, 4))
TWO = row(3, [20, 21, 22], [2])
THREE = row(5, [30, IMAGE_PAD, 31, IMAGE_PAD], [2], (1, 2, 2), (1, 2, 2))


def test_layout() -> None:
    batch = collate([ONE, TWO, THREE], make_geometry())
    assert batch.sample_ids == (7, 3, 5)
    assert batch.segments.lengths == (5, 3, 4)
    assert batch.tokens.tolist() == [10, 5, 5, 11, 12, 20, 21, 22, 30, 5, 31, 5]
    assert batch.targets.tolist() == [5, 5, 11, 12, 0, 21, 22, 0, 5, 31, 5, 0]
    assert batch.loss_weight.tolist() == [0, 0, 4, 5, 0, 0, 3, 0, 0, 3, 0, 0]
    assert batch.supervised.tolist() == [2, 3, 6, 9]
    assert batch.weight == 15.0
    assert batch.positions.shape == (3, 12)
    assert batch.positions[:, 5:8].tolist() == [[0, 1, 2]] * 3


def test_media() -> None:
    media = collate([ONE, TWO, THREE], make_geometry()).media
    assert media is not None
    assert not media.minimal
    assert media.sizes == ((1, 2, 4), (1, 2, 2), (1, 2, 2))
    assert media.grids.tolist() == [list(size) for size in media.sizes]
    assert media.owners == (0, 2, 2)
    assert media.dest.tolist() == [1, 2, 9, 11]
    assert media.patches[:, 0].tolist() == [7] * 8 + [5] * 8
    assert media.tower["position_ids"].shape == (16, 2)
    assert media.tower_segments["cu_seqlens"].lengths == (8, 4, 4)


def test_a_batch_equals_its_samples_one_by_one() -> None:
    geometry = make_geometry("stamps")
    rows = [ONE, TWO, THREE]
    packed = collate(rows, geometry)
    alone = [collate([each], geometry) for each in rows]
    for name in ("tokens", "targets", "loss_weight", "positions"):
        assert torch.equal(getattr(packed, name), torch.cat([getattr(batch, name) for batch in alone], dim=-1))
    with_media = [batch.media for batch in alone if batch.media and not batch.media.minimal]
    assert packed.media is not None
    for name, tensor in packed.media.tower.items():
        assert torch.equal(tensor, torch.cat([media.tower[name] for media in with_media]))


def test_minimal_frame_without_images_and_none_without_tower() -> None:
    media = collate([TWO], make_geometry()).media
    assert media is not None
    assert media.minimal
    assert media.patches.shape == (4, 588)
    assert media.dest.tolist() == []
    assert collate([TWO], make_geometry("text")).media is None
    assert collate([TWO], make_geometry("text")).positions.tolist() == [0, 1, 2]


@pytest.mark.parametrize("style", ["windows", "stamps", "text"])
def test_nothing_gives_the_filler(style: str) -> None:
    batch = collate([], make_geometry(style))
    assert batch.sample_ids == (-1,)
    assert batch.tokens.tolist() == [0]
    assert batch.weight == 0.0
    assert batch.supervised.numel() == 0
