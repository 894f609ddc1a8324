"""How much of a pipelined step its ranks wait: measured on the schedule as executed, against the formula.

    python bench/pipeline.py

Four gloo ranks run tessera's own ``Pipeline`` over stages that compute nothing and *sleep* instead, ``t`` seconds
forward, ``t`` for the gradient of the input and ``t`` for that of the weights (a rank with ``v`` stages: ``t / v``
each). Sleeping needs no core, so four ranks on two cores wait for one another exactly as four GPUs would. Every stretch
of work is stamped with the machine's clock; the idle share of a step is what the ranks do not work between its first
and its last stretch. With ``p`` ranks and ``m`` microbatches::

    1f1b          (p - 1) / (m + p - 1)         interleaved   (p - 1) / (v m + p - 1)
    zero_bubble   (p - 1) / (3 v m + p - 1)     only the forward passes of the first microbatch are not filled

What messages and the scheduler itself cost comes on top, and so does whatever else the machine does; the smallest of
some steps is compared.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import harness

ROWS, WIDTH, TOLERANCE = 8, 8, 0.05
KINDS = (("1f1b", 1), ("interleaved", 2), ("zero_bubble", 2))


@dataclass(frozen=True)
class Stub:
    """As much of a batch as a pipeline looks at."""

    num_tokens: int = ROWS


def formula(kind: str, ranks: int, chunks: int, microbatches: int) -> float:
    """Idle share of a schedule whose messages take no time."""
    work = {"1f1b": microbatches, "interleaved": chunks * microbatches, "zero_bubble": 3 * chunks * microbatches}[kind]
    return (ranks - 1) / (work + ranks - 1)


def on_rank(kind: str, chunks: int, microbatches: int, unit_s: float, repeats: int) -> list[list[tuple[float, float]]]:
    """The stretches of work (start, end) of this rank, for each of ``repeats`` steps after a first one."""
    import torch

    from tessera.contract.layout import layout_of
    from tessera.parallel.mesh import Mesh, world_size
    from tessera.parallel.pipeline import Pipeline

    mesh = Mesh.from_env(layout_of(world_size(), pp=world_size()), timeout_s=120)
    pp, seen = mesh.layout.pp, Clock(unit_s / chunks)
    indices = range(mesh.rank, pp * chunks, pp)
    stages = [sleeping(seen, index == 0, index == pp * chunks - 1) for index in indices]
    pipeline = Pipeline(mesh, stages, indices, pp * chunks, WIDTH, kind)
    batches: Any = [Stub()] * microbatches
    found = []
    for _ in range(repeats + 1):
        mesh.barrier()
        seen.spans = []
        pipeline.run(batches, None, 1.0, torch.float32)  # type: ignore[arg-type]
        found.append(seen.spans)
    return found[1:]


class Clock:
    """Sleeps, and remembers when."""

    def __init__(self, unit_s: float) -> None:
        self.unit_s = unit_s
        self.spans: list[tuple[float, float]] = []

    def work(self) -> None:
        start = time.monotonic()
        time.sleep(self.unit_s)
        self.spans.append((start, time.monotonic()))


def sleeping(clock: Clock, first: bool, last: bool) -> Any:
    """A stage ``y = x + w`` that sleeps for each of its three products."""
    import torch
    from torch import Tensor, nn

    from tessera.contract.model import LossSum

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            clock.work()
            return grads[0].clone()  # what is sent has to be contiguous

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(ROWS, WIDTH))
            self.start = nn.Parameter(torch.zeros(ROWS, WIDTH)) if first else None
            self.sums: list[LossSum] = []

        def give(self, *args: Any) -> None:
            self.sums = []

        def forward(self, carried: Tensor, index: Tensor) -> Tensor:
            clock.work()
            out: Tensor = Slow.apply(carried if self.start is None else self.start) + Slow.apply(self.w)
            if not last:
                return out
            self.sums.append(LossSum(out.detach().sum(), 1.0))
            return out.sum()

    return Stage()


def idle(spans: Sequence[Sequence[tuple[float, float]]]) -> float:
    """Share of all ranks' time between a step's first and last stretch in which they do not work."""
    flat = [span for rank in spans for span in rank]
    length = max(end for _, end in flat) - min(start for start, _ in flat)
    return 1.0 - sum(end - start for start, end in flat) / (length * len(spans))


def main() -> int:
    """Measure and report; 0 if every idle share is within ``TOLERANCE`` of its formula."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--unit", type=float, default=0.15, help="seconds of one forward pass of a rank's layers")
    parser.add_argument("--microbatches", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    from tests.ranks import run_ranks

    rows = []
    print(f"{'schedule':<14}{'v':>3}{'m':>5}{'measured':>11}{'range':>18}{'formula':>10}{'difference':>12}")
    for kind, chunks in KINDS:
        for count in args.microbatches:
            if count < args.ranks * chunks:
                continue  # tessera refuses fewer microbatches than stages
            spans = run_ranks(on_rank, args.ranks, kind, chunks, count, args.unit, args.repeats)
            found = sorted(idle([rank[step] for rank in spans]) for step in range(args.repeats))
            want, got = formula(kind, args.ranks, chunks, count), found[0]
            rows.append(
                {
                    "schedule": kind, "stages_per_rank": chunks, "microbatches": count, "idle": round(got, 4),
                    "range": [round(found[0], 4), round(found[-1], 4)], "formula": round(want, 4),
                    "within": abs(got - want) <= TOLERANCE,
                }
            )  # fmt: skip
            span = f"{found[0]:.3f}..{found[-1]:.3f}"
            print(f"{kind:<14}{chunks:>3}{count:>5}{got:>11.3f}{span:>18}{want:>10.3f}{got - want:>+12.3f}", flush=True)
    settings = {"ranks": args.ranks, "unit_s": args.unit, "repeats": args.repeats, "tolerance": TOLERANCE}
    harness.save("pipeline", rows, settings)
    return 0 if all(row["within"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
