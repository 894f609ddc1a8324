"""How many ranks share what: the sizes of the parallel axes, as data.

The ranks of a run form a grid. From the slowest to the fastest axis::

    pp   pipeline: each stage holds some of the layers
    dp   data: replicas (``replicate`` x ``shard``), each with batches of its own; parameters are sharded over ``shard``
    cp   context: the tokens of a batch are divided
    tp   tensor: the heads, the columns of the MLP and the vocabulary are divided; neighbours, on one machine

Experts see the same ranks of a stage in another way: ``dp x cp x tp == edp x ep``, each of ``ep`` ranks holding
``experts / ep`` of them. Which number a layout needs is arithmetic, so a wrong one is refused before anything starts.
"""

from __future__ import annotations

from dataclasses import dataclass

from tessera.config.parallel import DEFAULT_ZERO, divided
from tessera.config.run import Run


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """Sizes of the axes; ``zero`` is 0 (parameters replicated over ``shard``) to 3."""

    pp: int = 1
    replicate: int = 1
    shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    zero: int = DEFAULT_ZERO

    @property
    def world(self) -> int:
        """Processes of the run."""
        return self.pp * self.replicate * self.shard * self.cp * self.tp

    @property
    def dp(self) -> int:
        """Ranks with batches of their own."""
        return self.replicate * self.shard

    @property
    def is_single(self) -> bool:
        return self.world == 1

    def __str__(self) -> str:
        axes = {"pp": self.pp, "dp": self.dp, "cp": self.cp, "tp": self.tp, "ep": self.ep}
        return " x ".join(f"{name}{size}" for name, size in axes.items() if size > 1) or "one process"


def layout_of(
    world: int,
    *,
    pp: int = 1,
    cp: int = 1,
    tp: int = 1,
    ep: int = 1,
    replicate: int = 1,
    zero: int = DEFAULT_ZERO,
) -> ParallelLayout:
    """The layout of ``world`` processes with these axes, data parallel over the rest; UserError if it does not fit."""
    replicate, shard = divided(world, pp=pp, cp=cp, tp=tp, ep=ep, replicate=replicate, zero=zero)
    return ParallelLayout(pp, replicate, shard, cp, tp, ep, zero)


def layout_of_run(run: Run, world: int) -> ParallelLayout:
    """The layout of ``world`` processes that the flags ask for; UserError if they do not fit."""
    asked = run.parallel
    return layout_of(
        world,
        pp=asked.pipeline_model_parallel_size,
        cp=asked.context_parallel_size,
        tp=asked.tensor_model_parallel_size,
        ep=asked.expert_model_parallel_size,
        replicate=asked.data_parallel_replicate_size,
        zero=DEFAULT_ZERO if asked.zero_stage is None else asked.zero_stage,
    )
