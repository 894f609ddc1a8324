"""A small training job and what must be equal when it is interrupted and resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tessera.config.resolve import resolve
from tessera.observe.metrics import TIME_KEYS
from tessera.recipes import supervised
from tests.models import make_model_dir
from tests.toys import chats, make_images, write_rows


def make(root: Path, family: str, rows: int = 20, **sizes: Any) -> list[str]:
    """Model, images and rows under ``root``; the command line of a job over them, without its output directory."""
    model = make_model_dir(root / "model", family, **sizes)
    images = make_images(root / "images", [(64, 48), (100, 60), (32, 32)]) if "_vl" in family else []
    data = write_rows(root / "rows.jsonl", chats(rows, images))
    return [
        *("sft", "--model", str(model), "--dataset", str(data), "--torch_dtype", "float32"),
        *("--split_dataset_ratio", "0.2", "--eval_steps", "3", "--logging_steps", "2", "--learning_rate", "1e-2"),
        *("--max_steps", "8", "--save_steps", "4", "--gradient_accumulation_steps", "2", "--report_to", "none"),
    ]


def run(argv: list[str], out: Path, *more: str) -> Path:
    """Train in this process; the run directory."""
    last = supervised.main(resolve([*argv, "--output_dir", str(out), *more], {}))
    assert last is not None
    return last.parent


def start(argv: list[str], out: Path, *more: str, log: Path, **env: str) -> subprocess.Popen[bytes]:
    """Train in a process of its own, everything it prints in ``log``."""
    command = [sys.executable, "-u", "-m", "tessera", *argv, "--output_dir", str(out), *more]
    with open(log, "ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **env}, start_new_session=True)


def log_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock, the machine or where the run lies."""
    rows = [json.loads(line) for line in (run_dir / "logging.jsonl").read_text().splitlines()]
    place = {"last_model_checkpoint", "best_model_checkpoint"}
    return [{key: value for key, value in row.items() if key not in TIME_KEYS | place} for row in rows]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every weight of a checkpoint, model or adapter."""
    from safetensors.torch import load_file

    files = sorted(checkpoint.glob("*.safetensors"))
    assert files, f"{checkpoint} holds no weights"
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def optimizer(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Parameters and optimiser state of a checkpoint, read without the model."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    whole = checkpoint.parent / f"{checkpoint.name}.whole.pt"
    dcp_to_torch_save(checkpoint / "state", whole)
    loaded: dict[str, torch.Tensor] = {}
    for part, values in torch.load(whole, weights_only=True).items():
        loaded |= {f"{part}.{name}": tensor for name, tensor in values.items()}
    return loaded


def assert_identical(run_dir: Path, straight: Path, step: int = 8) -> None:
    """Log, weights and optimiser state are equal bit for bit."""
    assert log_rows(run_dir) == log_rows(straight)
    last = f"checkpoint-{step}"
    for read in (tensors, optimizer):
        got, want = read(run_dir / last), read(straight / last)
        assert got.keys() == want.keys()
        different = [name for name, value in want.items() if not torch.equal(got[name], value)]
        assert not different, f"{len(different)} tensors differ, first {different[0]}"
