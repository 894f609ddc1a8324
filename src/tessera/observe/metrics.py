"""Every number of a run, written once and shown everywhere.

The trainer calls :meth:`RunLog.step` each ``--logging_steps``, :meth:`RunLog.eval` after an evaluation and
:meth:`RunLog.finish` at the end. One call goes to four places: a JSON line in ``logging.jsonl`` (the record from which
plots and report are made), a dict-like line on the console, TensorBoard scalars in ``runs/``, and wandb if asked for.

``logging.jsonl`` is part of the resume contract. A killed run has usually logged a few steps beyond its last
checkpoint; a run that resumes at step N first drops every line after step N (and a torn last line), so that the
finished file equals that of a run that was never killed, except under :data:`TIME_KEYS`.

The log adds what it can know by itself: the step, elapsed and remaining time, seconds per step since the last line
(evaluations not counted), peak memory. A value the trainer passes under the same key wins. On ranks other than the
main one every method does nothing, so the trainer needs no ``if``.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from tessera.config.errors import UserError
from tessera.observe.progress import Progress, format_row, format_time
from tessera.observe.tfevents import EventFile

LOG_FILE = "logging.jsonl"
STEP_KEY = "global_step/max_steps"
EVENT_KEY = "event"
KEY_ORDER = (
    "loss",
    "grad_norm",
    "learning_rate",
    "token_acc",
    "eval_loss",
    "eval_token_acc",
    "eval_runtime",
    "eval_samples_per_second",
    "eval_steps_per_second",
    "epoch",
    STEP_KEY,
    "elapsed_time",
    "remaining_time",
    "memory(GiB)",
    "train_speed(s/it)",
    "tokens/s",
    "data_wait(%)",
    "pack_efficiency",
    "tower_imbalance",
    "tower_imbalance_without",
)
TIME_KEYS = frozenset(
    {
        "elapsed_time",
        "remaining_time",
        "memory(GiB)",
        "train_speed(s/it)",
        "tokens/s",
        "data_wait(%)",
        "eval_runtime",
        "eval_samples_per_second",
        "eval_steps_per_second",
        "train_runtime",
        "train_samples_per_second",
        "train_steps_per_second",
    }
)
"""Keys that depend on the clock or the machine and so differ between two otherwise identical runs."""

Value = float | int | str


def peak_memory_gib() -> float:
    """Most memory this process has held so far, in GiB: allocated on the GPU if it uses one, else resident."""
    torch = sys.modules.get("torch")  # never import it just to ask
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return max(torch.cuda.max_memory_allocated(d) for d in range(torch.cuda.device_count())) / 2**30
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: a child process inherits its parent's peak there.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


class RunLog:
    """The log of one run in ``run_dir``; see the module docstring.

    ``report_to`` names the extra places: ``tensorboard`` (in ``runs/``, or ``events_dir``) and ``wandb`` (``project``).
    ``resumed_step`` is the step of the checkpoint
    the run continues from, 0 for a new run (which then starts an empty log).
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        max_steps: int,
        report_to: Sequence[str] = (),
        is_main: bool = True,
        resumed_step: int = 0,
        run_name: str | None = None,
        project: str | None = None,
        events_dir: str | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.max_steps = max_steps
        self.is_main = is_main
        self._file: TextIO | None = None
        self._events: EventFile | None = None
        self._wandb: Any = None
        self._bar: Progress | None = None
        self._start = self._last_time = time.monotonic()
        self._first_step = self._last_step = resumed_step
        self._eval_seconds = 0.0  # since the last line
        self._eval_seconds_total = 0.0
        if not is_main:
            return
        unknown = set(report_to) - {"tensorboard", "wandb", "none"}
        if unknown:
            raise UserError(f"--report_to {' '.join(sorted(unknown))}: unknown; use tensorboard, wandb or none")
        self.run_dir.mkdir(parents=True, exist_ok=True)
        truncate(self.run_dir / LOG_FILE, resumed_step)
        self._file = (self.run_dir / LOG_FILE).open("a", encoding="utf-8")
        if "tensorboard" in report_to:
            purge = resumed_step + 1 if resumed_step else None
            self._events = EventFile(Path(events_dir) if events_dir else self.run_dir / "runs", purge_step=purge)
        if "wandb" in report_to:
            self._wandb = _open_wandb(self.run_dir, run_name, project)

    def start(self) -> None:
        """Start the clock: call it right before the first step, so that loading does not count as training."""
        self._start = self._last_time = time.monotonic()

    def step(self, values: Mapping[str, Value], step: int) -> None:
        """Log ``values`` of training at optimiser step ``step`` (1-based)."""
        if not self.is_main:
            return
        now = time.monotonic()
        busy = now - self._last_time - self._eval_seconds
        done, total = step - self._first_step, now - self._start
        per_step = (total - self._eval_seconds_total) / max(1, done)
        own: dict[str, Value] = {
            STEP_KEY: f"{step}/{self.max_steps}",
            "elapsed_time": format_time(total),
            "remaining_time": format_time(per_step * max(0, self.max_steps - step)),
            "memory(GiB)": round(peak_memory_gib(), 3),
            "train_speed(s/it)": round(busy / max(1, step - self._last_step), 6),
        }
        self._last_time, self._last_step, self._eval_seconds = now, step, 0.0
        self._write({**own, **values}, step, "train/")
        self.tick(step)

    def eval(self, values: Mapping[str, Value], step: int) -> None:
        """Log the results of an evaluation (keys ``eval_*``) made at ``step``."""
        if not self.is_main:
            return
        seconds = values.get("eval_runtime", 0.0)
        if isinstance(seconds, (int, float)):
            self._eval_seconds += seconds
            self._eval_seconds_total += seconds
        own: dict[str, Value] = {
            STEP_KEY: f"{step}/{self.max_steps}",
            "elapsed_time": format_time(time.monotonic() - self._start),
        }
        self._write({**own, **values}, step, "eval/")

    def note(self, event: str, values: Mapping[str, Any], step: int) -> None:
        """Log something that is not a curve, e.g. ``note("non_finite", {"loss": ..., "sample_ids": [...]}, 17)``."""
        if self.is_main:
            self._emit({EVENT_KEY: event, STEP_KEY: f"{step}/{self.max_steps}", **values})

    def tick(self, step: int) -> None:
        """Move the progress bar to ``step``; cheap enough for every step, and nothing where there is no terminal."""
        if self.is_main:
            self._train_bar().to(step)

    def eval_progress(self, total: int) -> Progress:
        """The ``Val`` bar over ``total`` batches; use it as a context manager and ``advance()`` it."""
        return Progress("Val", total, visible=None if self.is_main else False)

    def write(self, line: str) -> None:
        """Print a line of text above the bar (main rank only)."""
        if self.is_main:
            self._train_bar().write(line)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the last row and close everything.

        ``summary`` holds ``last_model_checkpoint``, ``best_model_checkpoint``, ``best_metric``, ``global_step``,
        ``model_parameter_info`` and whatever else is worth keeping; numbers among ``train_*`` also go to TensorBoard.
        """
        if not self.is_main:
            return
        last_step = int(summary.get("global_step", self._last_step))
        row = {
            "global_step": last_step,
            "train_runtime": round(time.monotonic() - self._start, 3),
            "memory(GiB)": round(peak_memory_gib(), 3),
            **summary,
        }
        curves = {key: value for key, value in row.items() if key.startswith("train_")}
        self._scalars(curves, last_step, "train/")
        self._emit(row)
        self.close()

    def close(self) -> None:
        """Close files and bar without a last row (an interrupted run); closing twice is harmless."""
        if self._bar is not None:
            self._bar.close()
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def _train_bar(self) -> Progress:
        # Made at the first use, not with the log, so that what is printed before step 1 does not run into it.
        if self._bar is None:
            self._bar = Progress("Train", self.max_steps, start=self._first_step)
        return self._bar

    def _write(self, values: Mapping[str, Any], step: int, prefix: str) -> None:
        order = {key: index for index, key in enumerate(KEY_ORDER)}
        self._emit(dict(sorted(values.items(), key=lambda item: order.get(item[0], len(order)))))
        self._scalars(values, step, prefix)

    def _emit(self, row: Mapping[str, Any]) -> None:
        clean = {key: _plain(value) for key, value in row.items()}
        if self._file is not None:
            self._file.write(json.dumps(clean, ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()
        self._train_bar().write(format_row(clean))

    def _scalars(self, values: Mapping[str, Any], step: int, prefix: str) -> None:
        scalars = {
            prefix + key.removeprefix("eval_"): float(value)
            for key, value in values.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        if self._events is not None and scalars:
            self._events.scalars(scalars, step)
        if self._wandb is not None and scalars:
            self._wandb.log(scalars, step=step)


def truncate(log: Path, resumed_step: int) -> None:
    """Drop the lines of ``log`` that a run resumed at ``resumed_step`` will write again; torn lines and last rows too.

    The file is replaced atomically, and only if something changes.
    """
    if not log.exists():
        return
    lines = log.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if resumed_step and 0 <= _step_of(line) <= resumed_step]
    if len(kept) == len(lines):
        return
    aside = log.with_name(log.name + ".tmp")
    with open(aside, "wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, log)


def _step_of(line: bytes) -> int:
    """The step of a complete log line; -1 for a torn line and for the last row of a finished run."""
    if not line.endswith(b"\n"):
        return -1
    try:
        row = json.loads(line)
    except ValueError:
        return -1
    return int(str(row[STEP_KEY]).split("/")[0]) if isinstance(row, dict) and STEP_KEY in row else -1


def _plain(value: Any) -> Any:
    """``value`` as strict JSON: floats to the 9 digits that identify a float32; ``nan`` and ``inf`` as text."""
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _open_wandb(run_dir: Path, run_name: str | None, project: str | None) -> Any:
    """A wandb run kept in ``run_dir``; its id lies in ``runs/wandb_id``, so a resumed run continues the same curves."""
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        raise UserError("--report_to wandb: the package is not installed; pip install wandb, or leave it out") from None
    id_file = run_dir / "runs" / "wandb_id"
    known = id_file.read_text().strip() if id_file.exists() else None
    run = wandb.init(dir=str(run_dir), project=project, name=run_name or run_dir.name, id=known, resume="allow")
    id_file.parent.mkdir(parents=True, exist_ok=True)
    id_file.write_text(run.id)
    return run
