"""What is shown before step 1: one rendered sample, and one screen of facts that also go into the report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import nn

from tessera import adapt
from tessera.adapt import ParamGroup
from tessera.checkpoint.open import Source
from tessera.config.run import Run
from tessera.contract.memory import Recompute
from tessera.data.corpus import Corpus
from tessera.data.loader import Loader
from tessera.observe.cost import MemoryEstimate, Weights, Work, estimate_memory, stacks_of
from tessera.observe.facts import RunFacts, TrainedModule, hardware, versions
from tessera.parallel.mesh import Mesh


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
    table = adapt.trainable_table(model, groups)
    train = loader.corpus
    steps = loader.steps_in_epoch(0)
    per_step = float(train.lengths.sum()) / max(1, steps)
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
        samples_per_step=len(train) / max(1, steps),
        batch=_batch_words(run, loader),
        dtype=f"{'float32' if itemsize == 4 else run.model.torch_dtype or source.dtype_name} compute",
        optimizer=f"{run.train.optim}, {run.train.lr_scheduler_type}",
        memory=_memory(run, source, model, groups, loader, mesh, itemsize).line(),
        output=str(run_dir),
        verb=run.verb,
        hardware=hardware(),
        versions=versions(),
        flags={
            name: (value, run.provenance[name])
            for name, value in run.values().items()
            if run.provenance.get(name, "default") != "default" and name != "hub_token"
        },
    )


def _memory(
    run: Run,
    source: Source,
    model: nn.Module,
    groups: Sequence[ParamGroup],
    loader: Loader,
    mesh: Mesh,
    itemsize: int,
) -> MemoryEstimate:
    """The estimated peak on one device, for the largest microbatch that can occur."""
    train, config = loader.corpus, {**source.config, **source.config.get("text_config", {})}
    tokens, patches = (int(np.sort(size)[-loader.units_per_batch :].sum()) for size in (train.lengths, train.patches))
    if loader.packing and loader.capacity:
        tokens = loader.capacity * loader.units_per_batch
        patches = int(train.patches.sum() / max(1, train.lengths.sum()) * tokens)
    away = mesh.device.type == "cuda"  # on a CPU, host and device are the same memory
    work = Work(
        tokens=tokens,
        vocab=int(config.get("vocab_size", 0)),
        patches=patches,
        itemsize=itemsize,
        logits_chunk=run.train.loss_chunk_size,
        accumulation=run.train.gradient_accumulation_steps,
        recompute=Recompute.asked(run.memory),
        offloaded=_offloaded_layers(run, source) if away else 0,
        recompute_tower=run.train.vit_gradient_checkpointing,
        train_decoder=_trains(run, groups, "llm"),
        train_tower=_trains(run, groups, "vit"),
    )
    decoder, tower = stacks_of(source.config)
    return estimate_memory(
        _weights(model),
        work,
        decoder,
        tower,
        states=1 if run.train.optim == "muon" else 2,
        shards=mesh.layout.shard * mesh.layout.cp * mesh.layout.tp,
        gather=mesh.layout.zero != 3,
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


def _trains(run: Run, groups: Sequence[ParamGroup], part: str) -> str:
    if not any(group.name.partition(".")[0] == part for group in groups):
        return "nothing"
    return "weights" if run.adapt.train_type == "full" else "adapters"


def _weights(model: nn.Module) -> Weights:
    every = list(model.parameters())
    trained = [p for p in every if p.requires_grad]
    return Weights(
        count=sum(p.numel() for p in every),
        size=sum(p.numel() * p.element_size() for p in every),
        trained=sum(p.numel() for p in trained),
        trained_size=sum(p.numel() * p.element_size() for p in trained),
    )


def dry_plan(run: Run, source: Source, loader: Loader, val: Corpus | None) -> str:
    """What a dry run prints: the resolved flags, the data plan and the steps; no weights were loaded."""
    train = loader.corpus
    lines = [
        f"dry run of tessera {run.verb}: nothing was loaded, nothing was written",
        run.describe(),
        f"model     {source.path} ({source.family.name}, {len(source.checkpoint.names)} tensors)",
        f"data      {len(train):,} training rows, {len(val) if val is not None else 0:,} for validation, "
        f"{len(train.skips):,} skipped; {int(train.lengths.sum()):,} tokens an epoch",
        f"steps     {loader.total_steps:,} ({_batch_words(run, loader)})",
    ]
    if len(train.skips):
        lines.append(f"skipped   {train.skips.summary()}")
    return "\n".join(lines)


def note(text: str) -> None:
    """One line for the user, on stderr."""
    print(f"note: {text}", file=sys.stderr, flush=True)
