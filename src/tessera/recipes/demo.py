"""``tessera demo [DIR]``: a vision-language model that learns to read real handwriting, in minutes, on any machine.

Nothing here is special-cased. The demo writes ordinary files and then calls the entries of the ordinary verbs, with the
command lines it prints; any of them can be run again by hand::

    data      digits of 43 people -> jsonl + PNG; the validation strokes are set aside before anything is drawn
    model     a few million random weights and a tokenizer trained on the spot: a model directory
    stage 1   tessera sft, everything frozen but the aligner
    stage 2   tessera sft, everything trained
    export    tessera export: the directory to keep
    infer     tessera infer over the validation rows
    score     exact match of lines and of sums, and of every checkpoint on the way there; tessera report

Why it learns this fast: Muon moves every direction of a weight matrix equally far, where AdamW sits on a plateau for
most of the time there is; every row is seen at most twice, so there is little to memorise; and a row is about fifteen
tokens long. The length of the training is a number of steps, so that a seed gives the same model on any machine.
"""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tessera.checkpoint.store import checkpoints, new_run_dir, step_of
from tessera.config.resolve import resolve
from tessera.config.run import Run
from tessera.infer import run as inference
from tessera.infer.results import RULE, exact_match, read_results
from tessera.observe import report
from tessera.recipes import blueprint, export, handwriting, supervised

