"""The event file must be what TensorBoard itself reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from tessera.observe.metrics import RunLog
from tessera.observe.tfevents import EventFile, masked_crc


def accumulate(folder: Path):  # type: ignore[no-untyped-def]
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder))
    events.Reload()
    return events


def test_masked_crc_of_the_standard_check_string() -> None:
    crc = 0xE3069283  # CRC-32C of "123456789"
    assert masked_crc(b"123456789") == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_tensorboard_reads_it(tmp_path: Path) -> None:
    log = RunLog(tmp_path, max_steps=300, report_to=["tensorboard"])
    for step in (1, 200, 300):
        log.step({"loss": 1 / step, "learning_rate": 1e-5}, step)
    log.eval({"eval_loss": 0.5}, 300)
    log.finish({"global_step": 300, "train_loss": 0.25})
    events = accumulate(tmp_path / "runs")
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/learning_rate", "eval/loss", "train/train_loss", "train/memory(GiB)"} <= tags
    assert [(e.step, round(e.value, 6)) for e in events.Scalars("train/loss")] == [
        (1, 1.0),
        (200, 0.005),
        (300, 0.003333),
    ]


def test_resumed_run_replaces_the_steps_after_the_checkpoint(tmp_path: Path) -> None:
    for resumed, first, last in ((0, 1, 7), (4, 5, 9)):
        log = RunLog(tmp_path, max_steps=9, report_to=["tensorboard"], resumed_step=resumed)
        for step in range(first, last + 1):
            log.step({"loss": float(step + 100 * resumed)}, step)
        log.close()
    points = [(e.step, e.value) for e in accumulate(tmp_path / "runs").Scalars("train/loss")]
    assert points == [(s, float(s)) for s in range(1, 5)] + [(s, float(s + 400)) for s in range(5, 10)]


def test_nothing_written_no_file(tmp_path: Path) -> None:
    EventFile(tmp_path / "runs").close()
    assert not (tmp_path / "runs").exists()
