"""Curves read back from the log, and the pictures made of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tessera.observe.curves import ema, read_log, thin, ticks
from tessera.observe.metrics import RunLog
from tessera.observe.plots import draw


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    log = RunLog(tmp_path, max_steps=4)
    for step in (1, 2, 4):
        log.step({"loss": 1 / step if step != 2 else float("nan"), "learning_rate": 1e-4, "tokens/s": 5.0}, step)
    log.eval({"eval_loss": 0.5, "eval_runtime": 1.0}, 4)
    log.finish({"global_step": 4, "train_loss": 0.6})
    return tmp_path


def test_read_log(run_dir: Path) -> None:
    log = read_log(run_dir)
    assert (log.steps, log.max_steps, log.last["train_loss"]) == (4, 4, 0.6)
    assert [step for step, _ in log.curves["loss"]] == [1, 2, 4]
    assert log.curves["eval_loss"] == [(4, 0.5)]
    assert "global_step/max_steps" not in log.curves and "elapsed_time" not in log.curves


def test_one_picture_per_curve(run_dir: Path) -> None:
    pytest.importorskip("matplotlib")
    made = draw(run_dir)
    names = {path.stem for path in made}
    assert {
        "train_loss",
        "train_learning_rate",
        "train_tokens_s",
        "eval_loss",
        "eval_runtime",
        "train_train_loss",
    } <= names
    assert "train_memory_GiB" in names
    for path in made:
        assert path.parent == run_dir / "images"
        with Image.open(path) as image:
            assert image.format == "PNG" and image.width >= 600


def test_nothing_logged_nothing_drawn(tmp_path: Path) -> None:
    assert draw(tmp_path) == []
    assert not (tmp_path / "images").exists()


def test_without_matplotlib_one_line(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    capsys.readouterr()
    assert draw(run_dir) == []
    assert capsys.readouterr().err == "images/ not drawn: matplotlib is not installed (pip install matplotlib)\n"


def test_ema_is_corrected_for_its_start() -> None:
    assert ema([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert ema([0.0, 1.0]) == pytest.approx([0.0, 0.1 / 0.19])


def test_thin_keeps_ends_and_spikes() -> None:
    points = [(step, 1000.0 if step == 4321 else float(step % 7)) for step in range(10_000)]
    small = thin(points, 100)
    assert len(small) <= 102 and small == sorted(small)
    assert small[0] == points[0] and small[-1] == points[-1] and (4321, 1000.0) in small
    assert thin(points[:50], 100) == points[:50]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.13, 0.97), (-3, 1e6), (5, 5), (0, 0), (1e-9, 2e-9)])
def test_ticks_cover_the_range(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 9


def test_training_imports_nothing_slow() -> None:
    code = (
        "import sys, json, tessera.observe.metrics, tessera.observe.facts, tessera.observe.screen;"
        "slow = ('torch', 'numpy', 'matplotlib', 'tensorboard', 'PIL', 'tqdm');"
        "print(json.dumps([name for name in slow if name in sys.modules]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == []
