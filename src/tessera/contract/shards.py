"""Which part of a tensor lies on this rank, and who speaks for it.

However a model is spread, what a rank holds of a parameter is a box: a range of every dimension. A row-split weight
under data parallelism, for instance::

    W [8, 6] over 2 tensor ranks (columns) x 2 data ranks (rows)      rank (1, 0): [0:4, 3:6]

That box is all that reading, writing and initialising need: they take the same box of a file or of a random tensor,
and no rank ever sees the rest. Some boxes lie on several ranks (replicas); the first of them, at coordinate 0 along
every replicated axis, *speaks* for it. Ordinary tensors are boxes that begin at zero.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

Part = tuple[slice, ...]
"""A region of a tensor, one slice with both ends per dimension."""


def plain(tensor: Tensor) -> bool:
    """Whether ``tensor`` is an ordinary tensor (and torch.distributed need not be imported)."""
    return type(tensor) in (Tensor, nn.Parameter)


def whole(shape: tuple[int, ...]) -> Part:
    """The region that is everything."""
    return tuple(slice(0, size) for size in shape)


def held(tensor: Tensor) -> Part:
    """The region of ``tensor`` that this rank holds."""
    if plain(tensor):
        return whole(tuple(tensor.shape))
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(tensor, DTensor), f"a {type(tensor).__name__} has no known place"
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def local(tensor: Tensor) -> Tensor:
    """The values of :func:`held`, as an ordinary tensor that shares its memory."""
    if plain(tensor):
        return tensor.detach()
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor), f"a {type(tensor).__name__} has no known place"
    values = tensor.to_local()
    assert isinstance(values, Tensor)
    return values.detach()


def speaks(tensor: Tensor) -> bool:
    """Whether this rank is the first of those that hold its region of a sharded ``tensor``."""
    if plain(tensor):
        return True
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor), f"a {type(tensor).__name__} has no known place"
    place = tensor.device_mesh.get_coordinate()
    assert place is not None
    return all(at == 0 for at, kind in zip(place, tensor.placements, strict=True) if kind.is_replicate())


@torch.no_grad()
def keep(tensor: Tensor, value: Tensor) -> None:
    """Copy this rank's region of ``value``, a whole tensor, into ``tensor``."""
    local(tensor).copy_(value[held(tensor)])
