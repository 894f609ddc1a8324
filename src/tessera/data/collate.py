"""Samples laid end to end: the last step before the model, where everything integer is computed.

:func:`collate` shifts targets inside each segment, numbers positions per segment, maps every row of the tower's output
to its token slot, and precomputes the tower's own indices, so that a forward pass never asks the device a question.
It also guarantees what keeps ranks in step: a batch is never empty (a *filler* segment of one token and no weight
stands in for samples that are missing), and if the model has a tower, the tower has something to look at (a *minimal
frame* that lands on no token). Both are decided here, after packing, truncation and failures, when nothing can change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tessera.contract.batch import Batch, Media, Normalisation, Segments
from tessera.contract.model import Geometry
from tessera.data.render import Encoded
from tessera.models.geometry import pad_mask


@dataclass(frozen=True, slots=True)
class Materialised:
    """One row with its pixels: ``patches [P, D] uint8`` of all its media in order, ``sample_id`` its corpus index."""

    sample_id: int
    encoded: Encoded
    patches: np.ndarray


FILLER = Encoded(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.float32))
"""One token that nothing is learned from."""


def collate(
    rows: Sequence[Materialised],
    geometry: Geometry,
    *,
    normalisation: Normalisation | None = None,
    patches: np.ndarray | None = None,
) -> Batch:
    """``rows`` as one packed batch, in order; no rows give the filler.

    ``patches`` is the rows' patches in one array already, which saves a copy. ``normalisation`` replaces the
    geometry's where the image path rounds differently (``--image_resize pil``).
    """
    encoded = [row.encoded for row in rows] or [FILLER]
    tokens = np.concatenate([e.tokens for e in encoded])
    targets, weights = np.zeros_like(tokens), np.zeros(len(tokens), dtype=np.float32)
    targets[:-1] = tokens[1:]
    weights[:-1] = np.concatenate([e.loss_weight for e in encoded])[1:]
    segments = Segments.of([len(e.tokens) for e in encoded])
    ends = np.cumsum(segments.lengths) - 1  # nothing follows the last token of a segment
    targets[ends], weights[ends] = 0, 0.0
    flat = torch.from_numpy(tokens)
    positions = [
        geometry.positions(part, e.items) for part, e in zip(flat.split(list(segments.lengths)), encoded, strict=True)
    ]
    if patches is None and rows:
        patches = np.concatenate([row.patches for row in rows])
    return Batch(
        tokens=flat,
        targets=torch.from_numpy(targets),
        loss_weight=torch.from_numpy(weights),
        positions=positions[0] if len(positions) == 1 else torch.cat(positions, dim=-1),
        segments=segments,
        supervised=torch.from_numpy(np.flatnonzero(weights)),
        weight=float(weights.sum(dtype=np.float64)),
        sample_ids=tuple(row.sample_id for row in rows) or (-1,),
        media=_media(encoded, tokens, patches, geometry, normalisation or geometry.normalisation),
    )


def _media(
    encoded: Sequence[Encoded],
    tokens: np.ndarray,
    patches: np.ndarray | None,
    geometry: Geometry,
    normalisation: Normalisation,
) -> Media | None:
    """The tower's inputs for all items of the batch; None without a tower."""
    if not geometry.patch_size:
        return None
    sizes = tuple(item.grid for e in encoded for item in e.items)
    owners = tuple(segment for segment, e in enumerate(encoded) for _ in e.items)
    minimal = not sizes
    if minimal:
        sizes = (geometry.minimal_grid(),)
        t, h, w = sizes[0]
        width = 3 * geometry.patch_size**2  # one frame is a still
        patches, dest = np.zeros((t * h * w, width), dtype=np.uint8), np.empty(0, dtype=np.int64)
    else:
        dest = np.flatnonzero(pad_mask(tokens, geometry.pad_ids))
    assert patches is not None and len(patches) == sum(t * h * w for t, h, w in sizes)
    tower, tower_segments = geometry.tower_inputs(sizes)
    return Media(
        patches=torch.from_numpy(patches),
        grids=torch.tensor(sizes, dtype=torch.int64),
        dest=torch.from_numpy(dest),
        sizes=sizes,
        owners=owners if not minimal else (0,),
        normalisation=normalisation,
        tower=tower,
        tower_segments=tower_segments,
        minimal=minimal,
    )


def pinned(batch: Batch) -> Batch:
    """``batch`` with its large tensors in page-locked memory, from which copies to a GPU overlap with compute."""

    def pin(tensor: Tensor) -> Tensor:
        return tensor.pin_memory()

    media = batch.media
    if media is not None:
        media = replace(
            media,
            patches=pin(media.patches),
            dest=pin(media.dest),
            tower={name: pin(tensor) for name, tensor in media.tower.items()},
        )
    return replace(
        batch,
        tokens=pin(batch.tokens),
        targets=pin(batch.targets),
        loss_weight=pin(batch.loss_weight),
        positions=pin(batch.positions),
        supervised=pin(batch.supervised),
        media=media,
    )
