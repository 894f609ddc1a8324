"""float8 is refused, in one line, wherever it cannot run; what it would convert is decided without a GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tessera.adapt import fp8
from tessera.config.errors import UserError
from tessera.config.resolve import run_of
from tessera.parallel.mesh import Mesh
from tessera.recipes import supervised
from tests.models import make_model_dir

ON = {"model": ".", "dataset": ("unused",), "train_type": "full", "fp8": True}


def refusal(device: str) -> str:
    with pytest.raises(UserError) as caught:
        fp8.require(run_of("sft", **ON).memory, torch.device(device))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_the_flag_nothing_is_asked() -> None:
    fp8.require(run_of("sft", model=".", dataset=("unused",)).memory, torch.device("cpu"))


def test_no_gpu() -> None:
    assert refusal("cpu").startswith("--fp8 true needs an NVIDIA GPU")


def test_an_older_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert refusal("cuda") == "--fp8 true needs compute capability 8.9, and this GPU has 8.0; drop --fp8"


def test_torchao_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refusal("cuda") == "--fp8 true needs the package torchao; install it with: pip install 'tessera[fp8]'"


def test_refused_before_anything_is_read(tmp_path: Path) -> None:
    """The weights of this model are no safetensors file at all; nobody gets as far as noticing."""
    model = make_model_dir(tmp_path / "model", "qwen3")
    (model / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="--fp8 true needs an NVIDIA GPU"):
        supervised.build(run_of("sft", **{**ON, "model": str(model)}), Mesh.single())
