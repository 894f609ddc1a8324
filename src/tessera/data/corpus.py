"""All rows a run trains on, with their lengths, before a single image is decoded.

:func:`prepare` opens the datasets, draws and splits rows, and *plans* each one: its text is rendered and tokenised, its
images are measured by their headers. What remains of a row is a reference and a few integers; the row itself is read
and encoded again when its turn comes, which is cheap, so memory does not grow with the data.

A row that cannot be trained on is skipped, counted and listed in ``skipped.jsonl`` with its reason, never replaced by
another one. Too many of them stop the run: a path prefix that is wrong should not become a model trained on the rest.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tessera.config.errors import UserError
from tessera.config.run import DataArgs
from tessera.contract.model import Geometry
from tessera.data import media
from tessera.data.blend import draw, whole_shares
from tessera.data.encode import Encoder, Files
from tessera.data.render import Encoded, Rendered, Renderer
from tessera.data.sample import BadRow, ImageRef, Sample
from tessera.data.sources import leaves, parse_dataset_spec, sample_rows, split_rows
from tessera.data.tables import Joined, Rows, place_of

_CHUNK = 1000
_NUMBERS = re.compile(r"\d+")


class Chosen(NamedTuple):
    """A dataset and the ``indices [n]`` of its rows that are used, possibly with repeats.

    ``share`` is how many of them an epoch shows if the dataset is part of a blend, None for each of them once.
    """

    rows: Rows
    indices: np.ndarray
    share: float | None = None


Progress = Callable[[int, int], None]
"""Called with (rows planned, rows in all) now and then."""


@dataclass
class Skips:
    """Rows that were not used: counted by reason, and appended to ``path`` if there is one. Safe in any thread."""

    path: Path | None = None
    rows: dict[tuple[str, int], str] = field(default_factory=dict)
    places: dict[tuple[str, int], str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, dataset: str, row: int, reason: str, place: str = "") -> None:
        """Note row number ``row`` (from 0) of ``dataset``, once; ``place`` is where it lies, beyond its number."""
        with self._lock:
            if (dataset, row) in self.rows:
                return
            self.rows[dataset, row] = reason
            if place:
                self.places[dataset, row] = place
            if self.path is not None:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(self._line((dataset, row)))

    def write(self, path: Path) -> None:
        """All rows skipped so far, as a new file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            path.write_text("".join(self._line(key) for key in self.rows), encoding="utf-8")

    def __len__(self) -> int:
        return len(self.rows)

    def reasons(self) -> list[tuple[int, str]]:
        """(count, example) of each kind of reason, most frequent first."""
        kinds = Counter(_kind(reason) for reason in self.rows.values())
        first: dict[str, str] = {}
        for reason in self.rows.values():
            first.setdefault(_kind(reason), reason)
        return [(count, first[kind]) for kind, count in kinds.most_common()]

    def summary(self, most: int = 3) -> str:
        """The most frequent reasons in one line."""
        return "; ".join(f"{count}x {reason}" for count, reason in self.reasons()[:most])

    def entries(self) -> list[dict[str, Any]]:
        """One object per row skipped: dataset, row, place if there is more to say than its number, reason."""
        return [self._entry(key) for key in self.rows]

    def _entry(self, key: tuple[str, int]) -> dict[str, Any]:
        place = {"place": self.places[key]} if key in self.places else {}
        return {"dataset": key[0], "row": key[1], **place, "reason": self.rows[key]}

    def _line(self, key: tuple[str, int]) -> str:
        return json.dumps(self._entry(key), ensure_ascii=False) + "\n"


