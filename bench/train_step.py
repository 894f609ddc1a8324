"""Training speed: tessera against a bare loop, TRL and ms-swift, on the same model (10M Qwen2.5-VL) and rows.

    python bench/train_step.py                    everything (on 2 cores about 1 to 2 hours)
    python bench/train_step.py --only bare        unpacked, same batches, against the bare loop      (>= 1.0x)
    python bench/train_step.py --only packing     natural lengths, packed, against padding, batch 8  (>= 2x tokens/s)
    python bench/train_step.py --only pages       unpacked 448 px pages against TRL and ms-swift     (>= 1.5x)
    python bench/train_step.py --only mixed       natural lengths, each tool at its best             (>= 2x)

``bare`` and ``pages`` compare samples per second in the steady state: the time between the lines of step ``skip + 1``
and of the last step. ``packing`` and ``mixed`` train two whole epochs and count the second: it holds every row once,
in whatever order and grouping, so its non-padding tokens are exactly those of the file. "At its best": TRL and
ms-swift refuse packing here (images; no flash attention on a CPU), so each is tried with batch 8, with batch 1 and,
ms-swift, grouped by length; the fastest of one trial run is the one compared.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import contestants, harness, rows
from bench.contestants import Task
from bench.harness import Contestant, Line, Trace

EPOCH = re.compile(r"[\"']epoch[\"']\s*:\s*[\"']?([\d.]+)")
SECTIONS = ("bare", "packing", "pages", "mixed")


def main() -> int:
    """Run the chosen sections; 0 if every target is met."""
    parser = harness.parser(__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run (default: all)"
    )
    parser.add_argument("--size", choices=sorted(rows.SHAPES), default="10m", help="model (default 10m)")
    parser.add_argument("--steps", type=int, default=12, help="steps of a steady-state run (default 12)")
    parser.add_argument("--skip", type=int, default=2, help="steps left out at its start (default 2)")
    parser.add_argument(
        "--rows", type=int, default=128, help="rows of the natural mixture, a multiple of 8 (default 128)"
    )
    parser.add_argument("--capacity", type=int, default=1024, help="tokens in a pack, about 8 rows (default 1024)")
    parser.add_argument(
        "--peers", nargs="+", choices=("trl", "swift"), default=["trl", "swift"], help="peers to compare with"
    )
    parser.add_argument("--name", default="train_step", help="name of the result file")
    args = parser.parse_args()
    args.dtype = harness.dtype_for(args.dtype)
    sections = {"bare": against_bare, "packing": packing, "pages": pages, "mixed": mixed}
    lines: list[Line] = []
    for name in args.only:
        harness.note(f"{name}:")
        lines += sections[name](args)
    kept = ("repeats", "threads", "dtype", "size", "steps", "skip", "rows", "capacity")
    settings = {name: getattr(args, name) for name in kept} | {"parameters": rows.parameters(args.size)}
    return harness.report(args.name, lines, settings)


def task(args: argparse.Namespace, kind: str, batch: int, accumulation: int, count: int, steps: int) -> Task:
    return Task(rows.model_dir(args.size), rows.rows_file(kind, count), batch, accumulation, steps, args.dtype)


def alternate(args: argparse.Namespace, group: Sequence[Contestant]) -> dict[str, list[Trace]]:
    return harness.alternate(group, args.repeats, args.threads, args.timeout)


def against_bare(args: argparse.Namespace) -> list[Line]:
    """Unpacked, the same rows in the same batches: short lines and pages, microbatch 1 and 8."""
    lines = []
    for kind, batch, accumulation in (("line", 1, 8), ("line", 8, 1), ("page448", 1, 8), ("page448", 8, 1)):
        here = task(args, kind, batch, accumulation, 200, args.steps)
        ours, theirs = contestants.tessera(here), contestants.bare(here)
        traces = alternate(args, (ours, theirs))
        speed = {name: [here.samples / trace.steady(args.skip) for trace in runs] for name, runs in traces.items()}
        what = f"unpacked {kind}, bs {batch} x ga {accumulation}"
        lines.append(
            Line(what, "bare loop, batches ready", speed[ours.name], speed[theirs.name], "samples/s", at_least=1.0)
        )
    return lines


def packing(args: argparse.Namespace) -> list[Line]:
    """The natural mixture: packs against padded batches of 8."""
    ours = packed_tessera(args)
    theirs = contestants.bare(task(args, "mixed", 8, 1, args.rows, 2 * args.rows // 8))
    traces = alternate(args, (ours, theirs))
    total = mixture_tokens(args)
    speed = {name: [total / second_epoch(trace) for trace in runs] for name, runs in traces.items()}
    what = f"natural lengths, packs of {args.capacity}"
    return [Line(what, "bare loop, padded bs 8", speed[ours.name], speed[theirs.name], "tokens/s", at_least=2.0)]


def pages(args: argparse.Namespace) -> list[Line]:
    """Unpacked 448 px pages against the peers, microbatch 1 and 8."""
    lines = []
    for batch, accumulation in ((1, 8), (8, 1)):
        here = task(args, "page448", batch, accumulation, 200, args.steps)
        ours = contestants.tessera(here)
        theirs = {peer: contestant(args, peer, here) for peer in args.peers}
        traces = alternate(args, (ours, *theirs.values()))
        speed = {name: [here.samples / trace.steady(args.skip) for trace in runs] for name, runs in traces.items()}
        for other in theirs.values():
            what = f"unpacked page448, bs {batch} x ga {accumulation}"
            lines.append(Line(what, other.name, speed[ours.name], speed[other.name], "samples/s", at_least=1.5))
    return lines


def mixed(args: argparse.Namespace) -> list[Line]:
    """The natural mixture, each tool as it is fastest."""
    total = mixture_tokens(args)
    ours = packed_tessera(args)
    best = [fastest(args, peer) for peer in args.peers]
    traces = alternate(args, (ours, *best))
    speed = {name: [total / second_epoch(trace) for trace in runs] for name, runs in traces.items()}
    what = "natural lengths, each at its best"
    return [Line(what, other.name, speed[ours.name], speed[other.name], "tokens/s", at_least=2.0) for other in best]


def packed_tessera(args: argparse.Namespace) -> Contestant:
    here = Task(rows.model_dir(args.size), rows.rows_file("mixed", args.rows), 1, 1, -1, args.dtype)
    return contestants.tessera(here, args.capacity, extra=("--num_train_epochs", "2"))


def fastest(args: argparse.Namespace, peer: str) -> Contestant:
    """The peer's fastest way through the mixture in one trial run each."""
    steps = 2 * args.rows // 8
    batched, single = task(args, "mixed", 8, 1, args.rows, steps), task(args, "mixed", 1, 8, args.rows, steps)
    tries = [contestant(args, peer, batched), contestant(args, peer, single)]
    if peer == "swift":
        grouped = ("--lazy_tokenize", "false", "--group_by_length", "true", "--train_dataloader_shuffle", "true")
        tries.append(contestants.swift(batched, harness.peer_python("swift", args.swift_python), extra=grouped))
    times: dict[str, float] = {}
    for attempt in tries:
        times[attempt.name] = second_epoch(harness.run(attempt, args.threads, args.timeout))
        harness.note(f"  trial {attempt.name}: {times[attempt.name]:.1f} s an epoch")
    return min(tries, key=lambda attempt: times[attempt.name])


def contestant(args: argparse.Namespace, peer: str, here: Task) -> Contestant:
    if peer == "trl":
        return contestants.trl(here, harness.peer_python("trl", args.trl_python))
    return contestants.swift(here, harness.peer_python("swift", args.swift_python))


def mixture_tokens(args: argparse.Namespace) -> int:
    """Tokens of the mixture, vision tokens included, by the bare loop's own encoder."""
    from bench.bare import Encoder

    encoder = Encoder(rows.model_dir(args.size))
    return sum(len(encoder.row(row)[0]) for row in rows.read(rows.rows_file("mixed", args.rows)))


def second_epoch(trace: Trace) -> float:
    """Seconds between the end of the first and of the second epoch, by the ``epoch`` fields or, without, by halves."""
    found: list[Any] = [EPOCH.search(text) for text in trace.output.splitlines() if harness.is_step(text)]
    epochs = [float(match.group(1)) for match in found if match]
    if len(epochs) == len(trace.stamps) and max(epochs) > 1.5:
        start = next(index for index, epoch in enumerate(epochs) if epoch >= 0.9999)
    else:
        start = len(trace.stamps) // 2 - 1
    return trace.stamps[-1] - trace.stamps[start]


if __name__ == "__main__":
    sys.exit(main())
