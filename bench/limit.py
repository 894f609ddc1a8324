"""How far a training step is from the limit: its useful arithmetic per second against the processor's own matmul rate.

    python bench/limit.py

One microbatch, forward and backward, in this process, all threads. *Useful* counts the multiplications and additions
of matrix products and attention (``torch.utils.flop_counter``; recomputation inside a kernel is not counted), and the
limit is what ``torch.mm`` reaches on 2048 x 2048 matrices in the same minute. A tool that takes ``r`` times as long as
ours on the same rows runs at ``1 / r`` of our share, so this line also says how large a ratio can get at all.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import harness, rows
from bench.data import interleaved, planned
from bench.harness import Line

SIDE = 2048


def main() -> int:
    """Measure and report; there is no target."""
    parser = harness.parser(__doc__)
    parser.add_argument("--passes", type=int, default=3, help="steps of one measurement (default 3)")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    left, right = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    peak = rate(lambda: torch.mm(left, right), 2.0 * SIDE**3, 10)
    lines = []
    for kind, units, capacity in (("page448", 1, 0), ("page448", 8, 0), ("mixed", 1, 1024)):
        step, flops = prepared(kind, units, capacity)
        for _ in range(4):
            step()  # memory settles
        found = interleaved({"step": rate(step, flops, args.passes), "peak": peak}, args.repeats)
        what = f"forward + backward, {kind}, {f'pack of {capacity}' if capacity else f'bs {units}'}"
        lines.append(Line(what, "torch.mm", found["step"], found["peak"], "GFLOP/s"))
    settings = {"repeats": args.repeats, "threads": args.threads, "passes": args.passes, "dtype": "float32"}
    return harness.report("limit", lines, settings)


def rate(work: Callable[[], Any], flops: float, passes: int) -> Callable[[], float]:
    """A measurement: GFLOP/s of ``passes`` runs of ``work``, each of so many floating-point operations."""

    def measure() -> float:
        started = time.perf_counter()
        for _ in range(passes):
            work()
        return passes * flops / (time.perf_counter() - started) / 1e9

    return measure


def prepared(kind: str, units: int, capacity: int) -> tuple[Callable[[], None], float]:
    """Forward and backward of the first microbatch of a kind, and how many operations that takes."""
    from torch.utils.flop_counter import FlopCounterMode

    from tessera.data.loader import Loader
    from tessera.models.families import family_of
    from tessera.models.init import init_weights
    from tessera.objectives.lm import NextToken

    corpus = planned(rows.rows_file(kind, 128 if capacity else 200))
    loader = Loader(
        corpus, units_per_batch=units, packing=capacity > 0, capacity=capacity or None, threads=0, shuffle=False
    )
    batch = next(iter(loader)).batches[0]
    config = json.loads((rows.model_dir("10m") / "config.json").read_text())
    model = init_weights(family_of(config).build(config), config, 0).train()
    objective = NextToken()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        (model(batch, objective).total / batch.weight).backward()

    with FlopCounterMode(display=False, custom_mapping=attention()) as counter:
        step()
    return step, float(counter.get_total_flops())


def attention() -> dict[Any, Any]:
    """Operation counts of the CPU's attention kernels, which the counter does not know: causal ones do half."""
    import torch

    def forward(q: Any, k: Any, v: Any, dropout_p: float = 0.0, is_causal: bool = False, **_: Any) -> int:
        batch, heads, length, width = q
        return int(4 * batch * heads * length * k[2] * width // (2 if is_causal else 1))

    def backward(
        grad_out: Any, q: Any, k: Any, v: Any, out: Any, logsumexp: Any, dropout_p: float, is_causal: bool, **_: Any
    ) -> int:
        return forward(q, k, v, is_causal=is_causal) * 2

    ops = torch.ops.aten
    return {
        ops._scaled_dot_product_flash_attention_for_cpu: forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


if __name__ == "__main__":
    sys.exit(main())
