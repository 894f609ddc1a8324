"""What one optimiser step sends to other ranks, counted, against the formulas of ``tessera.parallel.volume``.

    python bench/communication.py

Each layout runs two steps of a tiny model on gloo ranks; the second is counted (``bench/traffic.py``: every collective,
whoever starts it) on every rank and compared, per operation and group of ranks, with the formula. A difference of one
byte, or a collective that no formula explains, fails. The convention is that of a ring: a rank sends ``(W-1)/W`` of the
whole tensor in an all-gather or reduce-scatter, twice that in an all-reduce, in an all-to-all all that is not its own.

What hosts tell each other (sums of a few float64, sizes of images, counts of routed rows) is no data: it is listed
apart and each such message is one of :data:`HOST`, or fails too.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import harness
from bench.traffic import Ledger

HOST = {
    ("parallel.mesh", "float64"): "sums of a few numbers: weight and tokens, loss and metrics, norm",
    ("parallel.mesh", "int64"): "lengths of the next",
    ("parallel.mesh", "uint8"): "objects: sizes of a step's images, widths of patches",
    ("parallel.expert", "int64"): "how many rows go to each expert",
}
"""Messages between hosts, by who sends them and as what."""

ORIGIN = {"fsdp": "fsdp", "dtensor": "fsdp", "pipeline": "pp", "parallel.pipeline": "pp"}
"""Formulas' kinds by where a collective comes from; everything else comes from the seams of the model."""


@dataclass(frozen=True)
class Case:
    """One layout: ranks, sizes of its axes, what goes over them; ``core`` ones are part of ``make test``."""

    ranks: int
    axes: dict[str, int]
    model: str = "qwen3_vl"
    comm: str = "allgather"
    local: bool = False
    per_batch: int = 1
    schedule: str = "1f1b"
    chunks: int = 1
    layers: int | None = None
    recompute: bool = False
    flags: dict[str, Any] = field(default_factory=dict)
    core: bool = False

    def __str__(self) -> str:
        sizes = "x".join(f"{name}{size}" for name, size in self.axes.items() if name != "zero")
        extra = [f"zero{self.axes['zero']}"] if "zero" in self.axes else []
        extra += [self.comm] if "cp" in self.axes else []
        extra += [self.schedule] if "pp" in self.axes else []
        extra += ["recompute"] if self.recompute else []
        extra += ["images local"] if self.local else []
        extra += [str(value) for value in self.flags.values() if isinstance(value, str)]
        return " ".join([self.model, f"{self.ranks} ranks", sizes or "dp", *extra])


LORA = {"train_type": "lora", "freeze_vit": True, "freeze_aligner": True}
CASES = [
    Case(2, {"zero": 0}),
    Case(2, {"zero": 1}),
    Case(2, {"zero": 2}, core=True),
    Case(2, {"zero": 3}, core=True),
    Case(2, {"zero": 2}, local=True),
    Case(2, {"zero": 2}, flags=LORA),
    Case(2, {"zero": 3}, flags=LORA),
    Case(4, {"replicate": 2}),
    Case(2, {"tp": 2}, core=True),
    Case(2, {"tp": 2}, recompute=True),
    Case(2, {"tp": 2}, flags=LORA),
    Case(2, {"tp": 2}, "qwen2_5_vl"),
    Case(4, {"tp": 2, "zero": 3}),
    Case(2, {"cp": 2}, per_batch=2, core=True),
    Case(2, {"cp": 2}, comm="a2a", per_batch=2),
    Case(2, {"cp": 2}, recompute=True, per_batch=2),
    Case(2, {"cp": 2}, comm="a2a", recompute=True, per_batch=2),
    Case(4, {"tp": 2, "cp": 2}, per_batch=2),
    Case(2, {"pp": 2}, core=True),
    Case(2, {"pp": 2}, "qwen2_5_vl"),
    Case(2, {"pp": 2}, schedule="interleaved", chunks=2, layers=8),
    Case(2, {"pp": 2}, schedule="zero_bubble", chunks=2, layers=8),
    Case(4, {"pp": 4}, layers=8),
    Case(8, {"pp": 2, "tp": 2}),
    Case(2, {"ep": 2}, "qwen3_moe", core=True),
    Case(2, {"ep": 2}, "qwen3_moe", recompute=True),
    Case(2, {"tp": 2}, "qwen3_vl_moe"),
    Case(4, {"ep": 2, "tp": 2}, "qwen3_vl_moe"),
    Case(4, {"ep": 4, "tp": 2}, "qwen3_moe"),
    Case(8, {"pp": 2, "ep": 2, "tp": 2, "cp": 2}, "qwen3_vl_moe"),
]


@dataclass
class Found:
    """One rank's step: bytes by (kind of formula, operation, ranks), counted and expected, and what explains them."""

    counted: dict[tuple[str, str, tuple[int, ...]], int]
    expected: dict[tuple[str, str, tuple[int, ...]], int]
    flows: list[Any]
    host: dict[str, tuple[int, int]]
    unexplained: list[str]