@dataclass(frozen=True, slots=True)
class Corpus:
    """Planned rows: ``lengths [N] int64`` tokens, ``patches [N] int64`` tower input rows, ``refs [N, 3] int64``.

    A ref is (dataset, row in it, part of the row); ``limit`` is how many rows may still fail when their pixels are
    decoded before the run stops. ``shares`` is how many rows an epoch shows of each dataset, empty if all of them.
    """

    rows: tuple[Rows, ...]
    refs: np.ndarray
    lengths: np.ndarray
    patches: np.ndarray
    encoder: Encoder
    skips: Skips
    limit: float = float("inf")
    shares: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def fingerprint(self) -> str:
        """Changes if a row, its length or the order of the corpus does; independent of where the files lie."""
        digest = hashlib.blake2b(self.refs.tobytes(), digest_size=16)
        digest.update(self.lengths.tobytes())
        digest.update(repr(self.shares).encode() if self.shares else b"")
        return digest.hexdigest()

    @property
    def epoch_rows(self) -> int:
        """How many rows an epoch shows."""
        return sum(self.shares) if self.shares else len(self)

    def drawn(self, seed: int, epoch: int, *, shuffle: bool = True) -> np.ndarray:
        """``[epoch_rows] int64``: which rows an epoch shows, in no particular order; see :mod:`tessera.data.blend`."""
        if not self.shares:
            return np.arange(len(self), dtype=np.int64)
        counts = np.bincount(self.refs[:, 0], minlength=len(self.shares)).tolist()
        return draw(counts, self.shares, seed, epoch, shuffle=shuffle)

    def sample(self, index: int) -> Sample:
        """Row ``index`` in normal form."""
        dataset, row, _ = self.refs[index].tolist()
        return self.encoder.sample(self.rows[dataset][row], self.rows[dataset].base)

    def encoded(self, index: int, sample: Sample | None = None, files: Files | None = None) -> Encoded:
        """Tokens and weights of row ``index``; BadRow if it is no longer what was planned.

        ``sample`` and ``files`` save reading the row and its images a second time.
        """
        whole = self.encoder.encoded(sample or self.sample(index), files)
        parts, part = self.encoder.shortened(whole), int(self.refs[index, 2])
        if part >= len(parts) or len(parts[part].tokens) != self.lengths[index]:
            raise BadRow("the row has changed since it was planned")
        return parts[part]

    def drop(self, index: int, reason: str) -> None:
        """Record that row ``index`` failed after planning; UserError once more than ``limit`` rows have."""
        dataset, row, _ = self.refs[index].tolist()
        self.skips.add(self.rows[dataset].name, row, reason, place_of(self.rows[dataset], row))
        if len(self.skips) > self.limit:
            raise UserError(f"too many unusable rows ({len(self.skips)}, see --max_skip_ratio): {self.skips.summary()}")


def prepare(
    data: DataArgs,
    renderer: Renderer,
    geometry: Geometry,
    run_dir: Path | None = None,
    *,
    max_length: int | None = None,
    is_main: bool = True,
    progress: Progress | None = None,
) -> tuple[Corpus, Corpus | None]:
    """(training, validation) rows of a run, planned; ``run_dir`` receives ``skipped.jsonl`` and ``val_dataset.jsonl``.

    ``max_length`` stands in where ``--max_length`` is not given. Only the main process writes files.
    """
    encoder = Encoder(
        renderer,
        geometry,
        image_resize=data.image_resize,
        root_image_dir=data.root_image_dir,
        max_length=data.max_length or max_length,
        truncation_strategy=data.truncation_strategy,
        columns=data.columns,
    )
    return plan(data, encoder, run_dir, is_main=is_main, progress=progress)


def plan(
    data: DataArgs,
    encoder: Encoder,
    run_dir: Path | None = None,
    *,
    is_main: bool = True,
    progress: Progress | None = None,
) -> tuple[Corpus, Corpus | None]:
    """(training, validation) corpus of ``data`` under the rules of ``encoder``; see :func:`prepare`."""
    train, held = select(data)
    skips = Skips()
    if run_dir is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        skips.path = run_dir / "skipped.jsonl" if is_main else None
        if skips.path is not None:
            skips.path.unlink(missing_ok=True)
    planner = _Planner(encoder, skips, data.strict, sum(len(np.unique(c.indices)) for c in [*train, *held]), progress)
    corpora = [planner.corpus(chosen) for chosen in (train, held)]
    total = planner.total
    names = " ".join(data.dataset) or " ".join(data.val_dataset)
    if not len(corpora[0]) and train:
        raise UserError(f"no row of --dataset {names} can be used ({total} rows): {skips.summary()}")
    if len(skips) > data.max_skip_ratio * total:
        raise UserError(
            f"{len(skips)} of {total} rows of --dataset {names} cannot be used, more than --max_skip_ratio "
            f"{data.max_skip_ratio}: {skips.summary()}"
        )
    limit = 0.0 if data.strict else max(data.max_skip_ratio * total, len(skips))
    ready = [replace(corpus, limit=limit) for corpus in corpora]
    if run_dir is not None:
        skips.path = run_dir / "skipped.jsonl"  # from here on, every rank reports what it fails to decode
        if is_main and held and not data.val_dataset and len(ready[1]):
            _write_rows(ready[1], run_dir / "val_dataset.jsonl")
    return ready[0], ready[1] if len(ready[1]) else None


