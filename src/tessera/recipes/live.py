"""Benchmarks while training: the model as it is now answers questions, every ``--eval_steps``.

What trains is spread over ranks, holds masters in float32 and recomputes activations; what answers should be a plain
model in the dtype it will be used in. So for the time of an evaluation every rank makes a second model of the same
shape from the tensors of the first::

    live (sharded, float32)  --gather, one tensor at a time, cast-->  plain copy  --questions i % world-->  answers

Tensors that are whole and of that dtype already are shared, not copied. The copy goes away afterwards, and nothing that
it did can be noticed by training: the losses of a run are the same with and without benchmarks.

That needs a rank that can hold the model (in 2 bytes per parameter), and a layout that leaves layers whole; others are
refused before anything is loaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tessera.adapt.sharing import share
from tessera.checkpoint.open import Source
from tessera.config.errors import UserError
from tessera.config.run import Run
from tessera.contract.layout import ParallelLayout
from tessera.evaluate import runner
from tessera.evaluate.answerer import Embedded
from tessera.evaluate.asked import jobs_of
from tessera.evaluate.benchmark import evaluated
from tessera.evaluate.item import Item
from tessera.evaluate.publish import publish
from tessera.evaluate.runner import Job
from tessera.evaluate.sources import with_generation
from tessera.infer.session import Session
from tessera.models.vlm import VLM
from tessera.parallel import fsdp
from tessera.parallel.mesh import Mesh
from tessera.recipes import fit, placement


def check(run: Run, source: Source, layout: ParallelLayout) -> None:
    """UserError if ``--eval_dataset`` cannot be asked of this model on this layout; reads no weights."""
    if not run.evaluate.eval_dataset:
        return
    asked = f"--eval_dataset {' '.join(run.evaluate.eval_dataset)}"
    sizes = {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
    }
    for name, size in sizes.items():
        if size > 1:
            raise UserError(
                f"{asked}: a model that is divided by --{name} {size} cannot generate while it trains; evaluate its "
                "checkpoints with tessera eval, or use data parallelism (--deepspeed) alone",
                exit_code=2,
            )
    if run.memory.fp8 or (run.model.quant_method is not None and layout.world > 1):
        what = "--fp8" if run.memory.fp8 else f"--quant_method {run.model.quant_method} on several processes"
        raise UserError(f"{asked}: not offered with {what}; evaluate the checkpoints with tessera eval", exit_code=2)
    with torch.device("meta"):
        plain = isinstance(source.family.build(source.config), VLM)
    if not plain:
        raise UserError(f"{asked}: {source.family.name} runs as transformers' own model, which cannot generate here")
    for job in jobs_of(run, Path()):
        runner.wanted(job)


@dataclass(frozen=True, slots=True)
class Benchmarks:
    """Asks the benchmarks of ``run`` of ``model``, which is spread over ``mesh``; results lie below ``run_dir``."""

    run: Run
    source: Source
    model: nn.Module
    mesh: Mesh
    dtype: torch.dtype
    run_dir: Path
    jobs: Sequence[tuple[Job, Sequence[Item]]]

    @classmethod
    def of(
        cls, run: Run, source: Source, model: nn.Module, mesh: Mesh, dtype: torch.dtype, run_dir: Path
    ) -> Benchmarks | None:
        """The benchmarks that ``run`` asks for, None if there are none; after :func:`check`."""
        if not run.evaluate.eval_dataset:
            return None
        run = with_generation(run)
        jobs = [(job, runner.wanted(job)) for job in jobs_of(run, Path())]
        return cls(run, source, model, mesh, dtype, run_dir, jobs)

    def __call__(self, step: int, beat: Callable[[], None]) -> dict[str, float]:
        """The metric of every benchmark, on rank 0, after optimiser step ``step``; ``beat`` is called as it goes.

        Every rank has to call it.
        """
        directory = self.run_dir / "eval" / f"step-{step}"
        if self.mesh.is_main:  # what an earlier life of this run found at this step
            shutil.rmtree(directory, ignore_errors=True)
        self.mesh.barrier()
        plain = plain_copy(self.run, self.source, self.model, self.mesh, self.dtype)
        session = Session.around(self.run, self.source, {None: plain}, self.mesh.device)
        settings = {"step": step, "dtype": str(self.dtype).removeprefix("torch.")}
        answerer = Embedded(session, settings)
        outcomes = []
        for job, items in self.jobs:
            placed = replace(job, directory=directory / job.name)
            outcome, _ = evaluated(placed, items, answerer, self.mesh, tick=beat)
            outcomes += [outcome] if outcome is not None else []
        if not self.mesh.is_main:
            return {}
        summaries = publish(directory, f"step {step}", outcomes, settings)
        return {found.name: found.value for found in summaries}


def plain_copy(run: Run, source: Source, model: nn.Module, mesh: Mesh, dtype: torch.dtype) -> VLM:
    """A model like ``model`` with its present values, whole and in ``dtype`` (adapters in their own) on every rank.

    A collective.
    """
    if run.model.quant_method is not None:  # layers packed in few bits: one process, nothing to gather
        copy = share(model)
        assert isinstance(copy, VLM)
        return copy.eval()
    twin = fit.empty(source)
    placement.adapted(run, source, twin)
    held: dict[int, Tensor] = {}

    def whole(name: str, tensor: Tensor) -> Tensor:
        if id(tensor) not in held:
            value = fsdp.full(tensor.detach(), mesh)
            cast = isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and ".lora_" not in name
            held[id(tensor)] = value.to(dtype) if cast else value
        return held[id(tensor)]

    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(_stored_buffers(model))}
    values = {name: whole(name, tensor) for name, tensor in tensors.items()}
    twin.load_state_dict(values, assign=True)
    for module in twin.modules():
        for leaf, buffer in module.named_buffers(recurse=False):
            if leaf in module._non_persistent_buffers_set:
                module.register_buffer(leaf, buffer.to(mesh.device), persistent=False)
    return twin.requires_grad_(False).eval()


def _stored_buffers(model: nn.Module) -> Mapping[str, Tensor]:
    found = {}
    for prefix, module in model.named_modules():
        for leaf, buffer in module.named_buffers(recurse=False):
            if leaf not in module._non_persistent_buffers_set:
                found[f"{prefix}.{leaf}" if prefix else leaf] = buffer
    return found
