"""``tessera data``: look at the rows before paying for a run.

Plans the datasets exactly as training would and prints what came of it: where the rows come from and in which format,
how long they are, how they pack, which were refused and why, and one sample as the model will see it. No model is
loaded, and nothing is written unless a place for ``skipped.jsonl`` is named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tessera.config.run import DataArgs
from tessera.contract.model import Geometry
from tessera.data.corpus import Corpus, prepare
from tessera.data.pack import plan_epoch
from tessera.data.render import Renderer
from tessera.data.sample import BadRow

_LOOKED_AT = 1000


def show(
    data: DataArgs,
    model_dir: Path,
    geometry: Geometry,
    max_length: int | None = None,
    skipped_into: Path | None = None,
) -> None:
    """Print what the datasets of ``data`` are and what training a model would make of them.

    ``model_dir`` holds the model's tokenizer and chat template, ``max_length`` is its longest sequence in tokens.
    Nothing is written unless ``skipped_into`` names a directory for ``skipped.jsonl``.
    """
    renderer = Renderer(model_dir, geometry, data.system, data.loss_scale)
    tolerant = replace(data, max_skip_ratio=1.0)
    train, val = prepare(tolerant, renderer, geometry, max_length=max_length)
    if skipped_into is not None:
        train.skips.write(skipped_into / "skipped.jsonl")
    for line in report(data, train, val):
        print(line)


def report(data: DataArgs, train: Corpus, val: Corpus | None) -> Iterator[str]:
    """What ``show`` prints, line by line."""
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
    for share, rows in zip(train.shares, train.rows, strict=False):
        yield f"blend  {rows.name}: {share} of the {train.epoch_rows} rows of an epoch ({share / train.epoch_rows:.1%})"
    if data.packing and len(train):
        capacity = data.packing_length or train.encoder.max_length or int(train.lengths.max())
        lengths = train.lengths[train.drawn(data.data_seed, 0)]
        units = plan_epoch(lengths, data.data_seed, 0, packing=True, capacity=capacity)
        filled = float(lengths.sum()) / (len(units) * capacity)
        yield f"packing  {len(lengths)} rows in {len(units)} packs of {capacity} tokens, {filled:.1%} filled"
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