def on_rank(case: Case) -> Found:
    """Run two steps of ``case`` on this rank and compare the second with its formulas."""
    import torch

    from tessera import adapt
    from tessera.config.resolve import run_of
    from tessera.contract.layout import layout_of
    from tessera.models.families import family_of
    from tessera.objectives.lm import NextToken
    from tessera.parallel import apply, volume
    from tessera.parallel.mesh import Mesh
    from tessera.recipes import placement
    from tessera.train.optim import Optimizers
    from tessera.train.schedule import Schedule
    from tessera.train.step import Engine, train_step
    from tests.invariance.test_step import packed
    from tests.parity.reference import ours

    mesh = Mesh.from_env(layout_of(case.ranks, **case.axes), timeout_s=120)
    layout, config, spread = mesh.layout, config_of(case), apply.Spread(case.comm, not case.local)
    family = family_of(config)
    plan, geometry = family.plan(config), family.geometry(config, {})
    flags = {"train_type": "full", "freeze_vit": False, "freeze_aligner": False, **case.flags}
    run = run_of("sft", model=".", dataset=("unused",), max_steps=2, **flags)
    model = ours(config)
    adaptation = adapt.apply(model, run.adapt, plan, seed=1)
    model.set_recompute(plan, decoder=case.recompute, tower=case.recompute)
    model.train()
    stages = placement.stages_of(model, mesh, case.chunks)
    held = volume.held(model, plan, layout, stages)
    apply.apply(model, plan, mesh, spread, compute_dtype=torch.float32, stages=stages)
    pipeline = placement.pipeline_of(model, stages, mesh, case.schedule)
    groups = adapt.param_groups(model, run.train, adaptation)
    optimizers = Optimizers(model, groups, run.train, Schedule("constant", 2, 0), mesh)
    sharder = apply.Sharder.of(model, plan, mesh, spread, geometry)
    objective = NextToken(repeatable=case.schedule == "zero_bubble")
    engine = Engine(model, objective, mesh, torch.float32, layout.zero >= 2, sharder, pipeline)
    every = [packed(config, case.per_batch, step) for step in range(2)]
    mine = [batches[mesh.data_rank :: layout.dp] for batches in every]
    train_step(engine, optimizers, mine[0], max_grad_norm=1.0)
    routed = watch(model, mesh)
    with Ledger() as ledger:
        train_step(engine, optimizers, mine[1], max_grad_norm=1.0)
    work = work_of(sharder, mesh, every[1], mine[1], routed)
    choices = volume.Choices(4, case.comm, case.recompute, apply.exchange_axis(mesh, spread))
    flows = volume.flows(layout, held, work, choices)
    return compared(ledger, flows, mesh)


def config_of(case: Case) -> dict[str, Any]:
    """The tiny model's config."""
    from tessera.models.families import family_of

    config = family_of({"model_type": case.model}).tiny()
    if case.layers is not None:
        config.get("text_config", config)["num_hidden_layers"] = case.layers
    return config


