"""Pipeline parallelism: the layers of a model over ranks that work on different microbatches at the same time.

The schedules are torch's (``torch.distributed.pipelining``); ours are the cut points and what a stage is given. Torch
cuts a batch by rows, which images do not have; so what it is asked to cut here is the list of microbatch *numbers*, and
each stage looks its microbatch up (every stage loads the same batches). The residual stream ``[n, H]`` is all that
travels, ``2 (S - 1) m n H`` numbers a step over ``S - 1`` borders, forward and backward.

    1f1b          one stage per rank; idle share (p - 1) / (m + p - 1) for p ranks and m microbatches (PipeDream-flush)
    interleaved   v stages per rank, v times as many borders; idle share (p - 1) / (v m + p - 1) (Megatron-LM v2)
    zero_bubble   backward split into its two products, the weights' one fills the gaps (Qi et al., 2023)

Buffers have one size, so the microbatches of a step are filled up to the longest. Gradients are reduced once, after the
last backward; FSDP units stay gathered for the step (a schedule that splits backward would lose gradients otherwise).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from tessera.config.errors import UserError
from tessera.contract.batch import Batch
from tessera.contract.model import LossSum, Objective
from tessera.parallel.mesh import Mesh

SCHEDULES = {"1f1b": "1F1B", "interleaved": "Interleaved1F1B", "zero_bubble": "InterleavedZeroBubble"}


Watch = Callable[[Batch], Any]
"""Makes what collects the routing of a microbatch."""


class StageModule(Protocol):
    """What a pipeline needs of a stage; see ``models/stage.py``."""

    sums: list[LossSum]

    def give(
        self, batches: Sequence[Batch], objective: Objective, weight: float, dtype: torch.dtype, watch: Watch = ...
    ) -> None: ...


def cuts(layers: int, stages: int, *, first: int | None = None, last: int | None = None) -> list[range]:
    """The layers of each of ``stages`` stages, ``first`` and ``last`` of them on the outer ones if given.

    What does not divide goes to the inner stages first, then to stage 0: the last one has the head already. UserError
    if a stage would be empty.
    """
    inner = stages - (first is not None) - (last is not None)
    rest = layers - (first or 0) - (last or 0)
    if layers < stages or (rest < inner if inner else rest != 0) or min(first or 1, last or 1) < 1:
        given = f" with {first} layers on the first and {last} on the last" if first or last else ""
        raise UserError(
            f"--pipeline_model_parallel_size: {layers} layers cannot be cut into {stages} stages{given}; "
            "every stage needs a layer",
            exit_code=2,
        )
    fixed = {0: first, stages - 1: last}
    free = [stage for stage in range(stages) if fixed.get(stage) is None]
    sizes = dict.fromkeys(free, rest // inner if inner else 0)
    for index in sorted(free, key=lambda stage: (stage in fixed, stage))[: rest - sum(sizes.values())]:
        sizes[index] += 1
    sizes |= {stage: size for stage, size in fixed.items() if size is not None}
    starts = [sum(sizes[i] for i in range(stage)) for stage in range(stages + 1)]
    return [range(start, end) for start, end in pairwise(starts)]


@dataclass(slots=True)
class Pipeline:
    """This rank's stages, and how a step runs through them.

    ``indices[i]`` is the position of ``stages[i]`` among all ``count`` stages. ``tied`` is the embedding where the last
    stage holds a copy of it (on both ends), else None.
    """

    mesh: Mesh
    stages: Sequence[nn.Module]
    indices: Sequence[int]
    count: int
    hidden: int
    kind: str = "1f1b"
    tied: nn.Parameter | None = None
    _ends: Any = None
    _held: dict[tuple[int, int, bool], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._ends = _ends_group(self.mesh)

    @property
    def twin(self) -> nn.Parameter | None:
        """The copy of a tied embedding that must not count twice in a norm: the one on the last stage."""
        return self.tied if self.mesh.is_last_stage else None

    def run(
        self,
        batches: Sequence[Batch],
        objective: Objective,
        weight: float,
        dtype: torch.dtype,
        watch: Watch = lambda batch: None,
    ) -> LossSum:
        """Forward and backward of all microbatches; this rank's sums (zero but on the last stage)."""
        self._give(batches, objective, weight, dtype, watch)
        schedule = self._schedule(len(batches), batches[0].num_tokens, dtype, backward=True)
        index = torch.arange(len(batches))
        with _quiet():
            schedule.step(*self._start(index), index=index, target=index, return_outputs=False)
        if self.tied is not None and self.tied.grad is not None:
            grad = cast(Any, self.tied.grad)
            dist.all_reduce(grad.to_local(), group=self._ends)
        return self._sums(weight)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], objective: Objective, dtype: torch.dtype) -> list[LossSum]:
        """Forward of all microbatches; their sums on the last stage, nothing on the others."""
        self._give(batches, objective, 1.0, dtype, lambda batch: None)
        # The schedules want a microbatch per rank and, interleaved, multiples of that: the last one fills up.
        pp = self.mesh.layout.pp
        count = -(-len(batches) // pp) * pp
        schedule = self._schedule(count, batches[0].num_tokens, dtype, backward=False)
        index = torch.arange(count).clamp(max=len(batches) - 1)
        with _quiet():
            schedule.eval(*self._start(index), index=index, target=index, return_outputs=False)
        return [loss for stage in self.stages for loss in cast(StageModule, stage).sums[: len(batches)]]

    def _give(
        self, batches: Sequence[Batch], objective: Objective, weight: float, dtype: torch.dtype, watch: Watch
    ) -> None:
        assert len({batch.num_tokens for batch in batches}) == 1, "microbatches of a step are filled up to one size"
        for stage in self.stages:
            cast(StageModule, stage).give(batches, objective, weight, dtype, watch)

    def _start(self, index: Tensor) -> tuple[Tensor, ...]:
        return (index,) if 0 in self.indices else ()

    def _sums(self, weight: float) -> LossSum:
        found = [loss for stage in self.stages for loss in cast(StageModule, stage).sums]
        metrics: dict[str, Tensor] = {}
        for loss in found:
            for name, value in loss.metrics.items():
                metrics[name] = metrics[name] + value if name in metrics else value
        total = torch.zeros((), dtype=torch.float32, device=self.mesh.device)
        return LossSum(sum((loss.total for loss in found), total), weight, metrics)

    def _schedule(self, count: int, rows: int, dtype: torch.dtype, *, backward: bool) -> Any:
        """torch's schedule for so many microbatches of so many rows; the latest ones are kept."""
        key = (count, rows, backward)
        if key not in self._held:
            if len(self._held) > 8:
                self._held.clear()
            self._held[key] = self._made(count, rows, dtype)
        return self._held[key]

    def _made(self, count: int, rows: int, dtype: torch.dtype) -> Any:
        pp = self.mesh.layout.pp
        if count < pp:
            raise UserError(
                f"--gradient_accumulation_steps: a pipeline of {pp} ranks needs as many microbatches in "
                f"a step to be filled, and there are {count}"
            )
        if count % pp and self.kind != "1f1b":
            raise UserError(
                f"--pipeline_schedule {self.kind} needs a multiple of {pp} microbatches in a step, not {count}; "
                "change --gradient_accumulation_steps"
            )
        carried = torch.empty(rows // self.mesh.layout.tp, self.hidden, dtype=dtype, device="meta", requires_grad=True)
        number = torch.empty(1, dtype=torch.int64, device="meta")
        loss = torch.empty((), dtype=torch.float32, device="meta", requires_grad=True)
        stages = [
            PipelineStage(
                module,
                index,
                self.count,
                self.mesh.device,
                input_args=(number if index == 0 else carried,),
                output_args=(loss if index == self.count - 1 else carried,),
                input_grads=(None if index == 0 else carried.detach(),),
                output_grads=(None if index == self.count - 1 else carried.detach(),),
                group=self.mesh.group("pp"),
            )
            for index, module in zip(self.indices, self.stages, strict=True)
        ]
        kind: Any = get_schedule_class(SCHEDULES[self.kind])
        several = self.kind != "1f1b"
        return kind(stages if several else stages[0], count, loss_fn=lambda out, _: out, scale_grads=False)


def _ends_group(mesh: Mesh) -> Any:
    """The first and the last stage of this rank's pipeline; every rank of the run takes part in making all of them."""
    layout = mesh.layout
    width = layout.world // layout.pp
    mine = None
    for offset in range(width):
        group = dist.new_group([offset, offset + (layout.pp - 1) * width])
        if mesh.rank % width == offset:
            mine = group
    return mine


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remarks about a scheduler that is told everything it would otherwise infer."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")
        yield
