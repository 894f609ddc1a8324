"""How the flags about processes become one arrangement of ranks, and which of them contradict each other.

Everything here is arithmetic on flags: it needs neither a model nor a second process, so a mistake is refused before
anything is started. :func:`check` looks at the flags alone, :func:`fits` also at how many processes there are::

    --tensor_model_parallel_size 4 --pipeline_model_parallel_size 2     8 processes, or 16, 24, ... (data parallel)

What also depends on the model (heads, experts, layers) is refused once its config.json is read; see
``recipes/fit.py``. :func:`divided` is the one place that knows which numbers of processes an arrangement is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tessera.config.parse import usage_error

if TYPE_CHECKING:
    from tessera.config.run import Run

DEFAULT_ZERO = 2
"""The sharding stage where neither --deepspeed nor --fsdp says one."""
ROWS = 16
"""So many rows make a step where --gradient_accumulation_steps is not given."""

TP, CP, PP = "tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size"
VPP, EP = "virtual_pipeline_model_parallel_size", "expert_model_parallel_size"
FIRST, LAST = "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"


def divided(world: int, *, pp: int, cp: int, tp: int, ep: int, replicate: int, zero: int) -> tuple[int, int]:
    """(replicas, shards) that ``world`` processes leave for data; UserError if the sizes do not fit."""
    sizes = [(name, size) for name, size in ((PP, pp), (CP, cp), (TP, tp)) if size > 1]
    model = pp * cp * tp
    if world % model:
        product = " x ".join(f"--{name} {size}" for name, size in sizes)
        total = f" = {model}" if len(sizes) > 1 else ""
        raise usage_error(
            f"{product}{total} does not divide the {_processes(world)}; set NPROC_PER_NODE x NNODES to a multiple of "
            f"{model}, or change {'one of the sizes' if len(sizes) > 1 else 'it'}"
        )
    data = world // model
    if data % replicate:
        raise usage_error(
            f"--data_parallel_replicate_size {replicate} does not divide the {data} data-parallel ranks; "
            f"choose a divisor of {data}"
        )
    if zero == 0:
        replicate = data
    sharing = data * cp * tp // replicate
    if sharing % ep:
        zeroth = " (--deepspeed zero0 makes every data-parallel rank a replica)" if zero == 0 and data > 1 else ""
        raise usage_error(
            f"--{EP} {ep} does not divide the {sharing} ranks that share the layers of a stage "
            f"(data {data // replicate} x context {cp} x tensor {tp}){zeroth}; use a divisor of {sharing}, "
            "or more processes"
        )
    return replicate, data // replicate


def _processes(world: int) -> str:
    return f"{world} processes" if world > 1 else "1 process"


def accumulation(values: Mapping[str, Any], world: int) -> int:
    """Microbatches of a step where none are asked for: enough for ``ROWS`` rows, and for a pipeline to be filled."""
    pp, parts, rows = int(values[PP]), int(values[VPP]), int(values["per_device_train_batch_size"])
    data = max(1, world // (pp * int(values[TP]) * int(values[CP])))
    count = math.ceil(ROWS / (rows * data))
    if pp == 1:
        return count
    whole = 1 if parts == 1 and values["pipeline_schedule"] in (None, "1f1b") else pp
    return -(-max(count, pp * parts) // whole) * whole


def check(values: Mapping[str, Any], given: Callable[[str], bool], notes: list[str]) -> None:
    """UserError for flags that contradict each other, whatever the model; remarks go to ``notes``.

    ``given`` says whether the user set a flag.
    """
    if values[PP] == 1:
        _without_pipeline(values, given)
    else:
        _pipeline(values, given, notes)
    if values[CP] == 1 and given("cp_comm_type"):
        notes.append(f"--cp_comm_type {values['cp_comm_type']} has no effect: --{CP} is 1")
    if values["data_parallel_replicate_size"] > 1 and values["deepspeed"] == "zero0":
        raise usage_error(
            f"--data_parallel_replicate_size {values['data_parallel_replicate_size']} contradicts --deepspeed zero0, "
            "which makes every data-parallel rank a replica; drop one of them"
        )
    if values[TP] > 1:
        _tensor(values)


def _without_pipeline(values: Mapping[str, Any], given: Callable[[str], bool]) -> None:
    for name in (VPP, FIRST, LAST, "pipeline_schedule"):
        if given(name) and values[name] not in (None, 1, "1f1b"):
            raise usage_error(f"--{name} {values[name]} needs a pipeline: --{PP} 2 or more")


def _pipeline(values: Mapping[str, Any], given: Callable[[str], bool], notes: list[str]) -> None:
    pp, parts, schedule = values[PP], values[VPP], values["pipeline_schedule"]
    microbatches = values["gradient_accumulation_steps"]
    asked, unit = f"--gradient_accumulation_steps {microbatches}", 1
    if not given("gradient_accumulation_steps") and values["global_batch_size"] is not None:
        unit = values["global_batch_size"] // microbatches
        asked = f"--global_batch_size {values['global_batch_size']} ({microbatches} microbatches)"
    if parts > 1 and schedule == "1f1b":
        raise usage_error(
            f"--pipeline_schedule 1f1b runs one part per rank, not --{VPP} {parts}; use interleaved or zero_bubble"
        )
    if microbatches < pp:
        raise usage_error(f"{asked}: a pipeline of {pp} ranks is filled by {pp} microbatches or more; use {pp * unit}")
    if microbatches % pp and schedule != "1f1b":
        raise usage_error(
            f"{asked}: --pipeline_schedule {schedule} needs a multiple of {pp} microbatches; "
            f"use {-(-microbatches // pp) * pp * unit}"
        )
    if values["deepspeed"] == "zero3" or values["fsdp"] in ("fsdp2", "full_shard"):
        flag = "deepspeed" if values["deepspeed"] else "fsdp"
        notes.append(f"--{flag} {values[flag]}: under a pipeline parameters stay gathered during a step, as with zero2")


def _tensor(values: Mapping[str, Any]) -> None:
    refused = {
        "quant_method": (values["quant_method"], values["quant_method"], "packed weights cannot be cut; shard them "
                         "over data, context or pipeline ranks instead"),
        "fp8": (values["fp8"], "true", "its products have no split version; drop one of them"),
    }  # fmt: skip
    for name, (asked, shown, why) in refused.items():
        if asked:
            raise usage_error(f"--{name} {shown} does not go with --{TP} {values[TP]}: {why}")


def fits(run: Run, world: int) -> None:
    """UserError if ``world`` processes cannot be arranged as the flags ask."""
    parallel = run.parallel
    replicate, _ = divided(
        world,
        pp=parallel.pipeline_model_parallel_size,
        cp=parallel.context_parallel_size,
        tp=parallel.tensor_model_parallel_size,
        ep=parallel.expert_model_parallel_size,
        replicate=parallel.data_parallel_replicate_size,
        zero=DEFAULT_ZERO if parallel.zero_stage is None else parallel.zero_stage,
    )
    if run.train.optim == "muon" and world > replicate * parallel.pipeline_model_parallel_size:
        alone = parallel.model_parallel_size * parallel.expert_model_parallel_size == 1
        fix = "add --deepspeed zero0, or use" if alone else "use"
        raise usage_error(
            "--optim muon orthogonalises whole matrices and cannot run on sharded ones; "
            f"{fix} --optim adamw_torch_fused"
        )
