"""Whether context ranks share attention evenly, and what it costs each of them, on documents packed into one row.

    python bench/context.py

Counted: the (query, key) pairs of each rank, exactly, from the same ``divide`` that training uses; the largest over the
mean must be at most 1.10 for 2, 4 and 8 ranks. Cutting the row into equal consecutive parts is shown beside it.
Measured: the processor time one rank's attention takes, forward, ranks one after the other in one process; the
slowest of ``cp`` ranks should take ``1 / cp`` of the whole. The mixtures are drawn from a seed:

    chat       turns of 40 to 800 tokens           pages   1,000 to 4,000, a page or two each
    documents  lognormal, median 1,500, to 16,384  long    a document of half the row among short ones
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import harness

LIMIT, RANKS = 1.10, (2, 4, 8)


def chat(rng: np.random.Generator, row: int) -> int:
    """Tokens of a short conversation."""
    return int(rng.integers(40, 800))


def pages(rng: np.random.Generator, row: int) -> int:
    """Tokens of a page with its image, or two."""
    return int(rng.integers(1000, 4000))


def documents(rng: np.random.Generator, row: int) -> int:
    """Tokens of a document: many short, some very long."""
    return int(np.clip(rng.lognormal(np.log(1500), 1.0), 32, 16384))


def long(rng: np.random.Generator, row: int) -> int:
    """Half the row now and then, else short."""
    return row // 2 if rng.random() < 0.05 else int(rng.integers(100, 1000))


MIXTURES: dict[str, Callable[[np.random.Generator, int], int]] = {
    "chat": chat, "pages": pages, "documents": documents, "long": long,
}  # fmt: skip


def packed(mixture: str, row: int, seed: int) -> list[int]:
    """Lengths drawn from ``mixture`` until a row is full; the last one takes what is left."""
    rng, lengths = np.random.default_rng(seed), list[int]()
    while sum(lengths) < row:
        lengths.append(min(MIXTURES[mixture](rng, row), row - sum(lengths)))
    return lengths


def pairs(lengths: Sequence[int], cp: int) -> list[int]:
    """(query, key) pairs of a causal mask on each of ``cp`` ranks."""
    from tessera.parallel.context import divide

    # Row i of a run that starts at ``first`` sees first + i + 1 keys.
    return [
        sum(count * first + count * (count + 1) // 2 for _, first, count in runs) for runs in divide(lengths, cp).runs
    ]


def consecutive(lengths: Sequence[int], cp: int) -> list[int]:
    """The same if each rank took an equal, consecutive part of the row."""
    seen = np.concatenate([np.arange(1, length + 1) for length in lengths])
    return [int(part.sum()) for part in np.array_split(seen, cp)]


def uneven(costs: Sequence[int]) -> float:
    """Largest over mean."""
    return max(costs) * len(costs) / sum(costs)


def seconds(lengths: Sequence[int], cp: int, repeats: int, heads: tuple[int, int, int]) -> list[float]:
    """Processor time of each rank's attention, forward; the fastest of ``repeats``."""
    import torch

    from tessera.contract.batch import Batch, Segments
    from tessera.models.attention import attend, plan
    from tessera.parallel.context import divide, shard

    total, (query, key, size) = sum(lengths), heads
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(total, n, size, generator=generator) for n in (query, key, key))
    ones, ids = torch.ones(total), torch.arange(total)
    batch = Batch(ids, ids, ones, ids, Segments.of(lengths), ids, float(total), tuple(range(len(lengths))))
    division, found = divide(lengths, cp), []
    for rank in range(cp):
        part = shard(batch, division, rank, comm="allgather").shard
        assert part is not None
        layout = plan(part.queries, causal=True, dtype=q.dtype, keys=part.keys, reorder=False)
        mine, keys, values = q, k, v
        if cp > 1:
            # Slot i of what all ranks hold, rank after rank, is this token; fillers repeat the first.
            slots = torch.zeros(cp * division.rows, dtype=torch.int64)
            slots[torch.from_numpy(division.place)] = ids
            assert part.gathered is not None
            keys, values = k[slots[part.gathered]], v[slots[part.gathered]]
            mine = q[slots[rank * division.rows : (rank + 1) * division.rows]]
        found.append(min(timed(lambda m=mine, a=keys, b=values, at=layout: attend(m, a, b, at), repeats)))
    return found


def timed(work: Callable[[], Any], repeats: int) -> list[float]:
    """Processor seconds of each run after a first one: other programs on the machine do not count."""
    stamps = []
    for _ in range(repeats + 1):
        started = time.process_time()
        work()
        stamps.append(time.process_time() - started)
    return stamps[1:]


def main() -> int:
    """Count, measure and report; 0 if every mixture is balanced to ``LIMIT``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", type=int, default=32768, help="tokens of a packed row that are counted")
    parser.add_argument("--timed_row", type=int, default=8192, help="tokens of a packed row that is timed")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    print(f"{'mixture':<11}{'cp':>3}{'max/mean, worst':>17}{'consecutive':>13}{'slowest rank x cp / whole':>27}")
    for mixture in MIXTURES:
        lengths = packed(mixture, args.timed_row, 0)
        (whole,) = seconds(lengths, 1, args.repeats, (8, 2, 64))
        for cp in RANKS:
            drawn = [packed(mixture, args.row, seed) for seed in range(args.seeds)]
            worst = max(uneven(pairs(lengths, cp)) for lengths in drawn)
            naive = max(uneven(consecutive(lengths, cp)) for lengths in drawn)
            share = max(seconds(lengths, cp, args.repeats, (8, 2, 64))) * cp / whole
            rows.append(
                {
                    "mixture": mixture, "cp": cp, "pairs_max_over_mean_worst": round(worst, 4),
                    "consecutive_parts_worst": round(naive, 4), "slowest_rank_times_cp_over_whole": round(share, 3),
                    "met": worst <= LIMIT,
                }
            )  # fmt: skip
            print(f"{mixture:<11}{cp:>3}{worst:>17.4f}{naive:>13.3f}{share:>27.3f}", flush=True)
    settings = {"row": args.row, "timed_row": args.timed_row, "seeds": args.seeds, "limit": LIMIT, "heads": "8 of 64"}
    harness.save("context", rows, settings)
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
