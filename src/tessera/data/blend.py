"""How much of each dataset an epoch shows, when datasets are blended in given proportions.

Rows are planned once, but a blend does not show each of them once: a dataset with a large weight comes round several
times in an epoch, one with a small weight needs several epochs to come round. Think of every dataset as an endless
sequence of its rows, shuffled anew each time it begins again::

    epoch            0          1          2
    captions   | 3 1 0 2 | 1 0 3 2 | 2 3 0 1 |     4 rows, share 4: each epoch shows all of them
    documents  | 5 2     | 0 4     | 1 3     |     6 rows, share 2: three epochs show all of them

An epoch takes the next ``share`` rows of each. So proportions hold exactly in every epoch, no row is seen twice before
all others of its dataset have been, and what an epoch shows is a function of (seed, epoch) alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def draw(counts: Sequence[int], shares: Sequence[int], seed: int, epoch: int, *, shuffle: bool = True) -> np.ndarray:
    """``[sum(shares)] int64``: the rows that ``epoch`` shows of datasets that lie one behind the other.

    ``counts`` is how many rows each dataset has, ``shares`` how many of them an epoch takes.
    """
    parts, start = [np.empty(0, np.int64)], 0
    for dataset, (count, share) in enumerate(zip(counts, shares, strict=True)):
        at, end = epoch * share, (epoch + 1) * share
        while at < end:
            cycle, inside = divmod(at, count)
            taken = min(count - inside, end - at)
            order = np.random.default_rng([seed, dataset, cycle]).permutation(count) if shuffle else np.arange(count)
            parts.append(start + order[inside : inside + taken])
            at += taken
        start += count
    return np.concatenate(parts)


def whole_shares(shares: Sequence[float]) -> tuple[int, ...]:
    """``shares`` as whole rows with (nearly) the same sum: the largest remainders are rounded up, none becomes 0."""
    down = [int(share) for share in shares]
    missing = round(sum(shares)) - sum(down)
    order = sorted(range(len(shares)), key=lambda i: (down[i] - shares[i], i))
    up = set(order[: max(missing, 0)])
    return tuple(max(count + (i in up), 1) for i, count in enumerate(down))
