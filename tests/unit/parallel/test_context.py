"""Every token is on exactly one context rank, however short the documents are."""

from __future__ import annotations

import numpy as np
import pytest

from tessera.parallel.context import divide


@pytest.mark.parametrize("lengths", [[1], [1, 2, 3], [7, 1, 16], [40]])
@pytest.mark.parametrize("cp", [1, 2, 4])
@pytest.mark.parametrize("multiple", [1, 2])
def test_every_token_once(lengths: list[int], cp: int, multiple: int) -> None:
    made = divide(lengths, cp, multiple)
    assert sorted(np.concatenate(made.held)) == list(range(sum(lengths)))
    assert made.rows % multiple == 0 and max(len(held) for held in made.held) <= made.rows
    assert len(set(made.place)) == sum(lengths)
    for held, runs in zip(made.held, made.runs, strict=True):
        assert sum(count for _, _, count in runs) == len(held) and all(count > 0 for _, _, count in runs)


def test_one_size_for_all_microbatches() -> None:
    assert divide([5], 2, 2, least=9).rows == 10
