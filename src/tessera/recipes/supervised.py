"""``tessera sft`` and ``tessera pt``: from a resolved Run to a trained checkpoint.

The order is the architecture's: ranks, then the model's description, then (side by side) the data plan and the
weights, then what is trainable, then where it lives, then the loop::

    mesh -> describe -> [plan data | load weights] -> adapt -> recompute -> shard -> optimiser -> loader -> Trainer

Planning the data needs a tokenizer and file headers, loading the model needs torch's heavier imports; the two share
nothing, so they run side by side and the first step starts that much earlier.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tessera import adapt
from tessera.checkpoint import open as door
from tessera.checkpoint import state as tensors
from tessera.checkpoint.background import HostCopies, Publisher, Write
from tessera.checkpoint.store import (
    Mirror,
    Store,
    checkpoints,
    new_run_dir,
    read_trainer_state,
    resolve_resume,
    step_of,
    write_json,
)
from tessera.config.errors import UserError
from tessera.config.run import Run
from tessera.contract.layout import layout_of_run
from tessera.contract.model import dtype_of
from tessera.data.corpus import Corpus, prepare
from tessera.data.loader import Loader, eval_loader
from tessera.data.render import Renderer
from tessera.objectives.lm import NextToken
from tessera.observe.metrics import RunLog
from tessera.observe.plots import draw
from tessera.observe.screen import summary_screen
from tessera.parallel import fsdp
from tessera.parallel.apply import Sharder
from tessera.parallel.aside import Aside
from tessera.parallel.mesh import Mesh, world_size
from tessera.parallel.watchdog import group_timeout, watching
from tessera.recipes import fit, live, placement, screen
from tessera.recipes.export import ARGS_FILE, limit_processor
from tessera.train.optim import Optimizers
from tessera.train.schedule import Schedule, warmup_steps
from tessera.train.step import Engine
from tessera.train.trainer import Cadence, Progress, SignalError, Trainer, restore
from tessera.weights import hf
from tessera.weights.saving import Saving


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run lives on disk and where it continues from."""

    run_dir: Path
    resume: Path | None

    @property
    def resumed_step(self) -> int:
        return 0 if self.resume is None else step_of(self.resume)


def main(run: Run) -> Path | None:
    """Train as ``run`` says; returns the last checkpoint (None for a dry run). Raises UserError, SystemExit(128+n)."""
    mesh = mesh_of(run)
    trainer = build(run, mesh)
    if trainer is None:
        mesh.close()
        return None
    try:
        with watching(trainer.engine.heart, mesh, run.parallel.ddp_timeout):
            summary = trainer.fit()
    except SignalError as stop:
        trainer.log.close()
        if mesh.is_main:
            print(stop, flush=True)
        raise SystemExit(stop.code) from None
    finish(trainer, summary)
    mesh.close()
    return Path(summary["last_model_checkpoint"]) if summary["last_model_checkpoint"] else None


def mesh_of(run: Run) -> Mesh:
    """The ranks of the run; a dry run that nobody launched stands for all of them."""
    world = world_size()
    if run.dry_run and world == 1:
        return Mesh.planned(layout_of_run(run, run.parallel.nproc_per_node * run.parallel.nnodes))
    return Mesh.from_env(layout_of_run(run, world), timeout_s=group_timeout(run.parallel.ddp_timeout))


def place_of(run: Run, mesh: Mesh) -> Place:
    """A new run directory, or that of the checkpoint being resumed; decided on the main rank."""
    resume = None
    if run.save.resume_from_checkpoint:
        resume = resolve_resume(run.save.resume_from_checkpoint, Path(run.save.output_dir))
    if resume is not None:
        run_dir = resume.resolve().parent
    else:
        now = time.strftime("%Y%m%d-%H%M%S")
        output = Path(run.save.output_dir)
        if not run.save.add_version and checkpoints(output):
            raise UserError(
                f"--output_dir {output} holds checkpoints of another run; go on with --resume_from_checkpoint true, "
                "choose another directory, or let --add_version make one"
            )
        found = mesh.broadcast(new_run_dir(output, now, add_version=run.save.add_version) if mesh.is_main else None)
        assert found is not None
        run_dir = found
    return Place(run_dir, resume)


