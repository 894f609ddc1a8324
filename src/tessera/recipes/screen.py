"""What is shown before step 1: one rendered sample, and one screen of facts that also go into the report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from tessera import adapt
from tessera.adapt import ParamGroup
from tessera.checkpoint.open import Source
from tessera.config.flags import BY_NAME
from tessera.config.run import Run
from tessera.contract.memory import Recompute
from tessera.data.corpus import Corpus
from tessera.data.loader import Loader
from tessera.models.families import text_config
from tessera.observe.cost import MemoryEstimate, Work, estimate_memory, human_count, stacks_of
from tessera.observe.facts import RunFacts, TrainedModule, hardware, versions
from tessera.parallel.mesh import Mesh
from tessera.recipes import fit
from tessera.recipes.fit import Holding, Share


def sample_lines(corpus: Corpus) -> str:
    """The first training row as the model sees it and learns it, decoded."""
    return corpus.encoder.renderer.describe(corpus.encoded(0))


def facts(
    run: Run,
    source: Source,
    model: nn.Module,
    groups: Sequence[ParamGroup],
    loader: Loader,
    val: Corpus | None,
    run_dir: Path,
    mesh: Mesh,
    itemsize: int,
) -> RunFacts:
    """Everything the screen and the report say about a run, gathered in one value."""
    layout = mesh.layout
    table = adapt.trainable_table(model, groups, partial(mesh.gather, axis="pp"))
    held = [] if layout.is_single else fit.holdings(run, source, layout)
    train = loader.corpus
    steps = loader.steps_in_epoch(0)
    per_step = loader.tokens_in_epoch / max(1, steps)
    return RunFacts(
        model=str(run.model.model),
        family=source.family.name,
        train_type=run.adapt.train_type,
        parameters=table.total,
        trainable=table.trainable,
        modules=tuple(TrainedModule(row.pattern, row.tensors, row.parameters, row.lr) for row in table.rows),
        steps=loader.total_steps,
        epochs=round(loader.total_steps / max(1, steps), 3),
        train_samples=len(train),
        val_samples=len(val) if val is not None else 0,
        skipped_samples=len(train.skips),
        tokens_per_step=per_step,
        samples_per_step=train.epoch_rows / max(1, steps),
        batch=_batch_words(run, loader),
        dtype=f"{'float32' if itemsize == 4 else run.model.torch_dtype or source.dtype_name} compute",
        optimizer=f"{run.train.optim}, {run.train.lr_scheduler_type}",
        layout="" if layout.is_single else fit.words(layout, held),
        memory=_memory_line(run, source, model, held, loader, mesh, itemsize),
        output=str(run_dir),
        verb=run.verb,
        hardware=hardware(),
        versions=versions(),
        flags={
            name: (value, run.provenance[name])
            for name, value in run.values().items()
            if run.provenance.get(name, "default") != "default" and not BY_NAME[name].secret
        },
    )


def _memory_line(
    run: Run,
    source: Source,
    model: nn.Module,
    held: Sequence[Holding],
    loader: Loader,
    mesh: Mesh,
    itemsize: int,
) -> str:
    """The estimated peak on one device, of the pipeline stage that needs most."""
    stage = mesh.at("pp")
    share = fit.share_of(model, source.plan, mesh.layout, held[stage] if held else None)
    mine = _memory(run, source, share, stage, loader, mesh, itemsize)
    stages = mesh.gather((mine.total, mine.line()), "pp") if mesh.layout.pp > 1 else [(mine.total, mine.line())]
    most, line = max(stages)
    return line if len(stages) == 1 else f"{line} on a rank of stage {stages.index((most, line))}"


def _memory(
    run: Run, source: Source, share: Share, stage: int, loader: Loader, mesh: Mesh, itemsize: int
) -> MemoryEstimate:
    """The estimated peak on a device of pipeline stage ``stage``, for the largest microbatch that can occur."""
    train, config = loader.corpus, {**source.config, **text_config(source.config)}
    layout, holding = mesh.layout, share.holding
    tokens, patches = (int(np.sort(size)[-loader.units_per_batch :].sum()) for size in (train.lengths, train.patches))
    if loader.packing and loader.capacity:
        tokens = loader.capacity * loader.units_per_batch
        patches = int(train.patches.sum() / max(1, train.lengths.sum()) * tokens)
    waiting = 1 if layout.pp == 1 else fit.waiting(run, layout, stage)
    shared, away = layout.cp * layout.tp, mesh.device.type == "cuda"  # on a CPU, host and device are the same memory
    work = Work(
        tokens=-(-tokens // shared),
        vocab=int(config.get("vocab_size", 0)) // layout.tp if holding is None or holding.last else 0,
        patches=-(-patches // shared) * waiting,
        itemsize=itemsize,
        logits_chunk=run.train.loss_chunk_size,
        accumulation=run.train.gradient_accumulation_steps,
        recompute=Recompute.asked(run.memory),
        offloaded=_offloaded_layers(run, source) if away else 0,
        recompute_tower=run.train.vit_gradient_checkpointing,
        train_decoder=_trains(run, share, "llm"),
        train_tower=_trains(run, share, "vit"),
    )
    decoder, tower = stacks_of(source.config)
    if holding is not None and decoder is not None:
        decoder = replace(decoder, layers=holding.layers * waiting)
        tower = tower if holding.tower else None
    return estimate_memory(
        share.weights,
        work,
        decoder,
        tower,
        states=1 if run.train.optim == "muon" else 2,
        shards=layout.shard * shared,
        gather=0 if layout.zero == 3 and layout.pp == 1 else share.gathered,
        host_share=run.memory.optimizer_share if away else 0.0,
    )


def _offloaded_layers(run: Run, source: Source) -> int:
    decoder, _ = stacks_of(source.config)
    if decoder is None or not run.memory.activation_cpu_offload:
        return 0
    return min(run.memory.activation_offload_num_layers or decoder.layers - 1, decoder.layers)


def _batch_words(run: Run, loader: Loader) -> str:
    unit = f"packs of {loader.capacity}" if loader.packing else "rows"
    words = f"{loader.units_per_batch} {unit} x {loader.accumulation} microbatches"
    return words + (f" x {loader.world} ranks" if loader.world > 1 else "")


def _trains(run: Run, share: Share, part: str) -> str:
    if part not in share.trains:
        return "nothing"
    return "weights" if run.adapt.train_type == "full" else "adapters"


def dry_plan(run: Run, source: Source, loader: Loader, val: Corpus | None, mesh: Mesh, itemsize: int) -> str:
    """What a dry run prints: the resolved flags, layout and memory, the data plan, the steps; no weights were loaded.

    ``itemsize`` is that of the compute dtype.
    """
    train = loader.corpus
    lines = [
        f"dry run of tessera {run.verb}: nothing was loaded, nothing was written",
        run.describe(),
        f"model     {source.path} ({source.family.name}, {len(source.checkpoint.names)} tensors)",
        *_planned(run, source, loader, mesh, itemsize),
        f"data      {len(train):,} training rows, {len(val) if val is not None else 0:,} for validation, "
        f"{len(train.skips):,} skipped; {loader.tokens_in_epoch:,} tokens an epoch",
        f"steps     {loader.total_steps:,} ({_batch_words(run, loader)})",
    ]
    if len(train.skips):
        lines.append(f"skipped   {train.skips.summary()}")
    return "\n".join(lines)


def _planned(run: Run, source: Source, loader: Loader, mesh: Mesh, itemsize: int) -> list[str]:
    """The layout, and what a rank of each pipeline stage holds and needs."""
    layout = mesh.layout
    lines = [] if layout.is_single else [f"layout    {layout.world} processes: {fit.words(layout, ())}"]
    before = ", before quantisation" if run.model.quant_method else ""
    for stage, share in enumerate(fit.preview(run, source, layout, itemsize)):
        estimate = _memory(run, source, share, stage, loader, mesh, itemsize)
        count = f"{human_count(share.weights.count)} parameters, {human_count(share.weights.trained)} trained{before}"
        name = f"stage {stage}   {share.holding}; " if layout.pp > 1 else "holds     "
        lines.append(f"{name}{count}; a rank needs {estimate.line()}")
    return lines


def note(text: str) -> None:
    """One line for the user, on stderr."""
    print(f"note: {text}", file=sys.stderr, flush=True)
