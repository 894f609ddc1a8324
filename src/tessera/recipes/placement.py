"""From flags to a model in its place: the layout of ranks, the weights, the adapter, the split.

The order matters. The empty model is adapted and spread over the ranks first, A and B following their base, so that
each rank reads only its own bytes of every file; then adapters get their values, slice by slice. A base that is stored
in few bits is the exception: its layers are packed from whole weights, so every rank reads the whole model first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from tessera import adapt
from tessera.checkpoint import open as door
from tessera.config.errors import UserError
from tessera.config.run import Run
from tessera.contract.memory import Recompute
from tessera.contract.plan import Plan
from tessera.models.moe import MoE
from tessera.models.stage import Stage, keep
from tessera.models.vlm import VLM, Trunk
from tessera.parallel import apply
from tessera.parallel.apply import Spread
from tessera.parallel.mesh import Mesh, Place
from tessera.train.offload import HostStore
from tessera.train.routing import Routers
from tessera.weights import shards

if TYPE_CHECKING:
    from tessera.parallel.pipeline import Pipeline


def spread_of_run(run: Run) -> Spread:
    """How the model's work is spread beyond the layout's sizes."""
    return Spread(cp_comm=run.parallel.cp_comm_type, vision_balance=run.parallel.vision_balance)


def stages_of(
    model: VLM, mesh: Place, chunks: int = 1, first: int | None = None, last: int | None = None
) -> list[Stage]:
    """This rank's stages of ``model``, ``chunks`` of them; the model keeps nothing else. Empty without a pipeline.

    UserError if the layers cannot be cut so, or deepstack features would have to travel.
    """
    pp = mesh.layout.pp
    if pp == 1:
        return []
    from tessera.parallel.pipeline import cuts

    parts = cuts(model.decoder.config.layers, pp * chunks, first=first, last=last)
    levels = model.model.levels if isinstance(model.model, Trunk) else 0
    if levels > len(parts[0]):
        raise UserError(
            f"--pipeline_model_parallel_size {pp}: the tower's {levels} deepstack levels enter the first {levels} "
            f"layers, which must all be on the first stage (it has {len(parts[0])}); "
            f"add --decoder_first_pipeline_num_layers {levels}, or use fewer stages",
            exit_code=2,
        )
    mine = range(mesh.at("pp"), pp * chunks, pp)
    ends = 0 in mine, pp * chunks - 1 in mine
    keep(model, [parts[index] for index in mine], first=ends[0], last=ends[1])
    return [Stage(model, parts[index], first=index == 0, last=index == pp * chunks - 1) for index in mine]


def pipeline_of(model: VLM, stages: Sequence[Stage], mesh: Mesh, kind: str) -> Pipeline | None:
    """What runs ``stages``, after the model was spread; None without a pipeline."""
    if not stages:
        return None
    from tessera.parallel.pipeline import Pipeline

    pp, chunks = mesh.layout.pp, len(stages)
    indices = range(mesh.at("pp"), pp * chunks, pp)
    decoder = model.decoder
    ends = mesh.at("pp") in (0, pp - 1)
    tied = cast(nn.Parameter, decoder.embed_tokens.weight) if decoder.config.tied and ends else None
    return Pipeline(mesh, stages, indices, pp * chunks, decoder.config.hidden, kind, tied)


@dataclass(frozen=True, slots=True)
class Placed:
    """A model (or what this rank holds of it) ready to train; ``pipeline`` runs it if it is cut into stages."""

    model: nn.Module
    adaptation: adapt.Adaptation
    pipeline: Pipeline | None


def load_model(run: Run, source: door.Source, mesh: Mesh, dtype: torch.dtype) -> Placed:
    """The model with its weights, adapted, with recomputation set, and spread over the mesh.

    What is trained is kept in float32 and what is frozen in ``dtype``; matrix products run in ``dtype`` either way.
    The empty model is spread first, so that each rank reads only its own bytes of every file; with ``--quant_method``
    every rank reads the whole model, because packing a layer needs all of its weight.
    """
    quantisation = adapt.quant.requested(run.model, run.adapt)
    trained: set[str] = set()
    stages: list[Stage] = []
    made: list[tuple[adapt.Adaptation, Filling]] = []

    def spread(module: nn.Module) -> None:
        stages.extend(_stages(run, module, mesh))
        apply.apply(module, source.plan, mesh, spread_of_run(run), compute_dtype=dtype, stages=stages)

    def decide(module: nn.Module) -> None:
        if quantisation is None:
            made.append(adapted(run, source, module))
            trained.update(made[0][0].trainable)
            if run.memory.fp8:
                adapt.fp8.convert(module, source.plan.groups, run.memory)
            spread(module)

    def dtype_for(name: str) -> torch.dtype:
        return torch.float32 if name in trained else dtype

    stored = adapt.stored_name if quantisation is None else str
    model = door.load(source, dtype=dtype_for, device=mesh.device, prepare=decide, stored=stored)
    if quantisation is not None:
        made.append(adapted(run, source, model, quantisation))
    adaptation, fill = made[0]
    fill(model)
    if quantisation is not None:
        spread(model)
    place_activations(run, model, source.plan)
    pipeline = pipeline_of(cast(VLM, model), stages, mesh, run.parallel.pipeline_schedule) if stages else None
    return Placed(model, adaptation, pipeline)


def routers_of(run: Run, model: nn.Module) -> Routers | None:
    """What watches the sparse layers of ``model`` (the whole model's, however it is cut); None if it has none."""
    moe = model.decoder.config.moe if isinstance(model, VLM) else None
    if moe is None:
        if run.train.moe_aux_loss_coeff:
            raise UserError(f"--moe_aux_loss_coeff {run.train.moe_aux_loss_coeff}: this model has no sparse layers")
        return None
    for module in model.modules():
        if isinstance(module, MoE):
            module.overlap = run.train.moe_shared_expert_overlap
    return Routers(tuple(sorted(moe.layers)), moe.experts, moe.top_k, run.train.moe_aux_loss_coeff)


def place_activations(run: Run, model: nn.Module, plan: Plan) -> None:
    """Which activations are computed again, and which wait for backward on the host."""
    made = cast(VLM, model)
    made.set_recompute(plan, decoder=Recompute.asked(run.memory), tower=run.train.vit_gradient_checkpointing)
    if run.memory.activation_cpu_offload:
        made.decoder.store = HostStore(run.memory.activation_offload_num_layers)


def check_memory(run: Run, source: door.Source) -> None:
    """UserError if the model cannot do what the memory flags ask for; no weight is loaded yet."""
    Recompute.asked(run.memory).check(source.plan)
    if run.memory.activation_cpu_offload and not source.plan.layer_loop:
        raise UserError(
            "--activation_cpu_offload true: this model's layers run in transformers' own loop, which keeps what it "
            "saves; use --gradient_checkpointing true"
        )


def _stages(run: Run, module: nn.Module, mesh: Mesh) -> list[Stage]:
    parallel = run.parallel
    if mesh.layout.pp == 1:
        return []
    assert isinstance(module, VLM), "apply.supports comes first"
    chunks = parallel.virtual_pipeline_model_parallel_size
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    return stages_of(module, mesh, chunks, first, last)


Filling = Callable[[nn.Module], None]
"""What gives adapters their values when the weights have theirs."""


def adapted(
    run: Run, source: door.Source, model: nn.Module, quantisation: adapt.Quantisation | None = None
) -> tuple[adapt.Adaptation, Filling]:
    """Make ``model`` trainable, with fresh adapters or with that of ``--adapters``."""
    if run.model.adapters:
        return continued(run, source, model, quantisation)
    made = adapt.apply(model, run.adapt, source.plan, seed=run.train.seed, quantisation=quantisation)
    if made.mode == "full" or quantisation is not None:
        return made, lambda module: None
    return made, partial(adapt.initialise, seed=run.train.seed, shards=shards)


def continued(
    run: Run, source: door.Source, model: nn.Module, quantisation: adapt.Quantisation | None
) -> tuple[adapt.Adaptation, Filling]:
    """Go on training the adapter of ``--adapters``, as its own file describes it."""
    if run.adapt.train_type != "lora" or len(run.model.adapters) != 1:
        raise UserError(
            f"--adapters {' '.join(run.model.adapters)}: training goes on with one adapter and --train_type lora; "
            "to train the weights, merge it first (tessera export --merge_lora true)"
        )
    quantised = adapt.quant.quantise(model, source.plan.groups, quantisation) if quantisation else ()
    made, fill = adapt.attach(
        model,
        run.model.adapters[0],
        source.plan.groups,
        lorap_lr_ratio=run.adapt.lorap_lr_ratio,
        quantised=quantised,
    )
    return made, lambda module: fill(module, shards)