def cadence(run: Run, max_steps: int, steps_per_epoch: int, *, has_val: bool) -> Cadence:
    """Step numbers at which to log, evaluate and save; strategies and shares of the run become numbers here."""

    def every(value: int | float, strategy: str) -> int:
        if strategy == "epoch":
            return steps_per_epoch
        if value < 0:
            return max_steps
        return max(1, math.ceil(value * max_steps)) if 0 < value < 1 else int(value)

    saving, evaluating = run.save.save_strategy, run.train.eval_strategy
    return Cadence(
        max_steps=max_steps,
        logging_steps=every(run.log.logging_steps, "steps"),
        eval_steps=every(run.train.eval_steps, evaluating) if has_val and evaluating != "no" else 0,
        save_steps=0 if saving == "no" else every(run.save.save_steps, saving),
        save_at_end=saving != "no",
        log_first=run.log.logging_first_step,
        max_bad_steps=run.train.max_bad_steps,
        max_grad_norm=run.train.max_grad_norm,
    )


def checkpoint_stager(
    run: Run,
    source: door.Source,
    model: nn.Module,
    adaptation: adapt.Adaptation,
    optimizers: Optimizers,
    mesh: Mesh,
    aside: Aside | None = None,
) -> Callable[[], Write]:
    """A function that makes a checkpoint of this moment: adapter or model, args.json, exact state.

    What it returns writes it, on all ranks at once; with ``aside`` from copies, at any later moment, in any thread.
    """
    copies = None if aside is None else HostCopies()
    group = None if aside is None else aside.group

    def stage() -> Write:
        if copies is not None:
            copies.begin()
        stage_weights = staged_adapter if adaptation.mode == "lora" else staged_model
        parts = [stage_weights(run, source, model, adaptation, mesh, copies)]
        if mesh.is_main:
            parts.append(lambda directory: write_json(directory / ARGS_FILE, run.to_json()))
        if not run.save.save_only_model:
            state = tensors.Snapshot.of(model, optimizers.state(), mesh, copies)
            parts.append(partial(state.write, group=group))
        if copies is not None:
            copies.settle()

        def write(directory: Path) -> None:
            for part in parts:
                part(directory)

        return write

    return stage


def staged_adapter(
    run: Run,
    source: door.Source,
    model: nn.Module,
    adaptation: adapt.Adaptation,
    mesh: Mesh,
    copies: HostCopies | None,
) -> Write:
    """The adapter, gathered on the main rank (it is small), which writes it."""
    held = adapt.adapter_tensors(model, adaptation, partial(fsdp.full, mesh=mesh))
    stages = mesh.gather(held, "pp") if mesh.layout.pp > 1 else [held]
    every = {name: tensor for part in stages for name, tensor in part.items()} if mesh.is_main else {}

    def write(directory: Path) -> None:
        if mesh.is_main:
            adapt.save_adapter(every, adaptation, directory, base_model=str(source.location))

    return write


def staged_model(
    run: Run,
    source: door.Source,
    model: nn.Module,
    adaptation: adapt.Adaptation,
    mesh: Mesh,
    copies: HostCopies | None,
) -> Write:
    """The model, of which every rank writes its own part."""
    dtype = dtype_of(run.model.torch_dtype) if run.model.torch_dtype else None
    state, names = model.state_dict(), source.disk_names
    saving = Saving.of(state, names, origin=source.origin, dtype=dtype, ranks=mesh, types=source.types)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    if copies is not None:  # what is frozen does not change
        saving = saving.staged(lambda name, held: held if name in frozen else copies.copy(f"model.{name}", held))

    def write(directory: Path) -> None:
        saving.write(directory)
        if mesh.is_main:
            if source.origin is None:
                hf.copy_side_files(source.path, directory, dtype)
            limit_processor(directory, run, source.geometry)

    return write


def plan_data(run: Run, source: door.Source, run_dir: Path | None, mesh: Mesh) -> tuple[Corpus, Corpus | None]:
    """The planned training and validation rows."""
    renderer = Renderer(source.path, source.geometry, run.data.system, run.data.loss_scale)
    return prepare(run.data, renderer, source.geometry, run_dir, max_length=source.max_positions, is_main=mesh.is_main)


