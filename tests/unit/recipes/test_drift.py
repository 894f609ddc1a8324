"""The comparison of two models finds what differs, names where it begins, and finds nothing where nothing does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tessera.checkpoint import open as door
from tessera.config.errors import UserError
from tessera.config.resolve import run_of
from tessera.recipes import precision
from tests.models import make_model_dir

FLOAT = torch.float32


def described(path: Path) -> door.Source:
    return door.describe(run_of("export", model=str(path)).model)


def changed(path: Path, pattern: str, name: str = "qwen2_5_vl") -> door.Source:
    """The model again, with the tensors whose names fit ``pattern`` negated."""
    file = make_model_dir(path, name) / "model.safetensors"
    tensors = load_file(file)
    hit = [key for key in tensors if re.fullmatch(pattern, key)]
    assert hit, sorted(tensors)[:5]
    save_file({key: -value if key in hit else value for key, value in tensors.items()}, file, {"format": "pt"})
    return described(path)


@pytest.mark.parametrize("name", ["qwen2", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v_moe", "internvl"])
def test_a_model_is_equal_to_itself(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (described(make_model_dir(tmp_path / each, name)) for each in ("a", "b"))
    precision.check(one, two, dtype=FLOAT, limit=0.0)
    shown = capsys.readouterr().out
    assert "model.language_model.layers.0" in shown or name == "qwen2"
    assert ("features" in shown) == (name != "qwen2") and "differs: 0" in shown


@pytest.mark.parametrize(
    ("pattern", "part"),
    [
        (r".*layers\.1\.self_attn\.k_proj\.weight", "language_model.layers.1:"),
        (r"visual\.blocks\.1\.mlp\.down_proj\.weight", "visual.blocks.1:"),
        (r"visual\.merger\.mlp\.2\.weight", "features:"),
        (r"lm_head\.weight", "logits:"),
    ],
)
def test_the_first_part_that_differs_is_named(tmp_path: Path, pattern: str, part: str) -> None:
    one, two = described(make_model_dir(tmp_path / "a", "qwen2_5_vl")), changed(tmp_path / "b", pattern)
    with pytest.raises(UserError, match=f"first differs from .* in [a-z._]*{re.escape(part)} relative drift"):
        precision.check(one, two, dtype=FLOAT, limit=precision.EXACT)


def test_rounding_is_seen_and_allowed_for(tmp_path: Path) -> None:
    one = described(make_model_dir(tmp_path / "a", "qwen3_vl"))
    two = described(make_model_dir(tmp_path / "b", "qwen3_vl", dtype=torch.bfloat16))
    precision.check(one, two, dtype=FLOAT, limit=precision.ROUNDED)
    with pytest.raises(UserError, match="at most 1e-05 was expected"):
        precision.check(one, two, dtype=FLOAT, limit=precision.EXACT)


def test_what_is_not_a_number_is_far_from_everything(tmp_path: Path) -> None:
    one = described(make_model_dir(tmp_path / "a", "qwen2"))
    file = make_model_dir(tmp_path / "b", "qwen2") / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match="in logits: relative drift inf"):
        precision.check(one, described(tmp_path / "b"), dtype=FLOAT, limit=precision.ROUNDED)
