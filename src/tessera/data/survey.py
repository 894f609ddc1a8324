"""Every row of some datasets looked at once: what is wrong with it, and how large it is.

``lint`` wants the first answer, ``stats`` the second, and reading the rows is what both cost. A row is read, brought
into normal form, and the header of each of its images is read; with a model's renderer its text is tokenised too, and
its length is held against the limit. Unlike training, which puts missing tags in front, this insists that a row which
has ``<image>`` tags has one for every image: that is where most quiet mistakes are made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tessera.config.errors import UserError
from tessera.data import media
from tessera.data.corpus import Skips
from tessera.data.encode import Encoder, located
from tessera.data.render import Rendered
from tessera.data.sample import BadRow, Sample, normalise
from tessera.data.shards.rows import Samples
from tessera.data.sources import leaves, parse_dataset_spec
from tessera.data.tables import Rows, place_of

_CHUNK = 256
_SHARES = (0, 50, 95, 100)


@dataclass(slots=True)
class Survey:
    """What came of looking: ``rows`` in all, those with a mistake in ``wrong``, and numbers of the others.

    ``sizes`` maps a quantity (turns, characters, images, frames, megapixels of an image, tokens) to one value per row,
    or per image.
    """

    rows: int = 0
    wrong: Skips = field(default_factory=Skips)
    sizes: dict[str, list[float]] = field(default_factory=dict)
    datasets: dict[str, int] = field(default_factory=dict)

    def note(self, quantity: str, value: float) -> None:
        """One more value of a quantity."""
        self.sizes.setdefault(quantity, []).append(value)

    def summary(self) -> dict[str, Any]:
        """The survey as JSON: counts, and for each quantity its sum, mean and percentiles."""
        return {
            "rows": self.rows,
            "wrong": len(self.wrong),
            "datasets": dict(self.datasets),
            "sizes": {name: _distribution(values) for name, values in self.sizes.items()},
        }

    def lines(self) -> Iterator[str]:
        """The same for people."""
        for name, count in self.datasets.items():
            yield f"{name}: {count} rows"
        yield f"{self.rows} rows, {len(self.wrong)} of them wrong"
        for name, values in self.sizes.items():
            held = _distribution(values)
            yield (
                f"{name}: min {held['min']:g}, median {held['median']:g}, 95% {held['p95']:g}, max {held['max']:g}, "
                f"mean {held['mean']:.4g}; {held['sum']:.6g} in all"
            )


def datasets_of(texts: Sequence[str]) -> list[Rows]:
    """The datasets named by ``--dataset`` arguments, whole: of prepared folders all parts unless some are named."""
    found = []
    for text in texts:
        spec = parse_dataset_spec(text)
        if spec.sample is not None:
            raise UserError(f"--dataset {text}: every row is looked at; leave #{spec.sample} out")
        found += [rows for rows, _ in leaves(spec, "all")]
    return found


def survey(
    datasets: Sequence[Rows],
    columns: Mapping[str, str] | None = None,
    root: str | None = None,
    encoder: Encoder | None = None,
    *,
    need_answer: bool = True,
) -> Survey:
    """Look at every row; ``columns`` and ``root`` are those of ``--columns`` and ``--root_image_dir``.

    ``encoder`` adds tokens, and what only a model can say is wrong.
    """
    found = Survey()
    for rows in datasets:
        found.rows += len(rows)
        found.datasets[rows.name] = found.datasets.get(rows.name, 0) + len(rows)
        keys: dict[str, int] = {}
        waiting: list[tuple[int, Rendered]] = []
        for index in range(len(rows)):
            try:
                if isinstance(rows, Samples):
                    _unique(rows.key(index), index, keys)
                sample = resolved(
                    normalise(rows[index], columns, need_answer=need_answer, exact_tags=True), rows.base, root
                )
                _measure(sample, found)
                if encoder is not None:
                    waiting.append((index, encoder.rendered(sample)))
            except BadRow as error:
                found.wrong.add(rows.name, index, str(error), place_of(rows, index))
            if len(waiting) == _CHUNK:
                _tokens(rows, waiting, encoder, found)
                waiting = []
        _tokens(rows, waiting, encoder, found)
    return found


def resolved(sample: Sample, base: Path | None, root: str | None) -> Sample:
    """``sample`` with the paths of its media as training would find them."""
    images = tuple(located(image, base, root) for image in sample.images)
    videos = tuple(tuple(located(frame, base, root) for frame in video) for video in sample.videos)
    return Sample(sample.messages, images, videos, sample.tools, sample.fps)


def _measure(sample: Sample, found: Survey) -> None:
    """Note the sizes of a sample; BadRow if an image cannot be used, before anything is noted."""
    sizes = [media.probe(image) for image in sample.images]
    frames = [[media.probe(frame) for frame in video] for video in sample.videos]
    found.note("turns", len(sample.messages))
    found.note("characters", sum(len(message.content) for message in sample.messages))
    found.note("images", len(sample.images))
    for height, width in sizes:
        found.note("megapixels of an image", height * width / 1e6)
    for video in frames:
        found.note("frames of a video", len(video))


def _tokens(rows: Rows, waiting: Sequence[tuple[int, Rendered]], encoder: Encoder | None, found: Survey) -> None:
    """Note how many tokens these rows are; too many, or none that is trained, is a mistake."""
    if encoder is None or not waiting:
        return
    measured = encoder.renderer.measure([rendered for _, rendered in waiting])
    for (index, rendered), (length, trained) in zip(waiting, measured, strict=True):
        reason = ""
        if trained <= 0:
            reason = "nothing to learn: no token of the row is trained"
        elif encoder.max_length is not None and length > encoder.max_length:
            reason = f"{length} tokens are more than --max_length {encoder.max_length}"
        if reason:
            found.wrong.add(rows.name, index, reason, place_of(rows, index))
        found.note("tokens", length)
        if rendered.slots:
            found.note("tokens of images and videos", sum(rendered.slots))


def _unique(key: str, index: int, keys: dict[str, int]) -> None:
    before = keys.setdefault(key, index) if key else index
    if before != index:
        raise BadRow(f"key {key} occurs twice, first as row {before}")


def _distribution(values: Sequence[float]) -> dict[str, float]:
    low, median, high, top = (float(value) for value in np.percentile(values, _SHARES))
    total = float(np.sum(values))
    return {"min": low, "median": median, "p95": high, "max": top, "mean": total / len(values), "sum": total}
