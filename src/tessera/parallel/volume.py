"""How many bytes a rank sends in one optimiser step, as formulas: what a layout costs before anything runs.

Each kind of parallelism sends something of its own, over ranks of its own::

    fsdp    parameters gathered, gradients reduced, once a step or per microbatch (``zero``)     fsdp, stage, edp
    tp      4 gathers and scatters of [n, H] a layer, statistics of the vocabulary, shared gradients     tp
    cp      keys and values of a layer, or (a2a) queries, keys, values and results                       cp
    ep      routed rows to the ranks of their experts and back                                           ep
    pp      the residual stream over every border between stages                                         pp
    tower   pixels to the rank that encodes them, features to the rank that holds their tokens     stage or model

A step sends what its microbatches (:class:`Work`) make of what this rank holds (:class:`Held`, read off a model that
may lie on the meta device, before it is spread). The convention is that of a ring over ``W`` ranks: of a tensor of size
``S`` a rank sends ``(W - 1) / W * S`` in an all-gather, a reduce-scatter or an all-to-all of equal parts, twice that
in an all-reduce, and all of it to another stage. The benchmark ``bench/communication.py`` counts every collective of a
step and finds these numbers, to the byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn

from tessera.contract.layout import ParallelLayout
from tessera.contract.plan import Plan, within
from tessera.parallel import fsdp, tensor

GRADIENT = 4
"""Bytes of a gradient's element: gradients are reduced in float32."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Parameters that are gathered as one over ``axis``: elements, padded so that the ranks of the axis divide them.

    ``trained`` of them have gradients, ``shared`` are gradients that tensor ranks sum beforehand (not padded). With
    ``again`` they are gathered for the backward pass too, if they do not stay.
    """

    axis: str
    elements: int
    trained: int
    shared: int
    again: bool


@dataclass(frozen=True, slots=True)
class Held:
    """What one rank holds of a model: FSDP units and the layers between which activations travel.

    ``first`` and ``last`` say whether the model's first and last layer are here. ``levels`` is how many features an
    image token has. In a pipeline there are ``borders`` to send something over, and ``tied`` are the elements of this
    rank's shard of an embedding that lies on the first and on the last stage.
    """

    units: tuple[Unit, ...]
    hidden: int
    head_dim: int
    heads: int
    kv_heads: int
    dense: int
    sparse: int
    first: bool = True
    last: bool = True
    embedding_learns: bool = True
    tower_learns: bool = True
    levels: int = 1
    borders: int = 0
    tied: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """One microbatch as this rank sees it.

    ``rows`` of its context rank (of all tensor ranks together), ``supervised`` ones among them. What goes where by its
    content is counted in rows to (``out``) and from (``back``) other ranks: image features, and routed tokens summed
    over the sparse layers. ``pixels`` are the bytes sent to other encoders.
    """

    rows: int
    supervised: int
    features_out: int = 0
    features_back: int = 0
    pixels: int = 0
    routed_out: int = 0
    routed_back: int = 0


@dataclass(frozen=True, slots=True)
class Choices:
    """What else decides: ``itemsize`` of parameters and activations in computation, recomputation of decoder layers."""

    itemsize: int = 4
    cp_comm: str = "allgather"
    recompute: bool = False
    exchange: str = "stage"


@dataclass(frozen=True, slots=True)
class Flow:
    """``sent`` bytes of one ``kind`` per step by this rank, in an ``operation`` along ``axis``, and why so many."""

    kind: str
    operation: str
    axis: str
    formula: str
    sent: int


def size(layout: ParallelLayout, axis: str) -> int:
    """Ranks along an axis or group of axes, as :class:`~tessera.parallel.mesh.Mesh` names them."""
    data = layout.shard * layout.cp
    grouped = {"fsdp": data, "stage": data * layout.tp, "model": layout.cp * layout.tp, "ends": min(layout.pp, 2)}
    grouped |= {"edp": data * layout.tp // layout.ep, "ep": layout.ep}
    single = {"pp": layout.pp, "replicate": layout.replicate, "shard": layout.shard, "cp": layout.cp, "tp": layout.tp}
    return (grouped | single)[axis]


def held(model: nn.Module, plan: Plan, layout: ParallelLayout, stages: Sequence[nn.Module] = ()) -> Held:
    """What this rank holds of ``model``: all of it, or what a pipeline has left it, with its ``stages``.

    The model has not been spread yet; it may be adapted, and lie on the meta device.
    """
    decoder: Any = model.get_submodule(plan.groups.llm[0])
    config = decoder.config
    inside = [name for name in decoder.layers if config.moe is not None and int(name) in config.moe.layers]
    named = dict(model.named_parameters())
    vision = (*plan.groups.vit, *plan.groups.aligner)
    seen = [parameter for name, parameter in named.items() if within(vision, name)]
    first, last = "0" in decoder.layers, str(config.layers - 1) in decoder.layers
    embedding: Tensor | None = decoder.embed_tokens.weight if first or (last and config.tied) else None
    tower: Any = model.get_submodule(plan.groups.vit[0]) if plan.groups.vit and first else None
    tied = 0
    if stages and config.tied and embedding is not None and embedding.requires_grad:
        tied = -(-embedding.shape[0] // layout.tp // size(layout, "fsdp")) * embedding.shape[1]
    return Held(
        units=tuple(_units(model, plan, layout, stages)),
        hidden=config.hidden,
        head_dim=config.head_dim,
        heads=config.heads // layout.tp,
        kv_heads=config.kv_heads // layout.tp,
        dense=len(decoder.layers) - len(inside),
        sparse=len(inside),
        first=first,
        last=last,
        embedding_learns=embedding is not None and embedding.requires_grad,
        tower_learns=any(parameter.requires_grad for parameter in seen),
        levels=1 + (len(tower.config.deepstack) if tower is not None else 0),
        borders=2 * len(stages) - first - last if stages else 0,
        tied=tied,
    )


def _units(model: nn.Module, plan: Plan, layout: ParallelLayout, stages: Sequence[nn.Module]) -> list[Unit]:
    axes = fsdp.units(model, plan, layout)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    mine: dict[str, list[str]] = {name: [] for name in axes}
    rest: list[str] = []
    for name in names.values():
        inner = [unit for unit in axes if within([unit], name)]
        (mine[max(inner, key=len)] if inner else rest).append(name)
    roots = [rest]
    if stages:
        roots = [[names[id(p)] for p in stage.parameters() if names[id(p)] in rest] for stage in stages]
    idle = fsdp.passed_by(model, plan, axes)
    made = [_unit(model, plan, layout, axes[unit], held, unit not in idle) for unit, held in mine.items()]
    return made + [_unit(model, plan, layout, "fsdp", held, False) for held in roots]


def _unit(model: nn.Module, plan: Plan, layout: ParallelLayout, axis: str, names: Sequence[str], again: bool) -> Unit:
    ranks, elements, trained, shared = size(layout, axis), 0, 0, 0
    for name in names:
        parameter = model.get_parameter(name)
        shape, whole = list(parameter.shape), False
        module, _, leaf = name.rpartition(".")
        if plan.in_experts(module):
            shape[0] //= layout.ep
        elif layout.tp > 1 and within(plan.groups.llm, name):
            dim = tensor.split_dim(plan, module, leaf)
            whole = dim is None
            if dim is not None:
                shape[dim] //= layout.tp
        padded = -(-shape[0] // ranks) * ranks * prod(shape[1:])
        elements += padded
        if parameter.requires_grad:
            trained += padded
            shared += prod(shape) if whole else 0
    return Unit(axis, elements, trained, shared, again)


def volume(layout: ParallelLayout, held: Held, work: Sequence[Work], choices: Choices) -> dict[str, int]:
    """Bytes that this rank sends in a step of the microbatches ``work``, by kind; see the module docstring."""
    sent: dict[str, int] = {}
    for flow in flows(layout, held, work, choices):
        sent[flow.kind] = sent.get(flow.kind, 0) + flow.sent
    return sent


def flows(layout: ParallelLayout, held: Held, work: Sequence[Work], choices: Choices) -> list[Flow]:
    """The same, collective by collective, with the formula of each."""
    made = [
        *_parameters(layout, held, len(work), choices),
        *_tensor(layout, held, work, choices),
        *_context(layout, held, work, choices),
        *_experts(layout, held, work, choices),
        *_pipeline(layout, held, work, choices),
        *_tower(layout, held, work, choices),
    ]
    return [flow for flow in made if flow.sent and size(layout, flow.axis) > 1]


def _parameters(layout: ParallelLayout, held: Held, microbatches: int, choices: Choices) -> list[Flow]:
    m, found = microbatches, []
    anew = layout.zero == 3 and layout.pp == 1
    reductions = m if layout.zero >= 2 and layout.pp == 1 else 1
    often = f"{reductions} x " if reductions > 1 else ""
    for axis in ("fsdp", "stage", "edp"):
        units, ranks = [unit for unit in held.units if unit.axis == axis], size(layout, axis)
        gathered = 0
        for unit in units:
            times = 1 if not anew else 2 * m if unit.again else m
            gathered += times * unit.elements * choices.itemsize
        why = "P, once" if not anew else f"{2 * m} P ({m} P of what backward needs no more)"
        found.append(Flow("fsdp", "all-gather", axis, f"(W-1)/W x {why}", gathered // ranks * (ranks - 1)))
        reduced = sum(unit.trained for unit in units) * GRADIENT
        sent = reductions * reduced // ranks * (ranks - 1)
        found.append(Flow("fsdp", "reduce-scatter", axis, f"{often}(W-1)/W x G", sent))
        replicas = layout.replicate
        sent = 2 * (replicas - 1) * (reduced // ranks) // replicas
        found.append(Flow("fsdp", "all-reduce", "replicate", f"2 (R-1)/R x G/{ranks}", sent))
    # Gradients that wait for the step's last backward wait in float32.
    wide = GRADIENT if layout.pp > 1 or (m > 1 and layout.zero < 2) else choices.itemsize
    shared = reductions * sum(2 * (layout.tp - 1) * unit.shared * wide // layout.tp for unit in held.units)
    found.append(Flow("fsdp", "all-reduce", "tp", f"{often}2 (W-1)/W x gradients of what is not split", shared))
    return found


def _tensor(layout: ParallelLayout, held: Held, work: Sequence[Work], choices: Choices) -> list[Flow]:
    tp, row = layout.tp, held.hidden * choices.itemsize
    again = (2 * held.dense + held.sparse) if choices.recompute else 0
    # A checkpoint stops once it has what it saved: a dense layer's last scatter is not repeated, a sparse one's is.
    scattered_again = (held.dense + held.sparse) if choices.recompute else 0
    layers = 2 * held.dense + held.sparse
    started = held.embedding_learns or held.tower_learns or not held.first
    gathers = layers + again + held.last + (layers + (held.first and held.embedding_learns))
    scatters = layers + scattered_again + held.first + (layers - (not started) + held.last)
    found, statistics = [], 0
    for operation, times in (("all-gather", gathers), ("reduce-scatter", scatters)):
        sent = sum(times * part.rows * row * (tp - 1) // tp for part in work)
        found.append(Flow("tp", operation, "tp", f"m {times} (W-1)/W x n H", sent))
    if held.last:  # highest and target logit, normaliser: 4 bytes; whose is the highest: 8
        statistics = sum(2 * (tp - 1) * 20 * part.supervised // tp for part in work)
    found.append(Flow("tp", "all-reduce", "tp", "m 2 (W-1)/W x 20 L", statistics))
    return found


def _context(layout: ParallelLayout, held: Held, work: Sequence[Work], choices: Choices) -> list[Flow]:
    cp, layers = layout.cp, held.dense + held.sparse
    again = layers if choices.recompute else 0
    if choices.cp_comm == "a2a":
        heads = 2 * held.heads + 2 * (held.kv_heads if held.kv_heads >= cp else cp)
        times = 2 * layers + again
        sent = sum(times * part.rows * heads * held.head_dim * choices.itemsize * (cp - 1) // cp for part in work)
        return [Flow("cp", "all-to-all", "cp", f"m {times} (W-1)/W x n {heads} D", sent)]
    one = [part.rows * 2 * held.kv_heads * held.head_dim * choices.itemsize * (cp - 1) for part in work]
    width = f"n 2 {held.kv_heads} D"
    return [
        Flow("cp", "all-gather", "cp", f"m {layers + again} (W-1) x {width}", (layers + again) * sum(one)),
        Flow("cp", "reduce-scatter", "cp", f"m {layers} (W-1) x {width}", layers * sum(one)),
    ]


def _experts(layout: ParallelLayout, held: Held, work: Sequence[Work], choices: Choices) -> list[Flow]:
    out, back = sum(part.routed_out for part in work), sum(part.routed_back for part in work)
    passes = 3 if choices.recompute else 2
    sent = passes * (out + back) * held.hidden * choices.itemsize
    return [Flow("ep", "all-to-all", "ep", f"{passes} x (rows out + rows back) H", sent)]


def _pipeline(layout: ParallelLayout, held: Held, work: Sequence[Work], choices: Choices) -> list[Flow]:
    stream = sum(part.rows // layout.tp for part in work) * held.hidden * choices.itemsize
    return [
        Flow("pp", "send", "pp", f"m {held.borders} x n/tp H", held.borders * stream),
        Flow("pp", "all-reduce", "ends", "2 (W-1)/W x embedding's gradient", held.tied * GRADIENT),
    ]


def _tower(layout: ParallelLayout, held: Held, work: Sequence[Work], choices: Choices) -> list[Flow]:
    out, back = sum(part.features_out for part in work), sum(part.features_back for part in work)
    rows = out + (back if held.tower_learns else 0)
    features = rows * held.hidden * held.levels * choices.itemsize
    return [
        Flow("tower", "all-to-all", choices.exchange, "features out + gradients back", features),
        Flow("tower", "all-to-all", choices.exchange, "pixels of images others encode", sum(p.pixels for p in work)),
    ]
