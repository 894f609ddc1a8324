"""The loop: in what order a run trains, measures, saves and stops.

There is one trainer. What is optimised is the engine's objective, what is trained the optimisers' business, where the
data comes from the loader's, how checkpoints appear the store's; the trainer only knows the order::

    for each step:  batches -> rate -> train_step -> log? -> evaluate? -> save? -> asked to stop?

Everything that influences what comes next, or what will be printed, is in :class:`Progress` and in the loader's
cursor, and both are in every checkpoint; so a resumed run prints the lines an uninterrupted one would have printed.
SIGTERM and SIGINT ask for a stop: the step under way ends, a checkpoint is published and the run ends with the
conventional exit code 128 + signal. A later second signal ends the process; nothing published can be harmed.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from tessera.checkpoint.background import Publisher, Write
from tessera.checkpoint.store import TRAINER_STATE, write_json
from tessera.config.errors import UserError
from tessera.data.loader import Loader, Step
from tessera.observe.metrics import RunLog
from tessera.parallel.apply import Sharder
from tessera.train.optim import Optimizers
from tessera.train.step import Engine, StepResult, evaluate_loss, train_step

REPEAT_S = 3.0
"""A second signal within this many seconds is the same one: Ctrl-C reaches a rank from terminal and launcher."""


class SignalError(Exception):
    """Training stopped because of a signal, after saving; ``code`` is the process's exit code."""

    def __init__(self, code: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by signal {code - 128}; saved {checkpoint}")
        self.code = code


@dataclass(frozen=True, slots=True)
class Cadence:
    """When things happen, in optimiser steps; 0 means never (but for the last checkpoint, see ``save_at_end``).

    ``max_bad_steps`` is how many steps in a row may be skipped because they were not finite.
    """

    max_steps: int
    logging_steps: int
    eval_steps: int
    save_steps: int
    save_at_end: bool = True
    log_first: bool = True
    max_bad_steps: int = 5
    max_grad_norm: float = 1.0


@dataclass(slots=True)
class Window:
    """Sums since the last log line. ``seconds`` and ``waited`` are clock readings, the rest is exact."""

    loss: float = 0.0
    weight: float = 0.0
    correct: float = 0.0
    count: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    waited: float = 0.0


@dataclass(slots=True)
class Progress:
    """How far a run has come; stored in ``trainer_state.json``."""

    step: int = 0
    epoch: float = 0.0
    bad_steps: int = 0
    bad_in_row: int = 0
    samples: int = 0
    tokens: int = 0
    metric: float | None = None
    window: Window = field(default_factory=Window)


@dataclass(slots=True)
class Trainer:
    """One training run, ready to go; ``stage_checkpoint()(dir)`` writes model and tensors of now, on all ranks.

    ``benchmarks(step, beat)`` measures the model as it is, on all ranks; what it returns on rank 0 is logged.
    """

    engine: Engine
    optimizers: Optimizers
    loader: Loader
    evals: Callable[[], Loader] | None
    publisher: Publisher
    log: RunLog
    cadence: Cadence
    stage_checkpoint: Callable[[], Write]
    progress: Progress = field(default_factory=Progress)
    on_first_step: Callable[[], None] = lambda: None
    benchmarks: Callable[[int, Callable[[], None]], Mapping[str, float]] | None = None
    _signal: int = 0
    _signalled: float = 0.0

    def fit(self) -> dict[str, Any]:
        """Train to ``max_steps``; returns the run's summary. Raises SignalError after a signal, UserError if stuck."""
        self.log.start()
        last: Path | None = None
        heart = self.engine.heart
        heart.step = self.progress.step
        with self._signals():
            heart.enter("data")
            clock, waited = time.monotonic(), self.loader.waited
            for item in self.loader:
                self.optimizers.set_step(self.progress.step)
                self.engine.model.train()
                result = train_step(
                    self.engine, self.optimizers, item.batches, max_grad_norm=self.cadence.max_grad_norm
                )
                self._account(item, result, time.monotonic() - clock, self.loader.waited - waited)
                heart.step = self.progress.step
                if self.progress.step == 1:
                    self.on_first_step()
                self._log(result)
                self._evaluate()
                saved = self._save()
                last = saved or last
                self.publisher.poll()
                self._check_stop(result, saved)
                heart.enter("data")
                clock, waited = time.monotonic(), self.loader.waited
        self.publisher.wait()
        store = self.publisher.store
        if self.progress.step < self.cadence.max_steps:
            raise UserError(f"the data ended at step {self.progress.step} of {self.cadence.max_steps}")
        return {
            "last_model_checkpoint": str(last or ""),
            "best_model_checkpoint": str(store.best or ""),
            "best_metric": store.best_metric,
            "global_step": self.progress.step,
            "skipped_steps": self.progress.bad_steps,
            "train_tokens": self.progress.tokens,
            "train_samples": self.progress.samples,
        }

    def _account(self, item: Step, result: StepResult, seconds: float, waited: float) -> None:
        progress, window = self.progress, self.progress.window
        progress.step += 1
        progress.epoch = item.epoch
        progress.tokens += result.tokens
        speaks = self.engine.mesh.counts_samples
        ids = [i for batch in item.batches for i in batch.sample_ids if i >= 0 and speaks]
        progress.samples += int(self.engine.mesh.sum([len(ids)])[0])
        window.tokens += result.tokens
        window.seconds += seconds
        window.waited += waited
        if result.skipped is None:
            progress.bad_in_row = 0
            window.loss += result.loss * result.weight
            window.weight += result.weight
            window.correct += result.metrics.get("correct", 0.0)
            window.count += result.metrics.get("count", 0.0)
            return
        progress.bad_steps += 1
        progress.bad_in_row += 1
        every = sorted(i for part in self.engine.mesh.gather(ids) for i in part)
        values = {"reason": result.skipped, "loss": result.loss, "grad_norm": result.grad_norm, "sample_ids": every}
        self.log.note("skipped_step", values, progress.step)

    def _due(self, every: int) -> bool:
        step = self.progress.step
        return every > 0 and (step % every == 0 or step == self.cadence.max_steps)

    def _log(self, result: StepResult) -> None:
        self.log.tick(self.progress.step)
        first = self.progress.step == 1 and self.cadence.log_first
        if not (first or self._due(self.cadence.logging_steps)):
            return
        window, self.progress.window = self.progress.window, Window()
        rates = self.optimizers.rates()
        values: dict[str, float | int | str] = {
            "loss": window.loss / window.weight if window.weight else float("nan"),
            "grad_norm": result.grad_norm,
            "learning_rate": max(rates.values()),
            "token_acc": window.correct / max(1.0, window.count),
            "epoch": round(self.progress.epoch, 6),
            "tokens/s": round(window.tokens / max(1e-9, window.seconds), 1),
            "data_wait(%)": round(100 * window.waited / max(1e-9, window.seconds), 2),
        }
        values |= {name: float(f"{value:.6g}") for name, value in result.routers.items()}
        if self.loader.packing:
            values["pack_efficiency"] = round(self.loader.efficiency, 4)
        sharder = self.engine.sharder
        if isinstance(sharder, Sharder) and sharder.balancer is not None:
            values["tower_imbalance"] = round(sharder.imbalance, 4)
            values["tower_imbalance_without"] = round(sharder.unbalanced, 4)
        values |= {f"lr_{name}": rate for name, rate in rates.items() if rate != values["learning_rate"]}
        if self.progress.bad_steps:
            values["skipped_steps"] = self.progress.bad_steps
        self.log.step(values, self.progress.step)

    def _evaluate(self) -> None:
        self.progress.metric = None
        if not self._due(self.cadence.eval_steps):
            return
        if self.evals is not None:
            self._evaluate_loss(self.evals())
        if self.benchmarks is not None:
            start, step = time.monotonic(), self.progress.step
            found = self.benchmarks(step, lambda: self.engine.heart.enter("benchmarks"))
            values: dict[str, float | int | str] = {f"eval_{name}": value for name, value in found.items()}
            values |= {"eval_runtime": round(time.monotonic() - start, 4), "epoch": round(self.progress.epoch, 6)}
            self.log.eval(values, step)

    def _evaluate_loss(self, loader: Loader) -> None:
        start = time.monotonic()
        self.engine.heart.enter("eval")
        self.engine.model.eval()
        sums = {"total": 0.0, "weight": 0.0, "correct": 0.0, "count": 0.0}
        samples = 0
        with self.log.eval_progress(loader.total_steps) as bar:
            for item in loader:
                for name, value in evaluate_loss(self.engine, item.batches).items():
                    sums[name] = sums.get(name, 0.0) + value
                speaks = self.engine.mesh.counts_samples
                samples += sum(i >= 0 and speaks for batch in item.batches for i in batch.sample_ids)
                bar.advance()
        self.engine.model.train()
        names = sorted(sums)
        *values, total_samples = self.engine.mesh.sum([*(sums[name] for name in names), samples])
        sums = dict(zip(names, values, strict=True))
        seconds = max(1e-9, time.monotonic() - start)
        loss = sums["total"] / sums["weight"] if sums["weight"] else float("nan")
        self.progress.metric = loss
        values_out: dict[str, float | int | str] = {
            "eval_loss": loss,
            "eval_token_acc": sums["correct"] / max(1.0, sums["count"]),
            "eval_runtime": round(seconds, 4),
            "eval_samples_per_second": round(total_samples / seconds, 3),
            "eval_steps_per_second": round(loader.total_steps / seconds, 3),
            "epoch": round(self.progress.epoch, 6),
        }
        self.log.eval(values_out, self.progress.step)

    def _save(self, *, force: bool = False) -> Path | None:
        step, cadence = self.progress.step, self.cadence
        at_end = cadence.save_at_end and step == cadence.max_steps
        if not (force or at_end or self._due(cadence.save_steps)):
            return None
        self.engine.heart.enter("save")
        state = {"progress": asdict(self.progress), "loader": self.loader.state(), "max_steps": cadence.max_steps}
        routers = self.engine.routers
        state |= {} if routers is None else {"routers": routers.state()}
        state |= {"step": step, "epoch": self.progress.epoch, "metric": self.progress.metric}

        def stage() -> Write:
            write = self.stage_checkpoint()

            def write_all(directory: Path) -> None:
                write(directory)
                if self.engine.mesh.is_main:
                    write_json(directory / TRAINER_STATE, state)

            return write_all

        return self.publisher.publish(step, stage, metric=self.progress.metric)

    def _check_stop(self, result: StepResult, saved: Path | None) -> None:
        """After a signal, or with too many bad steps: save (unless just done) and leave."""
        number = int(max(self.engine.mesh.gather(self._signal)))
        if number:
            path = saved or self._save(force=True)
            assert path is not None
            self.publisher.wait()
            raise SignalError(128 + number, path)
        if self.progress.bad_in_row >= self.cadence.max_bad_steps:
            path = saved or self._save(force=True)
            self.publisher.wait()
            raise UserError(
                f"{self.progress.bad_in_row} steps in a row had to be skipped ({result.skipped}), as many as "
                f"--max_bad_steps allows; saved {path}. Lower --learning_rate, or see the sample ids in logging.jsonl"
            )

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """While active, the first SIGTERM or SIGINT asks for a stop and the second one kills."""
        previous: dict[signal.Signals, Any] = {}

        def ask(number: int, frame: FrameType | None) -> None:
            if not self._signal:
                self._signal, self._signalled = number, time.monotonic()
                # Not print: the signal may have arrived in the middle of one.
                os.write(2, b"\nstopping: a checkpoint will be saved after this step (again to stop at once)\n")
            elif time.monotonic() - self._signalled > REPEAT_S:
                for which, handler in previous.items():
                    signal.signal(which, handler)
                signal.raise_signal(number)

        for which in (signal.SIGTERM, signal.SIGINT):
            previous[which] = signal.signal(which, ask)
        try:
            yield
        finally:
            for which, handler in previous.items():
                signal.signal(which, handler)


def restore(state: dict[str, Any]) -> Progress:
    """The progress stored in a checkpoint's trainer state."""
    values = dict(state["progress"])
    return Progress(**{**values, "window": Window(**values["window"])})
