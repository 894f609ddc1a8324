"""Every rule in docs/invariants.md names a test, and the test exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMED = re.findall(r"`(tests/[^`]+)`", (ROOT / "docs" / "invariants.md").read_text())


@pytest.mark.parametrize("name", NAMED)
def test_guard_exists(name: str) -> None:
    path, _, function = name.partition("::")
    assert f"def {function or 'test_'}" in (ROOT / path).read_text()


def test_there_are_rules() -> None:
    assert len(NAMED) > 20
