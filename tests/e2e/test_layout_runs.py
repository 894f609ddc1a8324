"""What a layout must not change beyond the numbers of a step: evaluation, the screen, rows and tokens that run out."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.command import rows_of
from tests.models import make_model_dir
from tests.resume.job import log_rows, start
from tests.toys import chats, make_images, write_rows

TP, CP, PP = "--tensor_model_parallel_size", "--context_parallel_size", "--pipeline_model_parallel_size"
LAYOUTS = {
    "dp2": [],
    "tp2": [TP, "2"],
    "cp2": [CP, "2"],
    "pp2": [PP, "2"],
    "ep2": ["--expert_model_parallel_size", "2"],
}
CORE = ("pp2",)
ROWS = [pytest.param(name, marks=[] if name in CORE else [pytest.mark.parallel]) for name in LAYOUTS]
FACTS = ("parameters", "trainable", "modules")


def train(root: Path, layout: str | None, *more: str, family: str, rows: int, held: int) -> Path:
    """The run directory of two steps on ``layout`` (None: one process), in processes of its own."""
    model = make_model_dir(root / "model", family)
    images = make_images(root / "images", [(64, 48), (100, 60)])
    data, val = (
        write_rows(root / "rows.jsonl", chats(rows, images)),
        write_rows(root / "val.jsonl", chats(held, images)),
    )
    data_ranks = 2 if layout in ("dp2", "ep2") else 1
    argv = ["sft", "--model", str(model), "--dataset", str(data), "--val_dataset", str(val), "--torch_dtype", "float32"]
    argv += ["--report_to", "none", "--max_steps", "2", "--logging_steps", "1", "--eval_steps", "1"]
    argv += ["--gradient_accumulation_steps", str(4 // data_ranks), *(LAYOUTS[layout] if layout else []), *more]
    ranks = "2" if layout else "1"
    log = root / f"{layout}.txt"
    process = start(argv, root / str(layout), log=log, NPROC_PER_NODE=ranks, OMP_NUM_THREADS="1")
    assert process.wait(240) == 0, log.read_text()
    [run] = (root / str(layout)).glob("v*-*")
    return run


@cache
def straight(root: Path, *more: str, **sizes: Any) -> Path:
    """What one process makes of it."""
    place = root / f"rows{sizes['rows']}"
    place.mkdir()
    return train(place, None, *more, **sizes)


def compare(run: Path, expected: Path) -> None:
    """Losses of steps and evaluations agree; each validation row was counted."""
    got, want = log_rows(run), log_rows(expected)
    assert len(got) == len(want)
    for mine, other in zip(got, want, strict=True):
        for key in ("loss", "eval_loss", "eval_token_acc", "grad_norm"):
            if key in other:
                assert mine[key] == pytest.approx(other[key], rel=1e-4), (key, mine, other)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layout-runs")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ROWS)
def test_a_short_validation_set_counts_once(layout: str, root: Path, tmp_path: Path) -> None:
    """Five rows, three at a time: neither ranks nor stages divide them."""
    more = ("--per_device_eval_batch_size", "3", "--lora_dropout", "0", "--learning_rate", "1e-2")
    sizes = {"family": "qwen3_vl_moe", "rows": 12, "held": 5}
    compare(train(tmp_path, layout, *more, **sizes), straight(root, *more, **sizes))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parallel
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fewer_rows_than_ranks(layout: str, root: Path, tmp_path: Path) -> None:
    """One row to train on and one to evaluate: some ranks, and most microbatches, have nothing."""
    more = ("--lora_dropout", "0", "--learning_rate", "1e-2", "--freeze_vit", "false")
    sizes = {"family": "qwen3_vl_moe", "rows": 1, "held": 1}
    compare(train(tmp_path, layout, *more, **sizes), straight(root, *more, **sizes))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.parallel)])
def test_the_screen_is_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    """Tied head: the last stage has a copy of the embedding, which is one weight all the same."""
    more, sizes = ("--train_type", kind, "--freeze_vit", "false"), {"family": "qwen3_vl", "rows": 6, "held": 1}
    whole = train(tmp_path, None, *more, **sizes)  # type: ignore[arg-type]
    parts = train(tmp_path, "pp2", *more, **sizes)  # type: ignore[arg-type]
    one, two = (json.loads((run / "run_facts.json").read_text()) for run in (whole, parts))
    assert one["layout"] == "" and {key: one[key] for key in FACTS} == {key: two[key] for key in FACTS}
    assert two["layout"] == "pp2, zero2; stage 0: tower, embedding, layers 0-1; stage 1: layers 2, head"
    assert f"layout      {two['layout']}" in (tmp_path / "pp2.txt").read_text()
    assert rows_of(parts / "logging.jsonl")