def watch(model: Any, mesh: Any) -> Counter[int]:
    """Counts, from now on, the rows that routers send to each rank of the expert group; filled as they run."""
    import torch

    from tessera.models.moe import Router

    seen: Counter[int] = Counter()
    ep = mesh.layout.ep

    def note(router: Any, args: Any, output: Any) -> None:
        if torch._C._current_graph_task_id() == -1:  # not when backward computes it again
            _, chosen, scores = output
            seen.update((chosen.flatten() // (scores.shape[1] // ep)).tolist())

    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(note)
    return seen


def work_of(
    sharder: Any, mesh: Any, every: Sequence[Any], mine: Sequence[Any], routed: list[Counter[int]]
) -> list[Any]:
    """The step as ``volume`` wants it described, from the batches alone but for what the routers chose."""
    from tessera.parallel.volume import Work

    found = []
    for number, batch in enumerate(sharder(mine)):
        route = batch.media.route if batch.media is not None else None
        out = back = 0
        if route is not None:
            me = mesh.group(sharder.balancer.axis).rank()
            out, back = sum(route.sent) - route.sent[me], sum(route.received) - route.received[me]
        pixels = pixels_of(sharder, mesh, every, number) if route is not None else 0
        rows = batch.shard.rows if batch.shard is not None else batch.num_tokens
        found.append(Work(rows, batch.supervised.numel(), out, back, pixels))
    if mesh.layout.ep > 1:
        import torch.distributed as dist

        group = mesh.experts["ep"].get_group()
        ranks, me = dist.get_process_group_ranks(group), group.rank()
        sent = [part for rank, part in enumerate(mesh.gather(routed)) if rank in ranks]
        leaving = sum(count for rank, count in sent[me].items() if rank != me)
        arriving = sum(part[me] for rank, part in enumerate(sent) if rank != me)
        found[0] = replace(found[0], routed_out=leaving, routed_back=arriving)
    return found


def pixels_of(sharder: Any, mesh: Any, every: Sequence[Any], number: int) -> int:
    """Bytes of pixels this rank hands to other encoders for microbatch ``number``; needs everybody's batches."""
    from tessera.parallel.balance import assign

    balancer, layout = sharder.balancer, mesh.layout
    if not balancer.across_data:
        return 0
    peers = layout.cp * layout.tp
    group = mesh.group(balancer.axis)
    first = mesh.at("replicate") * layout.shard
    shares = [every[first + share :: layout.dp][number] for share in range(layout.shard)]
    items = [(s, g) for s, b in enumerate(shares) if not b.media.minimal for g in b.media.sizes]
    chosen = assign([balancer.cost(grid) for _, grid in items], group.size())
    width = max(batch.media.patches.shape[1] for batch in shares)
    sent = 0
    for index, ((share, (t, h, w)), rank) in enumerate(zip(items, chosen, strict=True)):
        if rank // peers != share and share * peers + index % peers == group.rank():
            sent += t * h * w * width
    return sent


def compared(ledger: Ledger, flows: Sequence[Any], mesh: Any) -> Found:
    """Counted and expected bytes under the same keys; what is data and what hosts say."""
    counted: Counter[Any] = Counter()
    expected: Counter[Any] = Counter()
    host: dict[str, tuple[int, int]] = {}
    unexplained = []
    for entry, sent in ledger.sent.items():
        reason = HOST.get((entry.source, entry.dtype))
        if reason is not None:
            calls, before = host.get(reason, (0, 0))
            host[reason] = (calls + ledger.calls[entry], before + sent)
        else:
            counted[ORIGIN.get(entry.source, "seams"), entry.operation, entry.ranks] += sent
    for flow in flows:
        kind = flow.kind if flow.kind in ("fsdp", "pp") else "seams"
        ranks = ranks_of(mesh, flow.axis)
        expected[kind, flow.operation, ranks] += flow.sent
    for key in sorted({*counted, *expected}):
        if counted[key] != expected[key]:
            unexplained.append(f"{key}: counted {counted[key]}, formula {expected[key]}")
    return Found(dict(counted), dict(expected), list(flows), host, unexplained)


def ranks_of(mesh: Any, axis: str) -> tuple[int, ...]:
    """The ranks along ``axis`` that this one belongs to."""
    import torch.distributed as dist

    if axis == "ends":
        width = mesh.layout.world // mesh.layout.pp
        offset = mesh.rank % width
        return (offset, offset + (mesh.layout.pp - 1) * width)
    group = mesh.experts[axis].get_group() if axis in ("edp", "ep") else mesh.group(axis)
    return tuple(dist.get_process_group_ranks(group))


def measured(case: Case) -> list[Found]:
    """The step on every rank of ``case``."""
    from tests.ranks import run_ranks

    found: list[Found] = run_ranks(on_rank, case.ranks, case)
    return found


def row_of(case: Case, found: Sequence[Found]) -> dict[str, Any]:
    """A case as it is written down: per rank 0 every formula, and whether all ranks agree with theirs."""
    flows = [
        {"kind": f.kind, "operation": f.operation, "along": f.axis, "formula": f.formula, "bytes": f.sent}
        for f in found[0].flows
    ]
    return {
        "layout": str(case), "ranks": case.ranks, "bytes_counted": [sum(f.counted.values()) for f in found],
        "bytes_formula": [sum(f.expected.values()) for f in found], "flows_of_rank_0": flows,
        "between_hosts": {what: {"calls": calls, "bytes": sent} for what, (calls, sent) in found[0].host.items()},
        "unexplained": [f"rank {rank}: {text}" for rank, f in enumerate(found) for text in f.unexplained],
    }  # fmt: skip


def main() -> int:
    """Count every layout and report; 0 if every byte is explained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="layouts whose name holds this")
    parser.add_argument("--core", action="store_true", help="only the layouts that are part of make test")
    args = parser.parse_args()
    chosen = [case for case in CASES if args.only in str(case) and (case.core or not args.core)]
    rows = []
    for case in chosen:
        row = row_of(case, measured(case))
        rows.append(row)
        print(f"\n{row['layout']}: {row['bytes_counted'][0]} bytes sent by rank 0, formula {row['bytes_formula'][0]}")
        for flow in row["flows_of_rank_0"]:
            print(f"  {flow['kind']:6} {flow['operation']:15} {flow['along']:10} {flow['bytes']:>9}  {flow['formula']}")
        for what, message in row["between_hosts"].items():
            print(f"  hosts  {message['calls']:>3} messages {message['bytes']:>20}  {what}")
        for text in row["unexplained"]:
            print(f"  UNEXPLAINED {text}")
    if not args.only and not args.core:
        harness.save("communication", rows, {"model": "tiny", "dtype": "float32", "step": "second of two"})
    return 1 if any(row["unexplained"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