def train_loader(run: Run, corpus: Corpus, mesh: Mesh) -> Loader:
    """The batches of the whole run, in the order that ``--data_seed`` decides."""
    return Loader(
        corpus,
        units_per_batch=run.train.per_device_train_batch_size,
        accumulation=run.train.gradient_accumulation_steps,
        packing=run.data.packing,
        capacity=run.data.packing_length or run.data.max_length,
        seed=run.data.data_seed,
        rank=mesh.data_rank,
        world=mesh.layout.dp,
        threads=run.data.dataloader_num_workers,
        shuffle=run.data.train_dataloader_shuffle,
        epochs=run.train.num_train_epochs,
        max_steps=run.train.max_steps if run.train.max_steps > 0 else None,
        pin_memory=mesh.device.type == "cuda",
        drop_last=run.data.dataloader_drop_last,
    )


def val_loader(run: Run, corpus: Corpus, mesh: Mesh) -> Loader:
    """Every validation row once, over all ranks."""
    rows = run.train.eval_iters * run.train.global_batch_size
    return eval_loader(
        corpus,
        units_per_batch=run.train.per_device_eval_batch_size,
        most=rows if rows > 0 else None,
        packing=run.data.packing,
        capacity=run.data.packing_length or run.data.max_length,
        rank=mesh.data_rank,
        world=mesh.layout.dp,
        threads=run.data.dataloader_num_workers,
    )


def schedule_of(run: Run, max_steps: int) -> Schedule:
    """The learning-rate schedule of a run of ``max_steps``."""
    args = run.train
    end = max_steps if args.lr_decay_iters is None else args.lr_decay_iters
    warm: float = warmup_steps(max_steps, ratio=args.warmup_ratio, steps=args.warmup_steps)
    if args.lr_warmup_fraction is not None:
        warm = args.lr_warmup_fraction * end
    floor = args.min_lr / args.learning_rate if args.learning_rate else 0.0
    return Schedule(args.lr_scheduler_type, end, warm, min(1.0, floor), args.wsd_decay_ratio)


def resume(checkpoint: Path, engine: Engine, optimizers: Optimizers, loader: Loader, store: Store) -> Progress:
    """Put model, optimiser, generators, router shares and loader back where ``checkpoint`` was taken."""
    state = read_trainer_state(checkpoint)
    if state["max_steps"] != loader.total_steps:
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: that run had {state['max_steps']} steps and this one has "
            f"{loader.total_steps}; the schedule would not be the same. Give the same --max_steps / --num_train_epochs"
        )
    loader.restore(state["loader"])
    if engine.routers is not None:
        engine.routers.restore(state["routers"])
    tensors.load_tensors(checkpoint, engine.model, optimizers.state(), engine.mesh)
    optimizers.refresh()
    store.adopt()
    return restore(state)


def engine_of(run: Run, placed: placement.Placed, source: door.Source, mesh: Mesh, dtype: torch.dtype) -> Engine:
    """What runs a forward and backward of this model on this mesh."""
    model = placed.model
    return Engine(
        model,
        NextToken(run.train.loss_chunk_size, repeatable=run.parallel.pipeline_schedule == "zero_bubble"),
        mesh,
        dtype,
        sync_every_microbatch=mesh.layout.zero >= 2,
        sharder=Sharder.of(model, source.plan, mesh, placement.spread_of_run(run), source.geometry),
        pipeline=placed.pipeline,
        routers=placement.routers_of(run, model),
    )


def log_of(run: Run, run_dir: Path, max_steps: int, resumed_step: int, mesh: Mesh) -> RunLog:
    """The log of the run, which goes on behind ``resumed_step``."""
    return RunLog(
        run_dir,
        max_steps=max_steps,
        report_to=run.log.report_to,
        is_main=mesh.is_main,
        resumed_step=resumed_step,
        run_name=run.log.run_name,
        project=run.log.wandb_project,
        events_dir=run.log.tensorboard_dir,
    )


