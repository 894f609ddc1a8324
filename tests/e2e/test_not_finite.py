"""Training that has gone wrong stops by itself, keeps what there is, and says which rows it was about."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.command import QUICK, Done, checkpoint, rows_of, run_dir, tessera
from tests.models import make_model_dir
from tests.resume.job import tensors
from tests.toys import chats, write_rows


def train(tmp_path: Path, *more: str) -> Done:
    rows = write_rows(tmp_path / "rows.jsonl", chats(12))
    flags = ("--train_type", "full", "--max_steps", "12", "--gradient_accumulation_steps", "2", "--max_bad_steps", "3")
    model = tmp_path / "model"
    return tessera("sft", "--model", model, "--dataset", rows, *flags, *QUICK, "--output_dir", tmp_path / "out", *more)


def skipped_steps(out: Path) -> list[dict[str, object]]:
    return [row for row in rows_of(run_dir(out) / "logging.jsonl") if row.get("event") == "skipped_step"]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_poisoned_checkpoint(tmp_path: Path, poison: float) -> None:
    model = make_model_dir(tmp_path / "model", "qwen3")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] = poison
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    done = train(tmp_path)
    assert done.code == 1
    assert "3 steps in a row had to be skipped (loss is not finite)" in done.error and "--max_bad_steps" in done.error
    last = checkpoint(tmp_path / "out")
    assert last.name == "checkpoint-3" and f"saved {last}" in done.error
    assert all(torch.equal(value, weights[name]) or poison != poison for name, value in tensors(last).items())
    skipped = skipped_steps(tmp_path / "out")
    assert [row["sample_ids"] for row in skipped] and all(len(row["sample_ids"]) == 2 for row in skipped)  # type: ignore[arg-type]
    assert len(skipped) == 3


def test_a_learning_rate_that_explodes(tmp_path: Path) -> None:
    make_model_dir(tmp_path / "model", "qwen3")
    done = train(tmp_path, "--learning_rate", "1e30", "--lr_scheduler_type", "constant")
    assert done.code == 1
    assert "steps in a row had to be skipped" in done.error and "Lower --learning_rate" in done.error
    assert len(skipped_steps(tmp_path / "out")) == 3
    assert checkpoint(tmp_path / "out").name.startswith("checkpoint-")
