"""How evenly data ranks share the vision tower when a few images are large and many are small.

    python bench/tower.py

Four data ranks draw their images from a skewed mixture: pages of about 2 megapixels among thumbnails. The cost of an
image is the tower's own (``Tower.cost``: the products of its patches and their attention), and who encodes what is
decided by the rule that training uses (``parallel/balance.py``). Shown are the largest over the mean load, balanced
and had every image stayed with the rank that drew it, over a number of steps. No clock is read.

An image is encoded by one rank, so a step with fewer pages than ranks cannot be even. The target (1.1, in every step)
is for what fills a packed row of about 11,000 tokens, 64 images a rank; the shorter mixtures show where it ends.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import harness

LIMIT = 1.1
Grid = tuple[int, int, int]
TOWER = {"depth": 32, "hidden": 1280, "heads": 16, "whole": 4}
"""A tower of the usual size: 32 blocks of 1280, of which four attend to whole images, the others to windows."""


def grids(ranks: int, seed: int, images: int = 64, pages: float = 0.05) -> list[list[Grid]]:
    """What each rank draws: ``images`` patch grids, of which a share of ``pages`` are pages (14 px patches)."""
    rng = np.random.default_rng(seed)

    def one() -> Grid:
        if rng.random() < pages:
            return (1, 2 * int(rng.integers(56, 62)), 2 * int(rng.integers(41, 46)))
        return (1, 2 * int(rng.integers(4, 11)), 2 * int(rng.integers(4, 11)))

    return [[one() for _ in range(images)] for _ in range(ranks)]


def cost(grid: Grid) -> float:
    """``Tower.cost`` of a tower of the sizes above."""
    from torch import nn

    from tessera.models.tower import Tower, TowerConfig

    config = TowerConfig(
        depth=TOWER["depth"], hidden=TOWER["hidden"], heads=TOWER["heads"], patch=14, temporal=2, merge=2,
        norm=nn.Identity, mlp=nn.Identity, merger=nn.Identity, patch_bias=False, whole=frozenset(range(TOWER["whole"])),
    )  # fmt: skip

    class Sizes(Tower):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.config = config

    return Sizes().cost(grid)


def loads(drawn: Sequence[Sequence[Grid]], ranks: int) -> tuple[float, float]:
    """Largest over mean load of one step, balanced and not."""
    from tessera.parallel.balance import assign, at_home, imbalance

    items = [(rank, grid) for rank, mine in enumerate(drawn) for grid in mine]
    costs = [cost(grid) for _, grid in items]
    stayed = at_home(costs, [rank for rank, _ in items], 1)
    return imbalance(costs, assign(costs, ranks), ranks), imbalance(costs, stayed, ranks)


def main() -> int:
    """Count and report; 0 if every step of full rows is balanced to ``LIMIT``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    rows = []
    print(f"{'images per rank':>16}{'pages':>8}{'balanced: median':>18}{'worst':>8}{'without: median':>17}{'worst':>8}")
    for images, pages in ((16, 0.1), (24, 0.1), (64, 0.05)):
        found = [loads(grids(args.ranks, seed, images, pages), args.ranks) for seed in range(args.steps)]
        balanced, without = [one for one, _ in found], [one for _, one in found]
        row = {
            "images_per_rank": images, "share_of_pages": pages,
            "balanced_median": round(statistics.median(balanced), 4), "balanced_worst": round(max(balanced), 4),
            "without_median": round(statistics.median(without), 4), "without_worst": round(max(without), 4),
            "met": max(balanced) <= LIMIT if images == 64 else None,
        }  # fmt: skip
        row["share_of_steps_within"] = round(sum(one <= LIMIT for one in balanced) / len(balanced), 3)
        rows.append(row)
        print(
            f"{images:>16}{pages:>8}{row['balanced_median']:>18}{row['balanced_worst']:>8}"
            f"{row['without_median']:>17}{row['without_worst']:>8}   {row['share_of_steps_within']:.0%} within {LIMIT}"
        )
    harness.save("tower", rows, {"ranks": args.ranks, "steps": args.steps, "limit": LIMIT, "tower": TOWER})
    return 0 if all(row["met"] is not False for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