def mirror_of(run: Run, source: door.Source, mesh: Mesh) -> Mirror | None:
    """What keeps the checkpoints of a full training in Megatron's format too, if that was asked for.

    Adapters stay in PEFT's format, which ``export --mcore_adapters`` reads.
    """
    if run.save.save_format != "mcore" or run.adapt.train_type != "full":
        return None
    from tessera.recipes.mcore import RunMirror

    return RunMirror.of(run, source, mesh.layout)


def build(run: Run, mesh: Mesh) -> Trainer | None:
    """A trainer ready to :meth:`~tessera.train.trainer.Trainer.fit`; None after a dry run, which loads no weights."""
    adapt.fp8.require(run.memory, mesh.device)
    adapt.quant.requested(run.model, run.adapt)
    source = door.describe(run.model)
    placement.check_memory(run, source)
    fit.check(run, source, mesh.layout)
    live.check(run, source, mesh.layout)
    mirror = mirror_of(run, source, mesh)  # what cannot be written is refused before it is trained
    dtype = door.compute_dtype(source, run.model.torch_dtype, mesh.device)
    if mesh.is_main and door.slow_on(mesh.device, dtype):
        screen.note(f"--torch_dtype {run.model.torch_dtype}: {door.slow_on(mesh.device, dtype)}")
    if run.dry_run:
        train, val = plan_data(run, source, None, mesh)
        if mesh.is_main:
            print(screen.dry_plan(run, source, train_loader(run, train, mesh), val, mesh, dtype.itemsize), flush=True)
        return None
    place = place_of(run, mesh)
    with ThreadPoolExecutor(1, thread_name_prefix="tessera-plan") as pool:
        planning = pool.submit(plan_data, run, source, place.run_dir, mesh)
        placed = placement.load_model(run, source, mesh, dtype)
        train, val = planning.result()
    model, adaptation = placed.model, placed.adaptation
    torch.manual_seed(run.train.seed + mesh.rank)  # dropout draws from this: other noise on every rank
    loader = train_loader(run, train, mesh)
    groups = adapt.param_groups(model, run.train, adaptation)
    schedule, share = schedule_of(run, loader.total_steps), run.memory.optimizer_share
    optimizers = Optimizers(model, groups, run.train, schedule, mesh, host_share=share)
    aside = Aside.of(mesh, group_timeout(run.parallel.ddp_timeout)) if run.save.async_save else None
    barrier = mesh.barrier if aside is None else aside.barrier
    store = Store(place.run_dir, run.save.save_total_limit, mesh.is_main, barrier, mirror)
    store.sweep()
    engine, progress = engine_of(run, placed, source, mesh, dtype), Progress()
    if place.resume is not None:
        progress = resume(place.resume, engine, optimizers, loader, store)
    if mesh.is_main:
        write_json(place.run_dir / ARGS_FILE, run.to_json())
    asked = live.Benchmarks.of(run, source, model, mesh, dtype, place.run_dir)
    log = log_of(run, place.run_dir, loader.total_steps, progress.step, mesh)
    facts = screen.facts(run, source, model, groups, loader, val, place.run_dir, mesh, dtype.itemsize)
    if mesh.is_main:
        facts.save(place.run_dir)
        print(f"{screen.sample_lines(train)}\n{summary_screen(facts)}", flush=True)
    return Trainer(
        engine=engine,
        optimizers=optimizers,
        loader=loader,
        evals=None if val is None else partial(val_loader, run, val, mesh),
        publisher=Publisher(store, log.write, aside is not None),
        log=log,
        cadence=cadence(
            run, loader.total_steps, loader.steps_in_epoch(0), has_val=val is not None or asked is not None
        ),
        stage_checkpoint=checkpoint_stager(run, source, model, adaptation, optimizers, mesh, aside),
        progress=progress,
        benchmarks=asked,
    )


def finish(trainer: Trainer, summary: dict[str, Any]) -> None:
    """Write the last log line and the plots, and say where everything is."""
    mesh = trainer.engine.mesh
    if not mesh.is_main:
        return
    run_dir = trainer.publisher.store.run_dir
    trainer.log.finish(summary)
    draw(run_dir)
    for name in ("last_model_checkpoint", "best_model_checkpoint"):
        if summary[name]:
            print(f"{name}: {summary[name]}", flush=True)
