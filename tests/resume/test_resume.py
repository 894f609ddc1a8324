"""A run that is interrupted and resumed cannot be told from one that was not."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tessera.config.errors import UserError
from tests.resume.job import assert_identical, log_rows, make, run, start, tensors

JOBS = {
    "full-vl": ("qwen3_vl", ["--train_type", "full", "--freeze_vit", "false"]),
    "lora-dropout-packed": ("qwen3", ["--lora_dropout", "0.3", "--packing", "true", "--packing_length", "128"]),
    "muon": ("qwen3", ["--train_type", "full", "--optim", "muon", "--lr_scheduler_type", "warmup_stable_decay"]),
}


@pytest.mark.parametrize("job", JOBS)
def test_resumed_is_straight(job: str, tmp_path: Path) -> None:
    family, flags = JOBS[job]
    argv = [*make(tmp_path, family), *flags]
    straight = run(argv, tmp_path / "a")
    # What kill -9 leaves behind: the log goes on beyond the newest complete checkpoint, a save is half done.
    killed = tmp_path / "b" / straight.name
    shutil.copytree(straight, killed)
    shutil.rmtree(killed / "checkpoint-8")
    (killed / ".writing-checkpoint-8").mkdir()
    with open(killed / "logging.jsonl", "a") as file:
        file.write('{"loss": 1.0, "global_st')
    resumed = run(argv, tmp_path / "b", "--resume_from_checkpoint", "true")
    assert resumed == killed and not (killed / ".writing-checkpoint-8").exists()
    assert_identical(resumed, straight)


@pytest.mark.parametrize("turn", [False, True])
def test_an_optimizer_may_move_at_a_resume(turn: bool, tmp_path: Path) -> None:
    """From the device to the host and back, with activations that were kept and then are not: bit for bit the same."""
    argv = [*make(tmp_path, "qwen3"), "--train_type", "full"]
    device = ["--gradient_checkpointing", "false"]
    host = ["--deepspeed", "zero2_offload", "--optimizer_offload_fraction", "0.7", "--recompute_num_layers", "2"]
    first, second = (host, device) if turn else (device, host)
    straight = run([*argv, *first], tmp_path / "a")
    moved = tmp_path / "b" / straight.name
    shutil.copytree(straight, moved)
    shutil.rmtree(moved / "checkpoint-8")
    assert_identical(run([*argv, *second], tmp_path / "b", "--resume_from_checkpoint", "true"), straight)


def wait_for(
    condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, *, certain: bool = True
) -> bool:
    """Whether the condition came true before the process ended, which it must if it is ``certain``."""
    deadline = time.monotonic() + 120
    while not condition():
        if process.poll() is not None:
            assert not certain and process.returncode == 0, f"the run ended early:\n{log.read_text()}"
            return False
        assert time.monotonic() < deadline, f"nothing happened:\n{log.read_text()}"
        time.sleep(0.001)
    return True


def steps_logged(out: Path) -> int:
    return sum(1 for path in out.glob("*/logging.jsonl") for line in path.read_text().splitlines() if '"loss"' in line)


@pytest.mark.timeout(400)
def test_killed_at_any_instant_also_during_a_save(tmp_path: Path) -> None:
    argv = [*make(tmp_path, "qwen3"), "--train_type", "full"]
    straight = run(argv, tmp_path / "a")
    out, log = tmp_path / "b", tmp_path / "log.txt"
    moments = [
        lambda: steps_logged(out) >= 2,
        lambda: bool(list(out.glob("*/.writing-checkpoint-4/*"))),
        lambda: bool(list(out.glob("*/checkpoint-4"))) and steps_logged(out) >= 4,
        lambda: bool(list(out.glob("*/.writing-checkpoint-8/*"))),
    ]
    for moment in moments:
        for last in (False, False, True):
            resumable = bool(list(out.glob("*/checkpoint-*")))
            process = start(argv, out, *(["--resume_from_checkpoint", "true"] if resumable else []), log=log)
            if wait_for(moment, process, log, certain=last):
                break
            # On a busy machine the moment can pass while nobody looks: once more, from before it.
            for missed in out.glob("*/checkpoint-8"):
                shutil.rmtree(missed)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        for checkpoint in out.glob("*/checkpoint-*"):
            assert json.loads((checkpoint / "trainer_state.json").read_text())["step"] in (4, 8)
    resumed = run(argv, out, "--resume_from_checkpoint", "true")
    assert_identical(resumed, straight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(number: signal.Signals, tmp_path: Path) -> None:
    argv = [*make(tmp_path, "qwen3"), "--train_type", "full", "--logging_steps", "1"]
    out, log = tmp_path / "b", tmp_path / "log.txt"
    process = start(argv, out, log=log)
    wait_for(lambda: steps_logged(out) >= 1, process, log)
    process.send_signal(number)
    assert process.wait(60) == 128 + number, log.read_text()
    assert "Traceback" not in log.read_text()
    [checkpoint] = out.glob("*/checkpoint-*")
    assert f"saved {checkpoint}" in log.read_text()
    resumed = run(argv, out, "--resume_from_checkpoint", "true")
    assert_identical(resumed, run(argv, tmp_path / "a"))


def test_changed_data_or_schedule_is_refused(tmp_path: Path) -> None:
    argv = [*make(tmp_path, "qwen3"), "--train_type", "full"]
    out = tmp_path / "a"
    run(argv, out)
    again = ["--resume_from_checkpoint", "true"]
    for flags, message in (
        (["--gradient_accumulation_steps", "4"], "batch size x accumulation x processes has changed"),
        (["--system", "Answer in digits."], "the dataset, its template or --max_length has changed"),
        (["--max_steps", "12"], "that run had 8 steps and this one has 12"),
        (
            ["--freeze_llm", "false", "--trainable_parameters", "lm_head", "--freeze_parameters", "model"],
            "other parameters",
        ),
    ):
        with pytest.raises(UserError, match=message):
            run(argv, out, *again, *flags)


def test_only_model_cannot_be_resumed_but_says_so(tmp_path: Path) -> None:
    argv = [*make(tmp_path, "qwen3"), "--train_type", "full", "--save_only_model", "true"]
    out = tmp_path / "a"
    straight = run(argv, out)
    assert not (straight / "checkpoint-8" / "state").exists()
    with pytest.raises(UserError, match="holds no optimizer state"):
        run(argv, out, "--resume_from_checkpoint", str(straight / "checkpoint-4"))


def test_two_ranks_resume_as_one_in_data_order(tmp_path: Path) -> None:
    """Saved by one process, resumed by two: the same rows, the same losses up to the order of summation."""
    argv = [*make(tmp_path, "qwen3"), "--train_type", "full"]
    straight = run(argv, tmp_path / "a")
    killed = tmp_path / "b" / straight.name
    shutil.copytree(straight, killed)
    shutil.rmtree(killed / "checkpoint-8")
    log = tmp_path / "log.txt"
    flags = ["--gradient_accumulation_steps", "1", "--resume_from_checkpoint", "true"]
    process = start(argv, tmp_path / "b", *flags, log=log, NPROC_PER_NODE="2", OMP_NUM_THREADS="1")
    assert process.wait(240) == 0, log.read_text()
    got, want = log_rows(killed), log_rows(straight)
    assert [row.get("global_step/max_steps") for row in got] == [row.get("global_step/max_steps") for row in want]
    for mine, other in zip(got, want, strict=True):
        for key in ("loss", "eval_loss", "grad_norm"):
            if key in other:
                assert mine[key] == pytest.approx(other[key], rel=1e-4)
    weights, expected = tensors(killed / "checkpoint-8"), tensors(straight / "checkpoint-8")
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert (weights[name] - value).abs().max() < 1e-3, name
