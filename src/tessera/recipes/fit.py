"""Whether a model goes with a layout, and what each rank will hold: known from ``config.json`` alone.

A family builds its module on the meta device in milliseconds and without memory. Its sizes are compared with the
layout before a file of weights is opened, in a dry run too, and the same empty module, cut as the real one will be,
says how many parameters each pipeline stage has::

    check      heads, MLP width, vocabulary by tensor ranks; experts by expert ranks; layers by stages
    holdings   which layers, and which ends of the model, each pipeline rank has
    preview    how many parameters and bytes that is
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from tessera import adapt
from tessera.checkpoint.open import Source
from tessera.config.run import Run
from tessera.contract.layout import ParallelLayout
from tessera.contract.plan import Plan, within
from tessera.models.vlm import VLM
from tessera.observe.cost import Weights
from tessera.parallel import apply
from tessera.parallel.mesh import Place
from tessera.recipes.placement import spread_of_run, stages_of


@dataclass(frozen=True, slots=True)
class Holding:
    """What a pipeline rank has of a model: its ``parts`` (ranges of layers), and whether the ends are among them."""

    parts: tuple[range, ...]
    first: bool
    last: bool
    tower: bool

    @property
    def layers(self) -> int:
        """How many layers these are."""
        return sum(len(part) for part in self.parts)

    def __str__(self) -> str:
        spans = ", ".join(f"{part.start}-{part[-1]}" if len(part) > 1 else str(part.start) for part in self.parts)
        ends = [*(["tower"] if self.tower else []), *(["embedding"] if self.first else [])]
        return ", ".join([*ends, f"layers {spans}", *(["head"] if self.last else [])])


def check(run: Run, source: Source, layout: ParallelLayout) -> None:
    """UserError if the model that ``source`` describes cannot be arranged so; reads no weights."""
    if layout.is_single:
        return
    apply.supports(source.plan, layout)
    if not source.plan.tensor:
        return  # data parallel only, which always goes
    model = empty(source)
    apply.check(model.decoder.config, layout, spread_of_run(run))
    if layout.pp > 1:
        cut(run, model, layout, 0)


def empty(source: Source) -> VLM:
    """The model without memory."""
    with torch.device("meta"):
        model = source.family.build(source.config)
    assert isinstance(model, VLM)
    return model


def cut(run: Run, model: VLM, layout: ParallelLayout, stage: int) -> Holding:
    """Reduce ``model`` to what pipeline rank ``stage`` holds, in place; UserError if it cannot be cut."""
    asked = run.parallel
    tower = model.visual is not None
    place = Place(stage * (layout.world // layout.pp), torch.device("meta"), layout)
    parts = stages_of(
        model,
        place,
        asked.virtual_pipeline_model_parallel_size,
        asked.decoder_first_pipeline_num_layers,
        asked.decoder_last_pipeline_num_layers,
    )
    if not parts:
        return Holding((range(model.decoder.config.layers),), True, True, tower)
    spans = tuple(range(int(part.keys[0]), int(part.keys[-1]) + 1) for part in parts)
    return Holding(spans, parts[0].first, parts[-1].last, tower and parts[0].first)


def holdings(run: Run, source: Source, layout: ParallelLayout) -> list[Holding]:
    """What the ranks of each pipeline stage hold; empty for a model whose layers are not ours to cut."""
    if not source.plan.tensor:
        return []
    return [cut(run, empty(source), layout, stage) for stage in range(layout.pp)]


def words(layout: ParallelLayout, held: Iterable[Holding]) -> str:
    """A layout in one line: ``pp2 x dp2, zero2; stage 0: tower, embedding, layers 0-13; stage 1: ...``."""
    copies = f", {layout.replicate} replicas" if layout.replicate > 1 and layout.zero else ""
    stages = [f"stage {index}: {holding}" for index, holding in enumerate(held)] if layout.pp > 1 else []
    return "; ".join([f"{layout}, zero{layout.zero}{copies}", *stages])


def waiting(run: Run, layout: ParallelLayout, stage: int) -> int:
    """For how many microbatches a rank of ``stage`` keeps activations at once, at most."""
    behind, parts = layout.pp - stage - 1, run.parallel.virtual_pipeline_model_parallel_size
    # Interleaved stages begin with twice the depth, and with every part but the last once more.
    most = behind + 1 if parts == 1 else -(-(2 * behind + (parts - 1) * layout.pp + 1) // parts)
    return min(most, run.train.gradient_accumulation_steps)


@dataclass(frozen=True, slots=True)
class Share:
    """A pipeline stage's share of the adapted model: its parameters, all ranks of the stage together.

    ``gathered`` are the bytes of them that one rank has in full while they are not sharded, ``trains`` the groups
    (``llm``, ``vit``, ``aligner``) with something to train. ``holding`` is None for a model that is never cut.
    """

    holding: Holding | None
    weights: Weights
    gathered: int
    trains: frozenset[str]


def preview(run: Run, source: Source, layout: ParallelLayout, itemsize: int) -> list[Share]:
    """Every stage's share of the adapted model, from shapes alone; ``itemsize`` is that of frozen weights.

    Empty for a model whose layers are not ours to cut. A base to be quantised is counted before that.
    """
    if not source.plan.tensor:
        return []
    model = empty(source)
    with torch.device("meta"):
        adapt.apply(model, run.adapt, source.plan, seed=run.train.seed)
    shares = []
    for stage in range(layout.pp):
        part = copy.deepcopy(model) if layout.pp > 1 else model
        holding = cut(run, part, layout, stage)
        shares.append(share_of(part, source.plan, layout, holding, itemsize))
    return shares


def share_of(
    model: nn.Module, plan: Plan, layout: ParallelLayout, holding: Holding | None, itemsize: int | None = None
) -> Share:
    """The share that ``model`` is; with ``itemsize`` as it will lie: frozen weights in that, trained in float32."""
    count = size = trained = trained_size = gathered = 0
    trains: set[str] = set()
    for name, parameter in model.named_parameters():
        each = parameter.element_size() if itemsize is None else 4 if parameter.requires_grad else itemsize
        count, size = count + parameter.numel(), size + parameter.numel() * each
        if parameter.requires_grad:
            trained, trained_size = trained + parameter.numel(), trained_size + parameter.numel() * each
            trains.add(plan.groups.of(name))
        pieces = layout.ep if plan.in_experts(name) else layout.tp if within(plan.groups.llm, name) else 1
        gathered += parameter.numel() * each // pieces
    return Share(holding, Weights(count, size, trained, trained_size), gathered, frozenset(trains))
