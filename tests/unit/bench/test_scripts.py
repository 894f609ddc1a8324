"""The benchmark scripts start, parse and count; nothing here is timed."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from bench import contestants, harness, rows  # noqa: E402
from bench.harness import Contestant, Line, Trace  # noqa: E402

SCRIPTS = [
    "train_step",
    "startup",
    "data",
    "memory",
    "bare",
    "communication",
    "context",
    "convert",
    "mfu",
    "pipeline",
    "tower",
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script: str) -> None:
    done = subprocess.run([sys.executable, ROOT / "bench" / f"{script}.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{'loss': 6.95, 'step': 1, 'tokens': 12}", True),
        ("  0%|  | 0/3 [00:00<?]  {'loss': '6.959', 'grad_norm': '3.8', 'epoch': '0.02'}", True),
        ("{'loss': nan}", False),
        ("{'eval_loss': 1.0, 'loss': 1.0}", False),
        ("{'train_runtime': '1.2', 'train_loss': '6.9'}", False),
        ("loss_scale: default", False),
    ],
)
def test_step_lines(text: str, expected: bool) -> None:
    assert harness.is_step(text) is expected


def test_a_process_is_timed_from_outside() -> None:
    code = "for i in range(4): print({'loss': 1.5, 'tokens': 7})"
    trace = harness.run(Contestant("x", lambda out: [sys.executable, "-c", code]), threads=1, timeout=60)
    assert len(trace.stamps) == 4 and trace.tokens == [7] * 4
    assert trace.stamps == sorted(trace.stamps) and trace.peak_rss_gib > 0


def test_stop_after_ends_an_endless_process() -> None:
    code = "import time\nwhile True: print({'loss': 1.5}); time.sleep(0.01)"
    endless = Contestant("x", lambda out: [sys.executable, "-c", code], stop_after=2)
    assert len(harness.run(endless, threads=1, timeout=60).stamps) == 2


def test_a_failing_contestant_is_an_error() -> None:
    with pytest.raises(harness.BenchError, match="boom"):
        harness.run(Contestant("x", lambda out: [sys.executable, "-c", "raise SystemExit('boom')"]), 1, 60)


def test_mfu_without_a_gpu_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "mfu.py"],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no NVIDIA GPU" in done.stderr


@pytest.mark.slow
def test_mfu_runs_on_a_cpu() -> None:
    command = ["bench/mfu.py", "--size", "tiny", "--device", "cpu", "--steps", "3", "--skip", "1", "--compile", "no"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tessera ") == 2 and done.stdout.count("Trainer ") == 2


@pytest.mark.parametrize(("kind", "chunks", "share"), [("1f1b", 1, 3 / 7), ("interleaved", 2, 3 / 11)])
def test_idle_share_of_a_schedule_without_messages(kind: str, chunks: int, share: float) -> None:
    from bench.pipeline import formula, idle

    assert formula(kind, 4, chunks, 4) == share
    assert idle([[(0.0, 1.0), (2.0, 3.0)], [(1.0, 2.0), (3.0, 4.0)]]) == 0.5


def test_line_ratio_and_target() -> None:
    line = Line("a", "b", [2.0, 4.0, 3.0], [1.0, 2.0, 1.5], "x/s", at_least=2.0)
    assert line.ratio == 2.0 and line.met
    assert not Line("a", "b", [2.0], [1.0], "s", at_most=1.5).met


def test_steady_state_leaves_out_the_start() -> None:
    assert Trace([10.0, 20.0, 21.0, 22.0], [], 0, 0, 0).steady(1) == 1.0


def test_second_epoch() -> None:
    from bench.train_step import second_epoch

    epochs = (0.5, 1.0, 1.5, 2.0)
    output = "\n".join(f"{{'loss': 1.0, 'epoch': {epoch}}}" for epoch in epochs)
    assert second_epoch(Trace([1.0, 3.0, 4.0, 8.0], [], 0, 0, 0, output)) == 5.0
    assert second_epoch(Trace([1.0, 3.0, 4.0, 8.0], [], 0, 0, 0, "")) == 5.0


def test_rows_are_drawn_from_the_seed(tmp_path: Path) -> None:
    made = [rows.mixed(random.Random(3), tmp_path, 0) for _ in range(2)]
    assert made[0] == made[1]
    assert made[0]["messages"][0]["content"].count("<image>") == len(made[0]["images"])


def test_tessera_command_line_is_understood(tmp_path: Path) -> None:
    from tessera.config.resolve import resolve

    task = contestants.Task(tmp_path, tmp_path / "rows.jsonl", 2, 4, 5, "float32")
    for contestant in (contestants.tessera(task), contestants.tessera(task, 512)):
        command = list(contestant.command(tmp_path / "out"))
        run = resolve(command[command.index("sft") :], {})
        assert run.train.per_device_train_batch_size == 2 and run.train.max_steps == 5
        assert not run.train.gradient_checkpointing and run.adapt.train_type == "full"
