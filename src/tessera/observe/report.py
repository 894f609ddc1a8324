"""``tessera report RUN``: everything a run left behind, on one page that needs nothing else to be read.

The report answers, from top to bottom, the questions one has about a finished run::

    did it work?         tiles, accuracy over time
    did it learn well?   curves
    what does it get wrong?   validation images with label and prediction, errors first
    was the data sound?  skipped rows, skipped steps
    what was it exactly? model, trained modules, hardware, versions, the flags that are not defaults

It reads ``logging.jsonl``, ``run_facts.json``, ``args.json``, ``skipped.jsonl``, ``accuracy.jsonl`` and the newest
``infer_result/*.jsonl``. What is not there is said in its place, so that an empty section cannot pass for a good one.
"""

from __future__ import annotations

import html
import json
import os
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessera.config.errors import UserError
from tessera.config.run import Run
from tessera.observe import gallery
from tessera.observe.charts import Line, chart, number
from tessera.observe.cost import human_count
from tessera.observe.curves import Curves, Points, ema, finite, read_jsonl, read_log
from tessera.observe.facts import RunFacts, load_facts
from tessera.observe.metrics import STEP_KEY
from tessera.observe.page import box, missing, page, section, table, tile
from tessera.observe.progress import format_time

REPORT_FILE = "report.html"
SKIPPED_SHOWN = 50
SINGLE = (
    ("grad_norm", "gradient norm", "before clipping"),
    ("tokens/s", "throughput", "tokens per second"),
    ("train_speed(s/it)", "seconds per step", ""),
    ("data_wait(%)", "waiting for data", "% of the time"),
    ("pack_efficiency", "pack efficiency", "share of packed slots in use"),
    ("memory(GiB)", "peak memory", "GiB"),
)


def main(run: Run) -> None:
    """The verb: build the report of ``run.target`` and print where it is."""
    assert run.target is not None
    print(f"report: {build(Path(run.target))}")


def build(run_dir: Path) -> Path:
    """Write ``report.html`` into the run that ``run_dir`` names (see :func:`locate`) and return its path."""
    run_dir = locate(run_dir)
    material = Material.read(run_dir)
    title = f"{_model_name(material)} · {material.verb} {material.train_type}".strip()
    body = [
        _header(material, title),
        section("Accuracy over time", _accuracy(run_dir)),
        section("Curves", _curves(material.log)),
        section("Predictions on validation data, errors first", _predictions(material)),
        section("Data and stability", f'<div class="cols">{_skipped(run_dir)}{_events(material.log)}</div>'),
        section("The run", _facts(material)),
        f"<footer>{html.escape(str(run_dir))} · made {time.strftime('%Y-%m-%d %H:%M')} by tessera report</footer>",
    ]
    target = run_dir / REPORT_FILE
    aside = run_dir / f".{REPORT_FILE}.tmp"
    aside.write_text(page(title, [part for part in body if part]), encoding="utf-8")
    os.replace(aside, target)
    return target


def locate(path: Path) -> Path:
    """The run directory meant by ``path``: itself, the parent of a checkpoint, or the newest ``vN-...`` below it."""
    if not path.is_dir():
        raise UserError(f"tessera report {path}: no such directory; name a run, a checkpoint of it or an output_dir")
    path = path.resolve()
    for candidate in (path, path.parent if path.name.startswith("checkpoint-") else path):
        if any((candidate / name).exists() for name in ("logging.jsonl", "run_facts.json")):
            return candidate
    versions = [(int(m[1]), p.name, p) for p in path.glob("v*-*") if (m := re.match(r"v(\d+)-", p.name)) and p.is_dir()]
    if versions:
        return max(versions)[2]
    if (path / "args.json").exists():
        return path
    raise UserError(f"tessera report {path}: not a run (no logging.jsonl) and holds none (no vN-... directory)")


