"""A stage of a pipeline: some consecutive layers of a model, run on their own.

The first stage also has the tower and the embedding, the last one the final norm, the head and the objective::

    stage 0   tower, embedding, layers 0 1 2      batch         -> x [n, H]
    stage 1   layers 3 4 5                        x, batch      -> x [n, H]
    stage 2   layers 6 7, norm, head, objective   x, batch      -> the loss, a number

Every stage holds the same batches: what travels is the residual stream, everything else (positions, segments, targets)
is integers that each stage has already. A stage's modules are those of the model, under the same names; a rank builds
the whole model without memory (meta), keeps what its stages need (:func:`keep`) and forgets the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tessera.contract.batch import Batch
from tessera.contract.model import LossSum, Objective
from tessera.models.moe import Routing
from tessera.models.vlm import VLM, Trunk


def keep(model: VLM, layers: Sequence[range], *, first: bool, last: bool) -> None:
    """Remove from ``model`` what none of this rank's stages runs; a tied embedding stays on the last stage too."""
    decoder = model.decoder
    mine = {str(index) for part in layers for index in part}
    for key in [key for key in decoder.layers if key not in mine]:
        del decoder.layers[key]
    if not first and isinstance(model.model, Trunk):
        model.model.blind()
    if not first and not (last and model.lm_head is None):
        del decoder.embed_tokens
    if not last:
        del decoder.norm
        model.lm_head = None


def unwatched(batch: Batch) -> Routing | None:
    """Nobody wants to know what the routers do."""
    return None


class Stage(nn.Module):
    """``layers`` of ``model``; see the module docstring. :meth:`give` sets what the next passes are about."""

    def __init__(self, model: VLM, layers: range, *, first: bool, last: bool) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple: not a child, only the parts below are
        self.keys = tuple(str(index) for index in layers)
        self.first, self.last = first, last
        decoder = model.decoder
        self.layers = nn.ModuleList([decoder.layers[key] for key in self.keys])
        trunk = model.model
        self.seeing = nn.ModuleList(trunk.seeing) if first and isinstance(trunk, Trunk) else None
        tied = last and model.lm_head is None
        self.embedding = decoder.embed_tokens if first or tied else None
        self.norm = decoder.norm if last else None
        self.head = model.lm_head if last else None
        self._batches: Sequence[Batch] = ()
        self._objective: Objective | None = None
        self._weight = 1.0
        self._dtype = torch.float32
        self._watch: Callable[[Batch], Routing | None] = unwatched
        self.sums: list[LossSum] = []

    def give(
        self,
        batches: Sequence[Batch],
        objective: Objective,
        weight: float,
        dtype: torch.dtype,
        watch: Callable[[Batch], Routing | None] = unwatched,
    ) -> None:
        """The microbatches (on the device) of the step to come, what their losses are divided by, the compute dtype.

        ``watch`` makes what collects the routing of a microbatch.
        """
        self._batches, self._objective, self._weight, self._dtype = batches, objective, weight, dtype
        self._watch = watch
        self.sums = []

    def forward(self, carried: Tensor, index: Tensor) -> Tensor:
        """Microbatch ``index [1]`` (on the CPU): the rows ``[n, H]`` for the next stage, or the loss over ``weight``.

        ``carried`` are the rows of the stage before; the first stage takes the index there too.
        """
        (model,) = self._model
        batch = self._batches[int(index)]
        with torch.autocast(batch.tokens.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            start = None if self.first else carried
            out = model.run(batch, start, self.keys, last=self.last, routing=self._watch(batch))
            if not self.last:
                # A stage without anything to train still takes part in the backward pass of the ones behind it.
                return out if out.requires_grad or not torch.is_grad_enabled() else out.requires_grad_()
            assert self._objective is not None
            loss = model.loss(out, self._objective, batch)
        self.sums.append(LossSum(loss.total.detach(), loss.weight, loss.metrics))
        return loss.total / self._weight
