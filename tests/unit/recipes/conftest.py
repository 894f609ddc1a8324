"""What the tests of composing share: parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import make_model_dir

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "internvl", "qwen2", "qwen3", "qwen3_moe", "llama")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of every family, in float32: nothing hides in rounding."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(FAMILIES):
        make_model_dir(root / name, name, seed=seed)
    return root
