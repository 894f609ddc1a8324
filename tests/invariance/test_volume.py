"""What a step sends is what the formulas say, to the byte, and no collective is without one."""

from __future__ import annotations

import pytest

from bench.communication import CASES, Case, measured


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=[] if case.core else [pytest.mark.parallel]) for case in CASES]
)
def test_every_byte_has_a_formula(case: Case) -> None:
    for rank, found in enumerate(measured(case)):
        assert not found.unexplained, f"rank {rank}: {found.unexplained}"
        assert sum(found.counted.values()) > 0