MEASURED = ("eval_loss", "eval_token_acc", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
"""What every evaluation logs; any other ``eval_`` is a benchmark's score."""


@dataclass(frozen=True, slots=True)
class Material:
    """What a run left behind, read once."""

    run_dir: Path
    log: Curves
    facts: RunFacts | None
    args: dict[str, Any]
    results: Path | None
    answers: list[gallery.Answer]

    @classmethod
    def read(cls, run_dir: Path) -> Material:
        """Read ``run_dir``; whatever is missing is empty."""
        results = gallery.newest_results(run_dir)
        answers = gallery.read_answers(results) if results else []
        return cls(run_dir, read_log(run_dir), load_facts(run_dir), _args(run_dir), results, answers)

    @property
    def verb(self) -> str:
        return self.facts.verb if self.facts else str(self.args.get("verb", ""))

    @property
    def train_type(self) -> str:
        return self.facts.train_type if self.facts else str(self.args.get("train_type", ""))


def _args(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "args.json"
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _model_name(material: Material) -> str:
    model = material.facts.model if material.facts else str(material.args.get("model") or "")
    return Path(model).name or material.run_dir.name


def _header(material: Material, title: str) -> str:
    log = material.log
    loss = finite(log.curves.get("loss", []))
    eval_loss = finite(log.curves.get("eval_loss", []))
    accuracy = finite(log.curves.get("eval_token_acc", []) or log.curves.get("token_acc", []))
    exact = gallery.exact_match(material.answers)
    tiles = []
    if exact is not None:
        tiles.append(tile(f"{100 * exact:.1f} %", f"exact match, {len(material.answers):,} samples"))
    if accuracy:
        kind = "validation" if "eval_token_acc" in log.curves else "training"
        tiles.append(tile(f"{100 * accuracy[-1][1]:.1f} %", f"token accuracy, {kind}"))
    if eval_loss:
        best = min(eval_loss, key=lambda point: point[1])
        tiles.append(tile(number(best[1]), f"best validation loss, step {best[0]:,}"))
    if loss:
        tiles.append(tile(number(loss[-1][1]), "last training loss"))
    tiles.append(tile(f"{log.steps:,} / {log.max_steps:,}", "steps"))
    seconds = log.last.get("train_runtime")
    duration = format_time(seconds) if isinstance(seconds, (int, float)) else log.elapsed
    if duration:
        tiles.append(tile(duration, "training time" if seconds else "until the last line"))
    speed = [value for _, value in finite(log.curves.get("tokens/s", []))]
    if speed:
        tiles.append(tile(number(sorted(speed)[len(speed) // 2]), "tokens per second, median"))
    where = html.escape(str(material.run_dir))
    head = f'<h1>{html.escape(title)}{_status(log)}</h1><p class="sub">{where}</p>'
    return f'<header>{head}<div class="tiles">{"".join(tiles)}</div></header>'


def _status(log: Curves) -> str:
    if log.last and log.steps >= log.max_steps > 0:
        return '<span class="badge good">finished</span>'
    if not log.steps:
        return '<span class="badge warn">nothing logged</span>'
    return f'<span class="badge warn">not finished: step {log.steps:,} of {log.max_steps:,}</span>'


def _accuracy(run_dir: Path) -> str:
    """``accuracy.jsonl``, rows of seconds, step and exact match; nothing if the run measured none."""
    numbers = (int, float)
    every = [row for row in read_jsonl(run_dir / "accuracy.jsonl") if row]
    rows = [r for r in every if isinstance(r.get("seconds"), numbers) and isinstance(r.get("exact_match"), numbers)]
    if not rows:
        return ""
    points: Points = [(round(row["seconds"]), row["exact_match"]) for row in rows]
    shown = [(format_time(row["seconds"]), row.get("step", ""), f"{row['exact_match']:.3f}") for row in rows]
    figure = chart("exact match", [Line("exact match", points)], note="over seconds of training", zero=True)
    listing = box("Measured", table(("training time", "step", "exact match"), shown, numeric=(1, 2)))
    return f'<div class="cols">{figure}{listing}</div>'


def _curves(log: Curves) -> str:
    curves = log.curves
    if not curves:
        return missing("logging.jsonl holds no values: no curves.")
    loss = finite(curves.get("loss", []))
    smooth = list(zip((step for step, _ in loss), ema([value for _, value in loss]), strict=True))
    losses = [Line("raw", loss, 0, faint=True), Line("EMA 0.9", smooth, 0)]
    losses.append(Line("validation", curves.get("eval_loss", []), 1))
    accuracy = [Line("training", curves.get("token_acc", []), 0)]
    accuracy.append(Line("validation", curves.get("eval_token_acc", []), 1))
    figures = [chart("loss", losses), chart("token accuracy", accuracy)]
    rates = [Line("largest", curves.get("learning_rate", []), 0)]
    groups = [key for key in curves if key.startswith("lr_")]
    rates += [Line(key.removeprefix("lr_"), curves[key], index) for index, key in enumerate(groups[:3], 1)]
    figures.append(chart("learning rate", rates))
    asked = [key for key in curves if key.startswith("eval_") and key not in MEASURED]
    if asked:
        lines = [Line(key.removeprefix("eval_"), curves[key], index % 4) for index, key in enumerate(asked)]
        figures.append(chart("benchmarks", lines, note="pages in eval/step-N", zero=True))
    figures += [
        chart(title, [Line(title, curves[key])], note=note, zero=True) for key, title, note in SINGLE if key in curves
    ]
    absent = [title for key, title, _ in SINGLE if key not in curves]
    said = missing(f"Not logged: {', '.join(absent)}.") if absent else ""
    torn = missing(f"{log.torn} lines of logging.jsonl are not complete and were left out.") if log.torn else ""
    return f'<div class="charts">{"".join(figures)}</div>{said}{torn}'


def _predictions(material: Material) -> str:
    if material.results is None:
        return missing("No infer_result/*.jsonl in this run: run tessera infer on one of its checkpoints.")
    answers, results = material.answers, material.results.relative_to(material.run_dir)
    if not answers:
        return missing(f"{results} holds no answers.")
    shown = gallery.errors_first(answers)
    wrong = sum(answer.right is False for answer in answers)
    judged = sum(answer.right is not None for answer in answers)
    verdict = f"{judged - wrong:,} of {judged:,} exactly right, {wrong:,} wrong. " if judged else "No labels. "
    text = f"{verdict}Showing {len(shown):,} of {len(answers):,} from {results}."
    roots = [Path.cwd(), material.run_dir, *material.run_dir.parents[:2], *_data_dirs(material.args)]
    return f'<p class="note">{html.escape(text)}</p>{gallery.gallery(shown, roots)}'


def _data_dirs(args: dict[str, Any]) -> list[Path]:
    """Directories of the run's data sets, below which relative image paths may be meant."""
    names = [str(name) for key in ("dataset", "val_dataset") for name in args.get(key) or []]
    return list(dict.fromkeys(Path(re.sub(r"[:#].*$", "", name)).parent for name in names))


def _skipped(run_dir: Path) -> str:
    path = run_dir / "skipped.jsonl"
    rows = [row for row in read_jsonl(path) if row]
    if not rows:
        text = "None: skipped.jsonl is empty." if path.exists() else "None: there is no skipped.jsonl."
        return box("Skipped rows", missing(text))
    kinds = Counter(re.sub(r"\d+", "N", str(row.get("reason", "")).split(":")[0]) for row in rows)
    counts = table(("reason", "rows"), [(kind, f"{count:,}") for kind, count in kinds.most_common()], numeric=(1,))
    listed = [(row.get("dataset", ""), row.get("row", ""), row.get("reason", "")) for row in rows[:SKIPPED_SHOWN]]
    first = f"the first {len(listed)} of {len(rows):,} rows"
    listing = table(("data set", "row", "reason"), listed, numeric=(1,))
    return box(f"Skipped rows: {len(rows):,}", f"{counts}<details><summary>{first}</summary>{listing}</details>")


def _events(log: Curves) -> str:
    if not log.events:
        return box("Skipped steps and other events", missing("None: every logged step had a finite loss and gradient."))
    rows = []
    for event in log.events[:SKIPPED_SHOWN]:
        rest = {key: value for key, value in event.items() if key not in ("event", STEP_KEY)}
        text = ", ".join(f"{key} {value}" for key, value in rest.items())
        rows.append((str(event[STEP_KEY]).split("/")[0], str(event["event"]).replace("_", " "), text[:400]))
    more = missing(f"… and {len(log.events) - len(rows)} more in logging.jsonl") if len(log.events) > len(rows) else ""
    listing = table(("step", "event", "details"), rows, numeric=(0,))
    return box(f"Skipped steps and other events: {len(log.events):,}", listing + more)


def _facts(material: Material) -> str:
    facts = material.facts
    if facts is None:
        names = ("model", "model_type", "train_type", "dataset", "tessera_version")
        known = [(name, material.args[name]) for name in names if material.args.get(name)]
        said = missing("No run_facts.json: trained modules, hardware and package versions of this run are not known.")
        return box("Model and data", (table((), known) if known else "") + said) + _flags(material)
    share = 100 * facts.trainable / max(1, facts.parameters)
    rows = [
        ("model", f"{facts.model} ({facts.family})"),
        ("training", ", ".join(part for part in (facts.train_type, facts.dtype, facts.optimizer) if part)),
        ("parameters", f"{facts.parameters:,}, of which {facts.trainable:,} trained ({share:.2f} %)"),
        ("training samples", f"{facts.train_samples:,}"),
        ("validation samples", f"{facts.val_samples:,}"),
        ("per step", f"{facts.tokens_per_step:,.0f} tokens, {facts.samples_per_step:,.1f} samples ({facts.batch})"),
        ("steps", f"{facts.steps:,} ({facts.epochs:g} epochs)"),
        *([("layout", facts.layout)] if facts.layout else []),
        ("memory", facts.memory),
        ("hardware", facts.hardware),
        ("versions", ", ".join(f"{name} {version}" for name, version in facts.versions.items())),
    ]
    modules = [(m.pattern, f"{m.tensors:,}", human_count(m.parameters), f"{m.lr:.2e}") for m in facts.modules]
    trained = table(("name pattern", "tensors", "parameters", "peak lr"), modules, numeric=(1, 2, 3))
    about = box("Model, data, machine", table((), rows))
    return f'<div class="cols">{about}<div>{box("Trained modules", trained)}{_flags(material)}</div></div>'


def _flags(material: Material) -> str:
    if material.facts is None:
        return "" if material.args else box("Flags", missing("No args.json: the flags of this run are not known."))
    if not material.facts.flags:
        return box("Flags", missing("All flags had their defaults."))
    rows = [(f"--{name}", _shown(value), origin) for name, (value, origin) in sorted(material.facts.flags.items())]
    return box("Flags that are not defaults", table(("flag", "value", "from"), rows))


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