def select(data: DataArgs) -> tuple[list[Chosen], list[Chosen]]:
    """Which rows are trained on and which are held out, before looking at any of them.

    One random state (``--data_seed``) serves all datasets in order.
    """
    rng = np.random.RandomState(data.data_seed)
    train: list[Chosen] = []
    held: list[Chosen] = []
    ratio = 0.0 if data.val_dataset else data.split_dataset_ratio
    for text in data.dataset:
        spec = parse_dataset_spec(text)
        for rows, share in leaves(spec):
            kept, out = split_rows(len(rows), None if share else spec.sample, ratio, rng, shuffle=data.dataset_shuffle)
            train.append(Chosen(rows, rng.permutation(kept) if data.dataset_shuffle else kept, share))
            if len(out):
                held.append(Chosen(rows, out))
    for text in data.val_dataset:
        spec = parse_dataset_spec(text)
        parts = [rows for rows, _ in leaves(spec, "val")]
        joined = parts[0] if len(parts) == 1 else Joined(spec.name, parts)
        held.append(Chosen(joined, sample_rows(len(joined), spec.sample, rng, shuffle=data.dataset_shuffle)))
    if data.val_dataset_shuffle:
        held = [Chosen(chosen.rows, rng.permutation(chosen.indices)) for chosen in held]
    return train, held