BLUEPRINT = Path(__file__).parent / "demo_model"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How much of everything. ``batch`` rows make a step; ``lengths`` are those of a line in digits."""

    rows: int = 40_000
    held_rows: int = 600
    measured_rows: int = 250
    held_share: float = 0.12
    variants: int = 32
    lengths: tuple[int, ...] = (4, 5, 6)
    sums: float = 0.1
    change: float = 0.6
    batch: int = 64
    aligner_steps: int = 40
    steps: int = 1000
    checkpoints: int = 6
    learning_rate: float = 2e-2

    def shortened(self, steps: int) -> Recipe:
        """The same recipe for this number of steps in all: no more rows than they can use."""
        aligner = min(self.aligner_steps, max(1, steps // 10))
        rows = min(self.rows, self.batch * steps)
        return replace(self, rows=rows, aligner_steps=aligner, steps=max(1, steps - aligner))


@dataclass(frozen=True, slots=True)
class Data:
    """The files of the demo: training rows, validation rows."""

    train: Path
    held: Path


def main(run: Run) -> Path:
    """The whole demo, as ``run`` says (seed, output_dir, max_steps); returns the path of the report."""
    recipe = Recipe() if run.train.max_steps < 1 else Recipe().shortened(run.train.max_steps)
    folder = new_run_dir(Path(run.save.output_dir), time.strftime("%Y%m%d-%H%M%S"), add_version=True)
    seed = run.train.seed
    data = make_data(folder / "data", recipe, seed)
    model = make_model(folder / "model", data, seed)

    started = time.time()
    _say("stage 1", "the aligner alone learns to hand the tower's output to the decoder")
    aligner = train(model, data, folder / "aligner", recipe, seed, stage=1)
    _say("stage 2", "tower, aligner and decoder learn together")
    last = train(aligner, data, folder / "vlm", recipe, seed, stage=2)
    trained = time.time() - started

    run_dir = last.parent
    exported = run_dir / "exported"
    _call(["export", "--model", last, "--output_dir", exported], export.main)
    _say("infer", "the exported model reads validation rows; nobody has seen these strokes")
    answers = read_results(answer(exported, data.held, recipe, run_dir / "infer.txt"))
    _show((run_dir / "infer.txt").read_text(encoding="utf-8"))
    measure(run_dir, data, recipe, started)
    page = report.build(run_dir)
    for kind in (handwriting.LINE, handwriting.SUM):
        rows = [row for row in answers if row["kind"] == kind]
        print(f"exact match on unseen strokes, {kind}s: {exact_match(rows) or 0.0:.3f} of {len(rows)}")
    print(f"trained in {trained:.0f} s; model: {exported}\nreport: {page}", flush=True)
    return page


def make_data(folder: Path, recipe: Recipe, seed: int) -> Data:
    """Compose training and validation rows from disjoint sets of strokes."""
    clock = time.time()
    generator = np.random.default_rng(seed)
    strokes, unseen = handwriting.split(handwriting.load_strokes(), recipe.held_share, generator)
    glyphs = handwriting.draw(strokes, recipe.variants, generator, change=recipe.change)
    train_rows = handwriting.write(folder, "train", recipe.rows, glyphs, generator, recipe.lengths, recipe.sums)
    # Trained on strokes bent this way and that, judged on unseen ones exactly as people wrote them.
    glyphs = handwriting.draw(unseen, 1, generator, change=0.0)
    held = handwriting.write(folder, "val", recipe.held_rows, glyphs, generator, recipe.lengths, recipe.sums)
    counts = (
        f"{recipe.rows:,} rows of {len(strokes.labels):,} digits, {recipe.held_rows} of {len(unseen.labels)} others"
    )
    _say("data", f"{counts} -> {folder} ({time.time() - clock:.0f} s)")
    return Data(train_rows, held)


def make_model(folder: Path, data: Data, seed: int) -> Path:
    """Compose the model, its tokenizer trained on the answers of the training rows."""
    with data.train.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["messages"][-1]["content"] for line in lines]
    size = blueprint.compose(BLUEPRINT, texts, folder, seed)
    _say("model", f"{size / 1e6:.2f} million random parameters and a tokenizer -> {folder}")
    return folder


def train(model: Path, data: Data, folder: Path, recipe: Recipe, seed: int, *, stage: int) -> Path:
    """Run ``tessera sft`` for one stage; returns its last checkpoint."""
    steps = recipe.aligner_steps if stage == 1 else recipe.steps
    every = steps if stage == 1 else math.ceil(steps / recipe.checkpoints)
    shared: dict[str, Any] = {
        "model": model,
        "dataset": data.train,
        "train_type": "full",
        "torch_dtype": "float32",
        "optim": "muon",
        "learning_rate": recipe.learning_rate,
        "weight_decay": 0.0,
        "per_device_train_batch_size": recipe.batch,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": "false",
        "max_steps": steps,
        "logging_steps": max(1, steps // 20),
        "save_steps": every,
        "save_only_model": "true",
        "report_to": "none",
        "output_dir": folder,
        "add_version": "false",
        "seed": seed,
    }
    if stage == 1:
        parts = {"freeze_llm": "true", "freeze_vit": "true", "freeze_aligner": "false"}
        schedule: dict[str, Any] = {"lr_scheduler_type": "constant", "eval_strategy": "no"}
    else:
        parts = {"freeze_llm": "false", "freeze_vit": "false", "freeze_aligner": "false"}
        schedule = {"lr_scheduler_type": "cosine", "warmup_steps": min(100, steps // 10)}
        schedule |= {"val_dataset": data.held, "eval_steps": every, "per_device_eval_batch_size": recipe.batch}
    words = [word for flag, value in {**shared, **parts, **schedule}.items() for word in (f"--{flag}", value)]
    last = _call(["sft", *words], supervised.main)
    assert isinstance(last, Path)
    return last


def answer(model: Path, rows: Path, recipe: Recipe, log: Path, limit: int | None = None) -> Path:
    """Run ``tessera infer`` over the (first ``limit``) rows, its console in ``log``; returns the result file."""
    words = ["infer", "--model", model, "--val_dataset", rows, "--temperature", 0, "--max_new_tokens", 16]
    words += ["--max_batch_size", recipe.batch, *(["--val_dataset_sample", limit] if limit else [])]
    with ExitStack() as stack:
        sink = stack.enter_context(log.open("w", encoding="utf-8"))
        path = _call(words, lambda run: inference.main(run, sink=sink), quiet=limit is not None)
    assert isinstance(path, Path)
    return path


def measure(run_dir: Path, data: Data, recipe: Recipe, started: float) -> list[dict[str, Any]]:
    """Exact match on lines of each checkpoint over the seconds since ``started``; also in ``accuracy.jsonl``.

    The time includes everything between the start of stage 1 and the moment the checkpoint was complete.
    """
    table = []
    print("\n  seconds    step   exact match (lines of unseen strokes)", flush=True)
    for checkpoint in checkpoints(run_dir):
        path = answer(checkpoint, data.held, recipe, run_dir / "infer-checkpoints.txt", recipe.measured_rows)
        rows = [row for row in read_results(path) if row["kind"] == handwriting.LINE]
        seconds = (checkpoint / "config.json").stat().st_mtime - started
        row = {"seconds": round(seconds, 1), "step": step_of(checkpoint), "exact_match": exact_match(rows)}
        table.append(row)
        print(f"  {seconds:7.0f}  {row['step']:6d}   {row['exact_match']:.3f}", flush=True)
    text = "".join(json.dumps(row) + "\n" for row in table)
    (run_dir / "accuracy.jsonl").write_text(text, encoding="utf-8")
    return table


def _call(words: Sequence[Any], entry: Callable[[Run], Any], *, quiet: bool = False) -> Any:
    """What the command line does with these words, after printing them."""
    argv = [str(word) for word in words]
    if not quiet:
        print(f"\n$ tessera {shlex.join(argv)}", flush=True)
    return entry(resolve(argv, {}))


def _say(step: str, text: str) -> None:
    print(f"[{step}] {text}", flush=True)


def _show(log: str, rows: int = 6) -> None:
    """The first few answers of an inference's console, and its closing lines."""
    parts = log.split(f"{RULE}\n")
    print(f"{RULE}\n".join([*parts[:rows], parts[-1]]), flush=True)
