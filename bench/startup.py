"""Start-up: seconds from process start to the first optimiser step, tiny model, 2,000 rows.

    python bench/startup.py                    against ms-swift (<= 1/6) and TRL (<= 0.8x); the bare loop for scale

Every tool is started as a fresh process and killed after its first step line; the clock is the parent's. Rows are
short handwriting lines, one row a step, so that what is timed is imports, argument handling, reading and planning
2,000 rows, and loading. Each tool runs once before the first timed run, so that files are in the page cache and
Python's byte code is compiled for everybody.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import contestants, harness, rows
from bench.contestants import Task
from bench.harness import Contestant, Line


def main() -> int:
    """Measure and report; 0 if every target is met."""
    parser = harness.parser(__doc__)
    parser.add_argument("--rows", type=int, default=2000, help="rows of the dataset (default 2000)")
    parser.add_argument("--size", choices=sorted(rows.SHAPES), default="tiny", help="model (default tiny)")
    parser.add_argument(
        "--peers", nargs="*", choices=("trl", "swift"), default=["trl", "swift"], help="peers to compare with"
    )
    args = parser.parse_args()
    dtype = harness.dtype_for(args.dtype)
    task = Task(rows.model_dir(args.size), rows.rows_file("line", args.rows), 1, 1, 100000, dtype)
    ours = contestants.tessera(task, stop_after=1)
    # --data live: the bare loop must not prepare 100,000 batches first
    yardstick = contestants.bare(task, data="live", stop_after=1)
    peers: dict[str, Contestant] = {}
    if "swift" in args.peers:
        peers["swift"] = contestants.swift(task, harness.peer_python("swift", args.swift_python), stop_after=1)
    if "trl" in args.peers:
        peers["trl"] = contestants.trl(task, harness.peer_python("trl", args.trl_python), stop_after=1)
    group = (ours, yardstick, *peers.values())
    harness.note("warm-up:")
    harness.alternate(group, 1, args.threads, args.timeout)
    harness.note("timed:")
    traces = harness.alternate(group, args.repeats, args.threads, args.timeout)
    first = {name: [trace.first_step for trace in runs] for name, runs in traces.items()}
    most = {"swift": 1 / 6, "trl": 0.8}
    lines = [
        Line(f"first step, {args.rows} rows", peer.name, first[ours.name], first[peer.name], "s", at_most=most[key])
        for key, peer in peers.items()
    ]
    lines.append(
        Line(f"first step, {args.rows} rows", "bare loop (for scale)", first[ours.name], first[yardstick.name], "s")
    )
    settings = {"rows": args.rows, "size": args.size, "repeats": args.repeats, "threads": args.threads, "dtype": dtype}
    return harness.report("startup", lines, settings)


if __name__ == "__main__":
    sys.exit(main())