@dataclass
class _Planner:
    """Plans rows in chunks, so that their text is tokenised together."""

    encoder: Encoder
    skips: Skips
    strict: bool
    total: int
    progress: Progress | None
    done: int = 0

    def corpus(self, chosen: Sequence[Chosen]) -> Corpus:
        """The rows of several datasets, one dataset behind the other."""
        refs, lengths, patches = [np.empty((0, 3), np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for dataset, (rows, indices, _) in enumerate(chosen):
            planned = self._dataset(rows, np.unique(indices))
            at = _occurrences(planned[:, 0], indices)
            found = planned[at]
            refs.append(np.column_stack([np.full(len(found), dataset, np.int64), found[:, :2]]))
            lengths.append(found[:, 2])
            patches.append(found[:, 3])
        joined = (np.concatenate(refs), np.concatenate(lengths), np.concatenate(patches))
        shares = _shares(chosen, [len(part) for part in refs[1:]])
        return Corpus(tuple(c.rows for c in chosen), *joined, self.encoder, self.skips, shares=shares)

    def _dataset(self, rows: Rows, indices: np.ndarray) -> np.ndarray:
        """``[n, 4] int64`` (row, part, tokens, patches) of all usable rows among ``indices`` (sorted, no repeats)."""
        held: dict[str, tuple[int, int]] = {}  # a file may serve many rows

        def probe(source: ImageRef) -> tuple[int, int]:
            if not isinstance(source, str):
                return media.probe(source)
            size = held.get(source)
            if size is None:
                size = held[source] = media.probe(source)
            return size

        planned: list[tuple[int, int, int, int]] = []
        for start in range(0, len(indices), _CHUNK):
            chunk: list[tuple[int, Rendered]] = []
            for row in indices[start : start + _CHUNK].tolist():
                try:
                    sample = self.encoder.sample(rows[row], rows.base)
                    chunk.append((row, self.encoder.rendered(sample, probe)))
                except BadRow as error:
                    self._skip(rows, row, error)
            measured = self.encoder.renderer.measure([rendered for _, rendered in chunk])
            for (row, rendered), (length, trained) in zip(chunk, measured, strict=True):
                try:
                    planned += self._entries(row, rendered, length, trained)
                except BadRow as error:
                    self._skip(rows, row, error)
            self.done += len(indices[start : start + _CHUNK])
            if self.progress is not None:
                self.progress(self.done, self.total)
        planned.sort()
        return np.array(planned, dtype=np.int64).reshape(-1, 4)

    def _entries(self, row: int, rendered: Rendered, length: int, trained: int) -> list[tuple[int, int, int, int]]:
        """What is planned for one row: usually itself, several parts where it is split."""
        if trained <= 0:
            raise BadRow("nothing to learn: no token of the row is trained")
        limit = self.encoder.max_length
        if limit is None or length <= limit:
            return [(row, 0, length, sum(t * h * w for t, h, w in (m.item.grid for m in rendered.media)))]
        if self.encoder.truncation_strategy == "delete":
            raise BadRow(f"{length} tokens are more than --max_length {limit}")
        parts = self.encoder.shortened(self.encoder.renderer.encode(rendered))
        kept = [(row, at, len(p.tokens), p.patches) for at, p in enumerate(parts) if p.loss_weight.any()]
        if not kept:
            raise BadRow(
                f"nothing to learn: --truncation_strategy {self.encoder.truncation_strategy} cut the answer off"
            )
        return kept

    def _skip(self, rows: Rows, row: int, error: BadRow) -> None:
        if self.strict:
            place = place_of(rows, row)
            where = f" ({place})" if place else ""
            raise UserError(f"--strict true: row {row} of {rows.name}{where}: {error}") from None
        self.skips.add(rows.name, row, str(error), place_of(rows, row))


def _shares(chosen: Sequence[Chosen], found: Sequence[int]) -> tuple[int, ...]:
    """Rows of each dataset in an epoch, ``found`` of which are usable; empty where nothing is blended."""
    if all(c.share is None for c in chosen):
        return ()
    for c, count in zip(chosen, found, strict=True):
        if not count:
            raise UserError(f"no row of {c.rows.name} can be used, and a blend needs some of each dataset")
    return whole_shares([count if c.share is None else c.share for c, count in zip(chosen, found, strict=True)])


def _occurrences(planned_rows: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Places in the sorted ``planned_rows`` of every row of ``indices``, in their order; none for skipped rows."""
    first = np.searchsorted(planned_rows, indices, side="left")
    count = np.searchsorted(planned_rows, indices, side="right") - first
    starts = np.repeat(first - np.concatenate([[0], np.cumsum(count)[:-1]]), count) if len(indices) else first
    return starts + np.arange(int(count.sum()))


def _kind(reason: str) -> str:
    """A reason without what differs from row to row: numbers, and whatever follows the first colon."""
    return _NUMBERS.sub("N", reason.split(":")[0])


def _write_rows(corpus: Corpus, path: Path) -> None:
    """The corpus as a dataset that can be read again: normal form, one object a line."""
    seen = dict.fromkeys((dataset, row) for dataset, row, _ in corpus.refs.tolist())
    with open(path, "w", encoding="utf-8") as file:
        for dataset, row in seen:
            rows = corpus.rows[dataset]
            file.write(json.dumps(plain_row(corpus.encoder.sample(rows[row], rows.base)), ensure_ascii=False) + "\n")


def plain_row(sample: Sample) -> dict[str, Any]:
    """``sample`` as a row of a jsonl dataset; images held as bytes become data URIs, paths become absolute."""
    messages: list[dict[str, Any]] = []
    for message in sample.messages:
        messages.append({"role": message.role, "content": message.content})
        if message.loss is not None:
            messages[-1]["loss_scale"] = message.loss
        if message.tool_calls:
            messages[-1]["tool_calls"] = list(message.tool_calls)
    row: dict[str, Any] = {"messages": messages}
    if sample.images:
        row["images"] = [_portable(image) for image in sample.images]
    if sample.videos:
        row["videos"] = [[_portable(frame) for frame in video] for video in sample.videos]
    if sample.fps:
        row["fps"] = list(sample.fps)
    if sample.tools:
        row["tools"] = list(sample.tools)
    return row


def _portable(source: ImageRef) -> str:
    if not isinstance(source, str):
        return "data:image;base64," + base64.b64encode(media.load(source)).decode("ascii")
    if source.startswith(("data:", "file:")):
        return source
    return str(Path(source).absolute())
