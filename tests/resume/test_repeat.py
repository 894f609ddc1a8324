"""The same command, seed and layout twice: the same log and the same bytes, whatever exchanges in between."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.resume.job import assert_identical, make, start

PP, TP, CP = "--pipeline_model_parallel_size", "--tensor_model_parallel_size", "--context_parallel_size"
LAYOUTS = {
    "pp2": ("qwen3_vl", "2", [PP, "2"]),
    "tp2xcp2": ("qwen3_vl", "4", [TP, "2", CP, "2"]),
    "ep2": ("qwen3_vl_moe", "2", ["--expert_model_parallel_size", "2"]),
    "pp2-interleaved": ("qwen3", "2", [PP, "2", "--virtual_pipeline_model_parallel_size", "2"]),
}
CORE = ("pp2",)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[] if name in CORE else [pytest.mark.parallel]) for name in LAYOUTS]
)
def test_twice_is_the_same(layout: str, tmp_path: Path) -> None:
    family, ranks, flags = LAYOUTS[layout]
    sizes = {"num_hidden_layers": 4} if "interleaved" in layout else {}
    argv = [*make(tmp_path, family, **sizes), *flags, "--train_type", "full", "--freeze_vit", "false"]
    runs = []
    for name in ("a", "b"):
        log = tmp_path / f"{name}.txt"
        words = ["--gradient_accumulation_steps", "4"]
        process = start(argv, tmp_path / name, *words, log=log, NPROC_PER_NODE=ranks, OMP_NUM_THREADS="1")
        assert process.wait(240) == 0, log.read_text()
        [run] = (tmp_path / name).glob("v*-*")
        runs.append(run)
    assert_identical(*runs)
