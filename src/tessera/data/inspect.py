"""``tessera data``: look at the rows before paying for a run.

Plans the datasets exactly as training would and prints what came of it: where the rows come from and in which format,
how long they are, how they pack, which were refused and why, and one sample as the model will see it. No model is
loaded. Nothing is written, except ``skipped.jsonl`` if ``--output_dir`` is given.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tessera.config.errors import UserError
from tessera.config.run import Run
from tessera.contract.model import Geometry
from tessera.data.corpus import Corpus, prepare
from tessera.data.pack import plan_epoch
from tessera.data.render import Renderer
from tessera.data.sample import BadRow
from tessera.models.families import family_of

_LOOKED_AT = 1000


def main(run: Run) -> None:
    """Print what the datasets of ``run`` are and what training would make of them."""
    if not run.model.model:
        raise UserError("--model is missing: token counts need its tokenizer and image geometry", exit_code=2)
    directory = Path(run.model.model).expanduser()
    geometry, longest = _geometry(run, directory)
    renderer = Renderer(directory, geometry, run.data.system, run.data.loss_scale)
    given = run.provenance["output_dir"] != "default"
    data = replace(run.data, max_skip_ratio=1.0)
    train, val = prepare(data, renderer, geometry, Path(run.save.output_dir) if given else None, max_length=longest)
    for line in report(run, train, val):
        print(line)


def report(run: Run, train: Corpus, val: Corpus | None) -> Iterator[str]:
    """What ``main`` prints, line by line."""
    for name, corpus in (("train", train), ("val", val)):
        if corpus is None:
            continue
        for dataset, rows in enumerate(corpus.rows):
            used = int((corpus.refs[:, 0] == dataset).sum())
            formats = ", ".join(f"{kind} {count}" for kind, count in _formats(corpus, dataset).most_common())
            yield f"{name}  {rows.name}: {used} rows used of {len(rows)} ({formats})"
        yield f"{name}  tokens per row: {_spread(corpus.lengths)}; {int(corpus.lengths.sum())} in all"
        if corpus.patches.any():
            yield f"{name}  image patches per row: {_spread(corpus.patches)}; {int(corpus.patches.sum())} in all"
    if run.data.packing and len(train):
        capacity = run.data.packing_length or train.encoder.max_length or int(train.lengths.max())
        units = plan_epoch(train.lengths, run.data.data_seed, 0, packing=True, capacity=capacity)
        filled = float(train.lengths.sum()) / (len(units) * capacity)
        yield f"packing  {len(train)} rows in {len(units)} packs of {capacity} tokens, {filled:.1%} filled"
    if len(train.skips):
        yield f"skipped  {len(train.skips)} rows"
        for count, reason in train.skips.reasons()[:10]:
            yield f"  {count}x {reason}"
    yield train.encoder.renderer.describe(train.encoded(0))


def format_of(row: Mapping[str, Any]) -> str:
    """The name of a row's format, as people call it."""
    names = {name.lower() for name, value in row.items() if value is not None}
    for name in ("messages", "conversations", "conversation"):
        if name in names:
            turns = next(value for key, value in row.items() if key.lower() == name)
            first = turns[0] if isinstance(turns, list) and turns else {}
            keys = set(first) if isinstance(first, dict) else set()
            return "sharegpt" if "from" in keys else "pairs" if "human" in keys else "messages"
    if {"instruction", "output"} <= names:
        return "alpaca"
    if names & {"text"} and not names & {"query", "question", "problem", "prompt"}:
        return "text"
    return "query/response"


def _formats(corpus: Corpus, dataset: int) -> Counter[str]:
    """How often each format occurs among the first rows used of a dataset."""
    rows = corpus.rows[dataset]
    counts: Counter[str] = Counter()
    for row in np.unique(corpus.refs[corpus.refs[:, 0] == dataset, 1])[:_LOOKED_AT].tolist():
        try:
            counts[format_of(rows[row])] += 1
        except BadRow:
            counts["unreadable"] += 1
    return counts


def _spread(values: np.ndarray) -> str:
    low, median, high, top = (int(np.percentile(values, share)) for share in (0, 50, 95, 100))
    return f"min {low}, median {median}, 95% {high}, max {top}, mean {float(values.mean()):.1f}"


def _geometry(run: Run, directory: Path) -> tuple[Geometry, int | None]:
    """The model's geometry under the run's pixel limits, and its longest sequence in tokens."""
    if not (directory / "config.json").is_file():
        raise UserError(f"--model {run.model.model}: no config.json there; give the directory of a model")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    preprocessor: dict[str, Any] = {}
    for name, key in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        if (directory / name).is_file():
            found = json.loads((directory / name).read_text(encoding="utf-8"))
            preprocessor = found.get(key, {}) if key else found
    geometry = family_of(config).geometry(config, preprocessor)
    model = run.model
    limited = geometry.limited(model.min_pixels, model.max_pixels, model.video_max_pixels, model.fps)
    longest = {**config, **config.get("text_config", {})}.get("max_position_embeddings")
    return limited, int(longest) if longest else None
