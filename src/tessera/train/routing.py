"""What a step learns about the routers: how evenly experts are used, and the loss against favourites.

The load-balancing loss of a sparse layer is ``c E / k * sum_e f[e] P[e]``, with ``f[e]`` the share of the global
batch's tokens that chose expert ``e`` and ``P[e]`` the mean probability it got (Fedus et al., 2021; summed over
layers, as Megatron-LM does). Its gradient flows through ``P`` alone, so ``f`` is needed as a number *before* the first
backward, when nobody has routed yet but the first microbatch. Counting that one alone would make the loss depend on
how a batch is split. The shares used are therefore those of the step before, of the whole global batch: the same
numbers for every microbatch, on every rank, in every layout. The first step takes uniform shares, under which the loss
is constant.

After the step the counts of all microbatches and ranks are added up once, for the log and for the next step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tessera.models.moe import Routing, Shares
from tessera.objectives.balance import balance_loss
from tessera.parallel.mesh import Mesh


@dataclass(slots=True)
class Routers:
    """The sparse layers ``layers`` of the whole model, ``experts`` each, ``top_k`` per token.

    ``shares [L, E] float32`` on the CPU: how often each expert was chosen per token in the step before.
    """

    layers: tuple[int, ...]
    experts: int
    top_k: int
    coefficient: float
    shares: Tensor = field(default_factory=lambda: torch.empty(0))
    _step: list[Routing] = field(default_factory=list)
    _tokens: float = 1.0

    def __post_init__(self) -> None:
        if not self.shares.numel():
            self.shares = torch.full((len(self.layers), self.experts), self.top_k / self.experts)

    def begin(self, tokens: float) -> None:
        """A step of ``tokens`` tokens, over all microbatches and ranks."""
        self._step, self._tokens = [], max(1.0, tokens)

    def fresh(self, rows: int, device: torch.device) -> Routing:
        """What collects the routing of one microbatch, of which the first ``rows`` rows here are real tokens."""
        prices = None
        if self.coefficient:
            scale = self.coefficient * self.experts / (self.top_k * self._tokens)
            rates = (self.shares * scale).to(device, non_blocking=True)
            prices = Shares(dict(zip(self.layers, rates, strict=True)))
        made = Routing(rows, prices, detached=True)
        self._step.append(made)
        return made

    def end(self, mesh: Mesh) -> dict[str, float]:
        """Add everything up over microbatches and ranks; figures for the log."""
        place = {layer: row for row, layer in enumerate(self.layers)}
        sums = torch.zeros(2, len(self.layers), self.experts, dtype=torch.float64)
        for routing in self._step:
            for layer, load in routing.loads.items():
                sums[0, place[layer]] += load.counts.detach().cpu()
                sums[1, place[layer]] += load.probabilities.detach().cpu()
        sums = torch.tensor(mesh.sum(sums.flatten().tolist()), dtype=torch.float64).view_as(sums)
        counts, probabilities = sums
        self._step = []
        loss = balance_loss(
            probabilities, counts, self._tokens, coefficient=len(self.layers) / self.top_k, per_layer=True
        )
        self.shares = (counts / self._tokens).float()
        means = counts.mean(1).clamp_min(1e-9)
        return {
            "balance_loss": float(loss),
            "expert_load_max": float((counts.max(1).values / means).max()),
            "expert_load_min": float((counts.min(1).values / means).min()),
        }

    def state(self) -> list[list[float]]:
        """What the next step needs of this one."""
        return [[float(value) for value in row] for row in self.shares.tolist()]

    def restore(self, state: Sequence[Any]) -> None:
        """Continue from :meth:`state`."""
        self.shares = torch.tensor(state, dtype=torch.float32)
