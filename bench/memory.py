"""Peak resident memory of ``tessera sft`` on a 63M-parameter model against the bare loop (<= 1.2x).

    python bench/memory.py

Both are whole processes on the same rows; the figure is the kernel's own high-water mark of the process
(``ru_maxrss`` from ``wait4``), which includes interpreter, libraries, weights, gradients, optimiser and activations.
The bare loop prepares each batch when it is needed (``--data live``), so that it does not hold the whole run's pixels.
Two rows of the table: short lines (weights and optimiser dominate) and 448 px pages (activations too).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import contestants, harness, rows
from bench.contestants import Task
from bench.harness import Line


def main() -> int:
    """Measure and report; 0 if every target is met."""
    parser = harness.parser(__doc__)
    parser.add_argument("--size", choices=sorted(rows.SHAPES), default="60m", help="model (default 60m)")
    parser.add_argument("--steps", type=int, default=4, help="optimiser steps of a run (default 4)")
    parser.add_argument("--kinds", nargs="+", choices=("line", "page448"), default=["line", "page448"], help="rows")
    args = parser.parse_args()
    dtype = harness.dtype_for(args.dtype)
    lines = []
    for kind in args.kinds:
        for batch, accumulation in ((1, 4), (4, 1)):
            task = Task(rows.model_dir(args.size), rows.rows_file(kind, 200), batch, accumulation, args.steps, dtype)
            ours, theirs = contestants.tessera(task), contestants.bare(task, data="live")
            traces = harness.alternate((ours, theirs), args.repeats, args.threads, args.timeout)
            peak = {name: [trace.peak_rss_gib for trace in runs] for name, runs in traces.items()}
            what = f"peak RSS, {kind}, bs {batch} x ga {accumulation}"
            lines.append(Line(what, "bare loop", peak[ours.name], peak[theirs.name], "GiB", at_most=1.2))
    settings = {
        "size": args.size, "parameters": rows.parameters(args.size), "steps": args.steps, "repeats": args.repeats,
        "threads": args.threads, "dtype": dtype,
    }  # fmt: skip
    return harness.report("memory", lines, settings)


if __name__ == "__main__":
    sys.exit(main())
