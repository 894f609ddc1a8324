"""This rank's part of a sharded tensor (DTensor), and who speaks for it.

The box that a rank holds (see :mod:`tessera.contract.shards`) may lie on several ranks. The first of them, at
coordinate 0 along every replicated axis, *speaks* for it: it writes the box, the others don't. An FSDP shard of a
tensor-split weight is a box, too, although both cut dimension 0: data ranks share what one tensor rank has. Ordinary
tensors are boxes that begin at zero. This module is a :class:`~tessera.contract.shards.Shards`.
"""

from __future__ import annotations

from torch import Tensor, nn

from tessera.contract.shards import Part, whole


def plain(tensor: Tensor) -> bool:
    """Whether ``tensor`` is an ordinary tensor (and torch.distributed need not be imported)."""
    return type(tensor) in (Tensor, nn.Parameter)


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
