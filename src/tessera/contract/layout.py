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

from tessera.config.errors import UserError


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """Sizes of the axes; ``zero`` is 0 (parameters replicated over ``shard``) to 3."""

    pp: int = 1
    replicate: int = 1
    shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    zero: int = 2

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
    zero: int = 2,
) -> ParallelLayout:
    """The layout of ``world`` processes with these axes, data parallel over the rest; UserError if it does not fit."""
    model = pp * cp * tp
    if world % model:
        raise UserError(
            f"--pipeline_model_parallel_size {pp} x --context_parallel_size {cp} x --tensor_model_parallel_size {tp} = "
            f"{model} does not divide the {world} processes; change one of them or NPROC_PER_NODE x NNODES",
            exit_code=2,
        )
    data = world // model
    if data % replicate:
        raise UserError(
            f"--data_parallel_replicate_size {replicate} does not divide the {data} data-parallel ranks", exit_code=2
        )
    if zero == 0:
        replicate = data
    stage = data * cp * tp
    if stage // replicate % ep:
        raise UserError(
            f"--expert_model_parallel_size {ep} does not divide the {stage // replicate} ranks that share the layers "
            f"of a stage (data {data // replicate} x context {cp} x tensor {tp})",
            exit_code=2,
        )
    return ParallelLayout(pp, replicate, data // replicate, cp, tp, ep, zero)
