"""RunLog: what is written, what a resumed run drops, what other ranks must not do."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tessera.config.errors import UserError
from tessera.observe.metrics import KEY_ORDER, TIME_KEYS, RunLog, peak_memory_gib, truncate
from tessera.observe.progress import Progress, format_row, format_time


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "logging.jsonl").read_text().splitlines()]


def timeless(run_dir: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIME_KEYS} for row in rows(run_dir)]


def train(log: RunLog, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.step({"loss": 3.0 / step, "learning_rate": 1e-4, "tokens/s": 100.0 * step, "epoch": step / 10}, step)
        if step % 4 == 0:
            log.eval({"eval_loss": 4.0 / step, "eval_token_acc": 0.5, "eval_runtime": 0.25}, step)


def test_step_line_has_the_documented_keys_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, max_steps=9)
    log.step(
        {"pack_efficiency": 0.97, "loss": 11.89761353, "grad_norm": 2.1, "learning_rate": 1e-9, "token_acc": 0.0}
        | {"epoch": 0.1, "skipped_rows": 2, "data_wait(%)": 1.5, "tokens/s": 1234.5}
        | {"tower_imbalance_without": 2.0, "tower_imbalance": 1.01},
        1,
    )
    (row,) = rows(tmp_path)
    expected = [key for key in KEY_ORDER if not key.startswith("eval_")] + ["skipped_rows"]
    assert list(row) == expected
    assert row["loss"] == 11.8976135 and row["learning_rate"] == 1e-9
    assert row["global_step/max_steps"] == "1/9"
    assert row["elapsed_time"] == "0s" and isinstance(row["train_speed(s/it)"], float)
    assert row["memory(GiB)"] == pytest.approx(peak_memory_gib(), rel=0.5)
    out = capsys.readouterr()
    assert out.out.startswith("{'loss': 11.8976, 'grad_norm': 2.1, ") and out.out.count("\n") == 1
    assert out.err == ""  # no bar where there is no terminal


def test_lines_are_on_disk_at_once_and_float32_survives(tmp_path: Path) -> None:
    log = RunLog(tmp_path, max_steps=9)
    value = 0.1234567165374755859375  # a float32
    log.step({"loss": value}, 1)
    import numpy as np

    assert np.float32(rows(tmp_path)[0]["loss"]) == np.float32(value)


def test_not_finite_stays_strict_json(tmp_path: Path) -> None:
    log = RunLog(tmp_path, max_steps=9)
    log.step({"loss": float("nan"), "grad_norm": float("inf")}, 1)
    log.note("non_finite", {"sample_ids": [3, 4], "loss": float("nan")}, 1)
    lines = (tmp_path / "logging.jsonl").read_text()
    json.loads(lines.splitlines()[0], parse_constant=lambda name: pytest.fail(name))
    assert rows(tmp_path)[0]["loss"] == "nan" and rows(tmp_path)[0]["grad_norm"] == "inf"
    assert rows(tmp_path)[1] == {
        "event": "non_finite",
        "global_step/max_steps": "1/9",
        "sample_ids": [3, 4],
        "loss": "nan",
    }


def test_resumed_log_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    log = RunLog(straight, max_steps=10)
    train(log, 1, 10)
    log.finish({"global_step": 10})
    log = RunLog(killed, max_steps=10)
    train(log, 1, 7)
    with open(killed / "logging.jsonl", "a") as file:
        file.write('{"loss": 0.1, "global_st')  # killed while writing
    log = RunLog(killed, max_steps=10, resumed_step=5)
    train(log, 6, 10)
    log.finish({"global_step": 10})
    assert timeless(killed) == timeless(straight)
    assert len(rows(killed)) == 13


def test_resume_drops_the_last_row_of_a_finished_run(tmp_path: Path) -> None:
    log = RunLog(tmp_path, max_steps=4)
    train(log, 1, 4)
    log.finish({"global_step": 4})
    log = RunLog(tmp_path, max_steps=6, resumed_step=4)
    train(log, 5, 6)
    log.finish({"global_step": 6})
    assert [row["global_step"] for row in rows(tmp_path) if "global_step" in row] == [6]


def test_new_run_starts_an_empty_log(tmp_path: Path) -> None:
    (tmp_path / "logging.jsonl").write_text('{"loss": 1, "global_step/max_steps": "0/3"}\n')
    RunLog(tmp_path, max_steps=3)
    assert (tmp_path / "logging.jsonl").read_text() == ""


def test_truncate_keeps_an_untouched_file(tmp_path: Path) -> None:
    log = tmp_path / "logging.jsonl"
    log.write_text('{"loss": 1, "global_step/max_steps": "1/3"}\n')
    inode = log.stat().st_ino
    truncate(log, 1)
    assert log.stat().st_ino == inode
    truncate(tmp_path / "missing.jsonl", 1)


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    log = RunLog(run_dir, max_steps=3, report_to=["tensorboard", "wandb"], is_main=False)
    log.start()
    train(log, 1, 4)
    log.note("non_finite", {}, 1)
    log.tick(2)
    log.write("hello")
    with log.eval_progress(3) as bar:
        bar.advance()
    log.finish({"global_step": 4})
    log.close()
    assert not run_dir.exists()
    assert capsys.readouterr() == ("", "")


def test_finish_row(tmp_path: Path) -> None:
    log = RunLog(tmp_path, max_steps=2)
    train(log, 1, 2)
    summary = {
        "model_parameter_info": "VLM: 19.77M Params",
        "last_model_checkpoint": tmp_path / "checkpoint-2",
        "best_model_checkpoint": None,
        "best_metric": 0.5,
        "global_step": 2,
        "train_loss": 2.25,
    }
    log.finish(summary)
    log.close()
    last = rows(tmp_path)[-1]
    assert last["last_model_checkpoint"] == str(tmp_path / "checkpoint-2") and last["best_model_checkpoint"] is None
    assert last["best_metric"] == 0.5 and last["global_step"] == 2 and last["train_runtime"] >= 0


def test_speed_does_not_count_evaluations(tmp_path: Path) -> None:
    log = RunLog(tmp_path, max_steps=10)
    log.start()
    log.step({"loss": 1.0}, 1)
    log.eval({"eval_loss": 1.0, "eval_runtime": 1000.0}, 1)
    log.step({"loss": 1.0}, 2)
    assert rows(tmp_path)[-1]["train_speed(s/it)"] < -100  # 1000 s were taken off, which did not really pass
    log.step({"loss": 1.0, "train_speed(s/it)": 0.5}, 3)
    assert rows(tmp_path)[-1]["train_speed(s/it)"] == 0.5


def test_unknown_report_to(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--report_to mlflow"):
        RunLog(tmp_path, max_steps=1, report_to=["mlflow"])


def test_missing_wandb_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        RunLog(tmp_path, max_steps=1, report_to=["wandb"])


def test_wandb_run_is_continued_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Run:
        id = "abc"

        def log(self, values: dict[str, float], step: int) -> None:
            calls.append((step, values["train/loss"]))

        def finish(self) -> None:
            calls.append("finish")

    def init(**kwargs: Any) -> Run:
        calls.append((kwargs["id"], kwargs["name"]))
        return Run()

    wandb = types.ModuleType("wandb")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(wandb, "init", init, raising=False)
    log = RunLog(tmp_path, max_steps=2, report_to=["wandb"], run_name="mine")
    log.step({"loss": 2.0}, 1)
    log.close()
    RunLog(tmp_path, max_steps=2, report_to=["wandb"], resumed_step=1).close()
    assert calls == [(None, "mine"), (1, 2.0), "finish", ("abc", tmp_path.name), "finish"]


def test_time_and_row_formats() -> None:
    assert [format_time(s) for s in (0.4, 59.6, 125, 3603, 172800)] == [
        "0s",
        "1m 0s",
        "2m 5s",
        "1h 0m 3s",
        "2d 0h 0m 0s",
    ]
    assert format_row({"loss": 0.123456789, "n": 3, "t": "1s"}) == "{'loss': 0.123457, 'n': 3, 't': '1s'}"


def test_bar_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("Train", 10, start=4, visible=True) as bar:
        bar.to(6)
        bar.to(5)
        bar.write("a line")
    out = capsys.readouterr()
    assert out.out == "a line\n"
    assert "Train" in out.err and "6/10" in out.err
