"""A checkpoint belongs to no layout: saved on one arrangement of ranks, resumed on another, the same curve."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.resume.job import log_rows, make, run, start, tensors

LAYOUTS = {
    "1": ("1", []),
    "dp2": ("2", []),
    "dp2-zero3": ("2", ["--deepspeed", "zero3"]),
    "tp2": ("2", ["--tensor_model_parallel_size", "2"]),
    "cp2": ("2", ["--context_parallel_size", "2"]),
    "pp2": ("2", ["--pipeline_model_parallel_size", "2"]),
    "pp2xtp2": ("4", ["--pipeline_model_parallel_size", "2", "--tensor_model_parallel_size", "2"]),
    "dp2xcp2": ("4", ["--context_parallel_size", "2"]),
}
PAIRS = [
    ("tp2", "pp2", "full"),
    ("pp2", "cp2", "full"),
    ("cp2", "1", "full"),
    ("dp2-zero3", "tp2", "full"),
    ("pp2xtp2", "dp2xcp2", "full"),
    ("1", "pp2xtp2", "full"),
    ("tp2", "1", "lora"),
    ("pp2", "tp2", "lora"),
    ("dp2", "pp2", "lora"),
]
CORE = {("tp2", "pp2", "full"), ("pp2", "tp2", "lora")}


def train(argv: list[str], out: Path, layout: str, *more: str) -> None:
    """Run the job on a layout, in processes of its own; batches are the same whatever the number of data ranks."""
    ranks, flags = LAYOUTS[layout]
    data = 2 if "dp2" in layout else 1
    words = [*flags, "--gradient_accumulation_steps", str(4 // data), *more]
    log = out.parent / f"{out.name}-{layout}.txt"
    process = start(argv, out, *words, log=log, NPROC_PER_NODE=ranks, OMP_NUM_THREADS="1")
    assert process.wait(240) == 0, log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved", "resumed", "kind"),
    [pytest.param(*pair, marks=[] if pair in CORE else [pytest.mark.parallel], id="-".join(pair)) for pair in PAIRS],
)
def test_saved_on_one_layout_resumed_on_another(saved: str, resumed: str, kind: str, tmp_path: Path) -> None:
    argv = [*make(tmp_path, "qwen3_vl", rows=24), "--train_type", kind, "--lora_dropout", "0"]
    argv += ["--adam_epsilon", "1e-2", "--freeze_vit", "false" if kind == "full" else "true"]
    straight = run([*argv, "--gradient_accumulation_steps", "4"], tmp_path / "a")
    train(argv, tmp_path / "b", saved)
    [killed] = (tmp_path / "b").glob("v*-*")
    shutil.rmtree(killed / "checkpoint-8")
    train(argv, tmp_path / "b", resumed, "--resume_from_checkpoint", "true")
    got, want = log_rows(killed), log_rows(straight)
    assert [row.get("global_step/max_steps") for row in got] == [row.get("global_step/max_steps") for row in want]
    for mine, other in zip(got, want, strict=True):
        for key in ("loss", "eval_loss", "grad_norm", "token_acc"):
            if key in other:
                assert mine[key] == pytest.approx(other[key], rel=1e-4), (key, mine, other)
    weights, expected = tensors(killed / "checkpoint-8"), tensors(straight / "checkpoint-8")
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert (weights[name] - value).abs().max() < 1e-4, name
