"""The seams of a model that is spread over ranks; what each does is in the file of its kind of parallelism."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tessera.contract.batch import Route, Shard
from tessera.contract.seams import Seams
from tessera.parallel.balance import deliver
from tessera.parallel.collectives import Gather, Scatter
from tessera.parallel.context import GatherKeys, to_heads, to_rows
from tessera.parallel.mesh import Mesh
from tessera.parallel.tensor import SplitVocabulary


class RankSeams(Seams):
    """The seams of one rank among several; see :class:`~tessera.contract.seams.Seams`."""

    def __init__(self, mesh: Mesh, vocabulary: int, exchange_axis: str) -> None:
        layout = mesh.layout
        self._tensor: ProcessGroup | None = mesh.group("tp") if layout.tp > 1 else None
        self._context: ProcessGroup | None = mesh.group("cp") if layout.cp > 1 else None
        self._exchange = mesh.group(exchange_axis)
        if self._tensor is not None:
            self.vocabulary = SplitVocabulary(vocabulary, self._tensor)

    def gather(self, x: Tensor) -> Tensor:
        if self._tensor is None:
            return x
        out: Tensor = Gather.apply(x, self._tensor)
        return out

    def scatter(self, x: Tensor) -> Tensor:
        if self._tensor is None:
            return x
        out: Tensor = Scatter.apply(x, self._tensor)
        return out

    def before_attention(self, q: Tensor, k: Tensor, v: Tensor, shard: Shard) -> tuple[Tensor, Tensor, Tensor]:
        if self._context is None:
            return q, k, v
        assert shard.gathered is not None
        if shard.keys is not None:
            both = GatherKeys.apply(torch.cat([k, v], dim=1), shard.gathered, self._context)
            k, v = both.split([k.shape[1], v.shape[1]], dim=1)
            return q, k, v
        q, k, v = (to_heads(x, shard.gathered, self._context) for x in (q, k, v))
        return q, k, v

    def after_attention(self, out: Tensor, shard: Shard) -> Tensor:
        if self._context is None or shard.keys is not None:
            return out
        assert shard.inverse is not None
        return to_rows(out, shard.inverse, self._context)

    def exchange(self, features: Tensor, route: Route) -> Tensor:
        return deliver(features, route, self._exchange)
